"""A converted checkpoint trains at layouts that cut it every way, and what the run saved converts back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from r1mega.conversion.run import Request, convert

REPO = Path(__file__).resolve().parents[2]


def run(*argv: object) -> None:
    result = subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True, timeout=200, cwd=REPO)
    assert result.returncode == 0, result.stderr[-2000:]


def converted(command: str, source: Path, out: Path, dtype: str | None = None) -> Path:
    kind, _, to = command.partition("-to-")
    convert(Request(source=source, source_kind=kind, out=out, to=to, dtype=dtype))
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


def train(start: Path, run_dir: Path, *overrides: str) -> Path:
    """One update of SFT from a checkpoint of either format, saved and exported."""
    rows = [{"prompt": f"{a} plus {b}?", "response": f"It is {a + b}."} for a in range(4) for b in range(8)]
    data = run_dir.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(
        "-m", "r1mega.cli", "train", "stage=sft", "data=sft", "optim=constant", f"model.hf={start}",
        f"data.train={data}", f"run.dir={run_dir}", "sft.updates=1", "sft.batch_size=8", "sft.max_length=256",
        "data.template=plain", "model.mtp=train", "checkpoint.every=1", "logger.console=false",
        "logger.tensorboard=false", "precision=fp32", *overrides,
    )  # fmt: skip
    return run_dir


def test_an_interleaved_pipeline_with_a_tied_and_padded_table(checkpoint, tmp_path, in_process):
    source = checkpoint("qwen2", dtype="bfloat16", tie_word_embeddings=True)
    start = converted("hf-to-megatron", source, tmp_path / "megatron")
    # The vocabulary is odd: two tensor ranks pad it.
    layout = ("parallel.tp=2", "parallel.pp=2", "parallel.vpp=2")
    done = train(start, tmp_path / "run", *layout, "optim.lr=1e-2")
    exported, before = weights_of(done / "hf"), weights_of(source)
    assert all(not torch.equal(exported[name], before[name]) for name in before if name.endswith("o_proj.weight"))
    saved = done / "checkpoints" / "update-000001"
    assert_same(weights_of(converted("megatron-to-hf", saved, tmp_path / "hf", "bf16")), exported)


def test_fp8_experts_and_the_layer_two_tokens_ahead(checkpoint, tmp_path, in_process):
    fp8 = converted("hf-to-hf", checkpoint("deepseek_v3", dtype="bfloat16", mtp=True), tmp_path / "fp8", "fp8")
    expected = weights_of(converted("hf-to-hf", fp8, tmp_path / "bf16", "bf16"))
    start = converted("hf-to-megatron", fp8, tmp_path / "megatron")
    # A step too small for any number, zero too: what was loaded at this layout is what is exported and saved.
    done = train(start, tmp_path / "run", "parallel=tp2_pp2_ep2", "optim.lr=1e-46")
    assert_same(weights_of(done / "hf"), expected)
    saved = done / "checkpoints" / "update-000001"
    assert_same(weights_of(converted("megatron-to-hf", saved, tmp_path / "hf", "bf16")), expected)
