"""Short trainings of a small DeepSeek-V3 in emulated FP8 and in recipes with a known fault, each beside bf16.

    python -m benchmarks.fp8_training --task digits markov --seeds 4 > FILE

For every task and seed all recipes train the same weights on the same batches. A JSON line a run: the loss of each
update, and that of held-out sequences after the last, in the run's own arithmetic and in fp32. What is not FP8 tells
how far two sound trainings lie apart: `repacked` is bf16 with the sequences in other micro-batches, so with other sums.
One process on the CPU; `--device cuda` runs the same, and with Transformer Engine the recipes `te_bf16` and `te_fp8`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from r1mega.config.choices import DeviceType
from r1mega.launch.local import worker_env
from r1mega.parallel import fork, groups
from r1mega.parallel.layout import Layout

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tools"))

# Widths that FP8 products divide.
WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "q_lora_rank": 64, "kv_lora_rank": 48,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "initializer_range": 0.02, "num_hidden_layers": 2,
}  # fmt: skip
BATCH, HELD_OUT = 16, 64
LEARNING_RATES = {"digits": 3e-4, "markov": 3e-4}
EMULATED = {"params_dtype": "bfloat16", "fp8": True, "emulate_fp8": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"params_dtype": "bfloat16"},
    "repacked": {"params_dtype": "bfloat16"},
    "fp32": {"params_dtype": "float32"},
    "fp8": EMULATED,
    "fp8_repacked": EMULATED,
    "te_bf16": {"params_dtype": "bfloat16", "layer_spec": "te"},
    "te_fp8": {"params_dtype": "bfloat16", "layer_spec": "te", "fp8": True},
}
# FP8 with a fault, by what it does to `models.fp8_linear`.
FAULTS = ("per_tensor", "e5m2", "e5m2_of_weights", "unscaled", "stale_weights", "bf16_sums")
RECIPES = (*OPTIONS, *FAULTS)


def lines(task: str, rng: random.Random) -> Iterator[str]:
    """Endless lines to learn.

    digits: six times the same four, which a model finds out all at once, and when is chance. markov: letters that each
    choose the next by a table of their own, learned little by little, so that losses hardly scatter.
    """
    letters = "abcdefghijklmnop"
    tables = {letter: [rng.expovariate(1.0) ** 2 for _ in letters] for letter in letters} if task == "markov" else {}
    while True:
        if task == "digits":
            yield "".join(rng.choices("0123", k=4)) * 6
            continue
        line = rng.choice(letters)
        while len(line) < 32:
            line += rng.choices(letters, tables[line[-1]])[0]
        yield line


def batches(task: str, seed: int, updates: int) -> list[list[tuple[list[int], int]]]:
    """Of each update its sequences, as (tokens, how many of them at the end are learned); the last are held out."""
    drawn = lines(task, random.Random(f"{task} {seed}"))

    def sequences(count: int) -> list[tuple[list[int], int]]:
        return [(list(b"go on:" + line.encode()), len(line)) for line in islice(drawn, count)]

    return [sequences(BATCH) for _ in range(updates)] + [sequences(HELD_OUT)]


@contextmanager
def one_process(device: str) -> Iterator[groups.Groups]:
    """The world of this process alone."""
    os.environ |= worker_env(DeviceType(device), 1) | fork.numbers(0, 1)
    yield groups.initialize(Layout(), device, seed=0, timeout_minutes=5, threads=1)
    groups.shutdown()


@contextmanager
def fault(name: str) -> Iterator[None]:
    """Emulated FP8 with this fault inside the block."""
    import torch

    from r1mega.models import fp8_linear

    own: dict[str, Any] = {key: getattr(fp8_linear, key) for key in ("in_blocks", "block_scale", "multiply", "FORMAT")}
    in_blocks, kept = fp8_linear.in_blocks, {}

    def whole(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        return in_blocks(matrix, max(1, matrix.shape[0]), matrix.shape[1])

    def stale(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        if rows != columns:
            return in_blocks(matrix, rows, columns)
        return kept.setdefault((matrix.data_ptr(), matrix.shape), in_blocks(matrix, rows, columns))

    def other_for_weights(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        # Blocks of tokens are of the gradient of a weight alone.
        fp8_linear.FORMAT = torch.float8_e5m2 if columns == 1 else torch.float8_e4m3fn
        return in_blocks(matrix, rows, columns)

    def in_bf16(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        total = left.new_zeros(left.shape[0], right.shape[1])
        for at in range(0, left.shape[1], 32):
            total = (total + left[:, at : at + 32] @ right[at : at + 32]).bfloat16().float()
        return total

    changes: dict[str, dict[str, Any]] = {
        "per_tensor": {"in_blocks": whole},
        "e5m2": {"FORMAT": torch.float8_e5m2},
        "e5m2_of_weights": {"in_blocks": other_for_weights},
        "unscaled": {"block_scale": lambda largest, _dtype: torch.ones_like(largest)},
        "stale_weights": {"in_blocks": stale},
        "bf16_sums": {"multiply": in_bf16},
    }
    try:
        for key, value in changes[name].items():
            setattr(fp8_linear, key, value)
        yield
    finally:
        for key, value in own.items():
            setattr(fp8_linear, key, value)


def train(checkpoint: Path, world: groups.Groups, recipe: str, data: list, lr: float) -> dict[str, Any]:
    """Losses of the updates and of the held-out sequences."""
    import torch

    from r1mega.models import hf_fields
    from r1mega.models.hf_config import ModelOptions
    from r1mega.models.hf_io import CheckpointReader
    from r1mega.train.batch import PackItem
    from r1mega.train.optimizer import AdamSettings
    from r1mega.train.policy import MegatronPolicy

    def policy(options: dict[str, Any], adam: AdamSettings | None) -> MegatronPolicy:
        options = options | {"params_dtype": getattr(torch, options["params_dtype"])}
        return MegatronPolicy(hf_fields.read(checkpoint), world, ModelOptions(**options), adam)

    def evaluated(asked: MegatronPolicy) -> float:
        items = [PackItem(tokens, learned) for tokens, learned in data[-1]]
        return -float(torch.cat(asked.logprobs(items, asked.plan(items, 4096))).mean())

    own, losses = policy(OPTIONS.get(recipe, EMULATED), AdamSettings(lr=lr, weight_decay=0.0)), []
    own.load(CheckpointReader(checkpoint))
    for batch in data[:-1]:
        items = [PackItem(tokens, learned) for tokens, learned in batch]
        count = sum(learned for _, learned in batch)

        def loss(logprobs_R: torch.Tensor, _entropy_R: torch.Tensor, _micro: Any, count: int = count):
            value = -logprobs_R.sum() / count
            return value, {"loss": value.detach()}

        plan = own.plan(items, 128 if "repacked" in recipe else 1024)
        losses.append(own.forward_backward(items, plan, loss)["loss"])
        own.optimizer_step(lr)
    held_out = evaluated(own)
    exact = policy(OPTIONS["fp32"], None)
    exact.load(_Held(dict(own.export_hf())))
    found = {"losses": losses, "held_out": held_out, "held_out_fp32": evaluated(exact)}
    own.close()
    return found


class _Held:
    """A source of the tensors that a policy gave out."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = {name: tensor.detach().float().clone() for name, tensor in tensors.items()}

    def holds(self, name: str) -> bool:
        """Whether the tensor is there."""
        return name in self._tensors

    def get(self, tensor: Any) -> Any:
        """The tensor."""
        return self._tensors[tensor.name]


def measure(tasks: list[str], seeds: list[int], recipes: list[str], updates: int, device: str) -> Iterator[dict]:
    """A record of each run."""
    from parity.tiny_checkpoints import write_checkpoint

    with one_process(device) as world, tempfile.TemporaryDirectory(prefix="fp8_training-") as work:
        for seed in seeds:
            checkpoint = Path(work) / str(seed)
            write_checkpoint(checkpoint, "deepseek_v3", seed=seed, **WIDE)
            for task in tasks:
                data = batches(task, seed, updates)
                for recipe in recipes:
                    with fault(recipe) if recipe in FAULTS else nullcontext():
                        found = train(checkpoint, world, recipe, data, LEARNING_RATES[task])
                    yield {"task": task, "seed": seed, "recipe": recipe} | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=LEARNING_RATES, default=list(LEARNING_RATES))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=[r for r in RECIPES if "te_" not in r])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    for record in measure(args.task, list(range(args.seeds)), args.recipes, args.updates, args.device):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
