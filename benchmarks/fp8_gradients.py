"""How far log-probs and gradients in each arithmetic lie from fp32's.

    python -m benchmarks.fp8_gradients HF cpu|cuda RECIPE...

Prints one JSON line: of each recipe the root mean square difference of the log-probs, and of each parameter the norm of
its gradient's difference over the norm. Recipes are those of `benchmarks.fp8_training`, faults among them, and
`fp8_in_fp32`, the emulation in a model whose other numbers are fp32.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.fp8_training import EMULATED, FAULTS, OPTIONS, fault, one_process
from parity.case import Case, random_case
from r1mega.parallel.groups import Groups

RECIPES = OPTIONS | {name: EMULATED for name in FAULTS} | {"fp8_in_fp32": EMULATED | {"params_dtype": "float32"}}


def answer(hf: Path, world: Groups, case: Case, options: dict[str, Any]) -> dict:
    """Log-probs and gradients."""
    from parity import ranks

    policy = ranks.build(hf, world, case, **options)
    found = ranks.answer(policy, hf, case, chunk_tokens=1024)
    policy.close()
    return found


def main(hf: str, device: str, *recipes: str) -> None:
    with one_process(device) as world:
        import torch

        case = random_case(323, num_sequences=8, max_length=200)
        exact, told = answer(Path(hf), world, case, {}), {}
        for recipe in recipes:
            with fault(recipe) if recipe in FAULTS else nullcontext():
                found = answer(Path(hf), world, case, RECIPES[recipe])
            logprobs = torch.cat(found["logprobs"]) - torch.cat(exact["logprobs"])
            gradients = {
                name: float((found["gradients"][name].float() - value).norm() / value.norm().clamp(min=1e-20))
                for name, value in exact["gradients"].items()
            }
            told[recipe] = {"logprobs": float(logprobs.square().mean().sqrt()), "gradients": gradients}
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
