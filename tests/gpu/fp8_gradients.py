"""How far log-probs and gradients in each arithmetic lie from fp32's: `python fp8_gradients.py HF DEVICE RECIPE...`.

Prints one JSON line: of each recipe the root mean square difference of the log-probs, and of each parameter the norm of
its gradient's difference over the norm. Recipes: bf16, emulated, two_bits (emulated with a bit less), te_bf16, te_fp8.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from parity.case import Case, random_case
from r1mega.parallel import groups
from r1mega.parallel.layout import Layout

EMULATED = {"params_dtype": "bfloat16", "fp8": True, "emulate_fp8": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"params_dtype": "bfloat16"},
    "emulated": EMULATED,
    "emulated_in_fp32": EMULATED | {"params_dtype": "float32"},
    "two_bits": EMULATED,
    "te_bf16": {"params_dtype": "bfloat16", "layer_spec": "te"},
    "te_fp8": {"params_dtype": "bfloat16", "layer_spec": "te", "fp8": True},
}


def answer(hf: Path, world: groups.Groups, case: Case, options: dict[str, Any]) -> dict:
    """Log-probs and gradients."""
    from parity import ranks

    policy = ranks.build(hf, world, case, **options)
    found = ranks.answer(policy, hf, case, chunk_tokens=1024)
    policy.close()
    return found


def main(hf: str, device: str, *recipes: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    world = groups.initialize(Layout(), device, seed=0, timeout_minutes=5)
    import torch

    from r1mega.models import fp8_linear

    case = random_case(323, num_sequences=8, max_length=200)
    exact, told = answer(Path(hf), world, case, {}), {}
    for recipe in recipes:
        fp8_linear.MANTISSA_BITS = 2 if recipe == "two_bits" else 3
        found = answer(Path(hf), world, case, OPTIONS[recipe])
        logprobs = torch.cat(found["logprobs"]) - torch.cat(exact["logprobs"])
        gradients = {
            name: float((found["gradients"][name].float() - value).norm() / value.norm().clamp(min=1e-20))
            for name, value in exact["gradients"].items()
        }
        told[recipe] = {"logprobs": float(logprobs.square().mean().sqrt()), "gradients": gradients}
    print(json.dumps(told))
    groups.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
