"""A converted checkpoint trains at layouts that cut it every way, and what the run saved converts back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

REPO = Path(__file__).resolve().parents[2]


def run(*argv: object) -> None:
    result = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=200, cwd=REPO)
    assert result.returncode == 0, result.stderr[-2000:]


def convert(command: str, source: Path, out: Path, *options: str) -> Path:
    kind = command.partition("-to-")[0]
    run("tools/convert_checkpoint.py", command, f"--{kind}", source, "--out", out, "--workers", 1, *options)
    return out


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in path.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.endswith("e_score_correction_bias"):
            # Megatron keeps gate biases in fp32, as DeepSeek publishes them; these small checkpoints have them in bf16.
            assert torch.equal(ours[name].to(tensor.dtype), tensor), name
            continue
        assert tensor.dtype == ours[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), ours[name].view(torch.uint8)), name


def train(start: Path, run_dir: Path, layout: list[str]) -> Path:
    """One update of SFT from a checkpoint of either format, saved and exported."""
    rows = [{"prompt": f"{a} plus {b}?", "response": f"It is {a + b}."} for a in range(4) for b in range(8)]
    data = run_dir.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        "-m", "r1mega.cli", "train", "stage=sft", "data=sft", "optim=constant", *layout, f"model.hf={start}",
        f"data.train={data}", f"run.dir={run_dir}", "sft.updates=1", "sft.batch_size=8", "sft.max_length=256",
        "data.template=plain", "optim.lr=1e-2", "model.mtp=train", "checkpoint.every=1", "logger.console=false",
        "logger.tensorboard=false", "precision=fp32",
    )  # fmt: skip
    return run_dir


def assert_learnt(ours: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    assert all(not torch.equal(ours[name], before[name]) for name in before if name.endswith("o_proj.weight"))


def test_train_from_a_converted_checkpoint_and_back(checkpoint, tmp_path):
    source = checkpoint("qwen2", dtype="bfloat16", tie_word_embeddings=True)
    # An odd vocabulary, which tp = 2 pads; an interleaved pipeline whose ends share a table.
    layout = ["parallel.tp=2", "parallel.pp=2", "parallel.vpp=2"]
    done = train(convert("hf-to-megatron", source, tmp_path / "megatron"), tmp_path / "run", layout)
    exported = weights_of(done / "hf")
    assert_learnt(exported, weights_of(source))
    saved = done / "checkpoints" / "update-000001"
    assert_same(weights_of(convert("megatron-to-hf", saved, tmp_path / "hf", "--dtype", "bf16")), exported)


def test_a_run_begun_from_either_format_is_the_same_run(checkpoint, tmp_path):
    fp8 = convert("hf-to-hf", checkpoint("deepseek_v3", dtype="bfloat16", mtp=True), tmp_path / "fp8", "--dtype", "fp8")
    layout = ["parallel=tp2_pp2_ep2"]
    bf16 = convert("hf-to-hf", fp8, tmp_path / "bf16", "--dtype", "bf16")
    from_hf = train(bf16, tmp_path / "from-hf", layout)
    from_megatron = train(convert("hf-to-megatron", fp8, tmp_path / "megatron"), tmp_path / "from-megatron", layout)
    exported = weights_of(from_megatron / "hf")
    assert_same(exported, weights_of(from_hf / "hf"))
    assert_learnt(exported, weights_of(bf16))
    saved = from_megatron / "checkpoints" / "update-000001"
    assert_same(weights_of(convert("megatron-to-hf", saved, tmp_path / "hf", "--dtype", "bf16")), exported)
