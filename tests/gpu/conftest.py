"""Everything in this folder needs a GPU and says so where there is none."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from benchmarks.fp8_training import lines

REPO = Path(__file__).resolve().parents[2]
# Widths that FP8 products divide, and enough of them that a loss means something.
WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "q_lora_rank": 64, "kv_lora_rank": 48,
    "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32, "initializer_range": 0.02,
}  # fmt: skip


def pytest_collection_modifyitems(items):
    import torch

    here = Path(__file__).parent
    for item in items:
        if here in Path(item.path).parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason=f"no CUDA device: torch {torch.__version__} sees none"))


@pytest.fixture(scope="session")
def sft_losses(checkpoint, tmp_path_factory) -> Callable[..., list[float]]:
    """`sft_losses(*overrides, updates=50, task="digits")` -> losses of supervised updates of a wide deepseek_v3 on
    lines of benchmarks/fp8_training.py; each set of overrides is run once."""
    made: dict[tuple, list[float]] = {}

    def run(*overrides: str, updates: int = 50, task: str = "digits") -> list[float]:
        key = (*overrides, updates, task)
        if key not in made:
            folder = tmp_path_factory.mktemp("sft")
            responses = list(islice(lines(task, random.Random(0)), 800 if task == "markov" else 400))
            made[key] = _sft(checkpoint("deepseek_v3", **WIDE), folder, updates, responses, overrides)
        return made[key]

    return run


def _sft(checkpoint: Path, folder: Path, updates: int, responses: list[str], overrides: tuple[str, ...]) -> list[float]:
    data = folder / "train.jsonl"
    rows = [{"prompt": "go on:", "response": response} for response in responses]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_dir = folder / "run"
    argv = [
        sys.executable, "-m", "r1mega.cli", "train", "stage=sft", "data=sft", "device=cuda", f"model.hf={checkpoint}",
        f"data.train={data}", f"run.dir={run_dir}", f"sft.updates={updates}", "sft.batch_size=16", "sft.max_length=256",
        "data.template=plain", "optim.lr=1e-3", "export.hf=false", *overrides,
    ]  # fmt: skip
    result = subprocess.run(argv, capture_output=True, text=True, timeout=280, cwd=REPO)
    assert result.returncode == 0, result.stderr
    return [json.loads(line)["train/loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
