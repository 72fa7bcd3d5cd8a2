"""tools/verify_checkpoint.py: what is the same, what differs and where, whatever the formats."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1mega.conversion.run import Request, convert
from r1mega.conversion.verify import verify

TOOL = Path(__file__).resolve().parents[3] / "tools" / "verify_checkpoint.py"
WEIGHT = "model.layers.1.mlp.experts.3.down_proj.weight"


@pytest.fixture
def forms(checkpoint, tmp_path, in_process) -> dict[str, tuple[str, Path]]:
    """One model as BF16, as a Megatron checkpoint, and as FP8 blocks made of either."""
    bf16 = checkpoint("deepseek_v3", dtype="bfloat16", mtp=True)
    convert(Request(bf16, "hf", tmp_path / "megatron", "megatron"))
    convert(Request(bf16, "hf", tmp_path / "fp8", "hf", "fp8"))
    convert(Request(tmp_path / "fp8", "hf", tmp_path / "fp8-megatron", "megatron"))
    found = {name: ("megatron" if "megatron" in name else "hf", tmp_path / name) for name in ("megatron", "fp8")}
    return found | {"bf16": ("hf", bf16), "fp8-megatron": ("megatron", tmp_path / "fp8-megatron")}


def changed(source: Path, out: Path, name: str, change) -> Path:
    """A copy of a checkpoint with one tensor changed."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file({key: value for key, value in tensors.items() if value is not None}, out / "model.safetensors")
    return out


@pytest.mark.parametrize(
    ("left", "right", "rounded"),
    [("bf16", "megatron", False), ("fp8", "fp8-megatron", False), ("bf16", "fp8", True), ("megatron", "fp8", True)],
)
def test_forms_of_one_model_are_the_same(forms, left, right, rounded):
    verdict = verify(forms[left], forms[right])
    assert verdict.differences == []
    assert verdict.tensors == 171
    assert (verdict.rounded > 0) == rounded


def test_one_changed_value_is_found_by_name_and_place(forms, tmp_path):
    def change(tensor):
        tensor = tensor.clone()
        tensor[5, 7] += 0.5
        return tensor

    other = changed(forms["bf16"][1], tmp_path / "other", WEIGHT, change)
    for left in ("bf16", "megatron"):
        (difference,) = verify(forms[left], ("hf", other)).differences
        assert (difference.name, difference.position) == (WEIGHT, (5, 7))
        assert difference.largest == pytest.approx(0.5, rel=0.02)
        assert "1 of" in str(difference)


def test_fp8_values_next_to_the_right_ones_are_not_excused_as_rounding(forms, tmp_path):
    def change(tensor):
        bits = tensor.view(torch.uint8).clone()
        bits[0, 0] ^= 1  # the neighbouring FP8 value
        return bits.view(torch.float8_e4m3fn)

    other = changed(forms["fp8"][1], tmp_path / "other", WEIGHT, change)
    (difference,) = verify(forms["bf16"], ("hf", other)).differences
    assert difference.name == WEIGHT


def test_a_number_that_fp8_cannot_hold_is_a_difference(forms, tmp_path):
    def change(tensor):
        tensor = tensor.clone()
        tensor[5, 7] = torch.nan
        return tensor

    other = changed(forms["bf16"][1], tmp_path / "other", WEIGHT, change)
    (difference,) = verify(forms["fp8"], ("hf", other)).differences
    assert difference.name == WEIGHT and difference.largest == torch.inf


def test_a_tensor_that_one_side_lacks(checkpoint, in_process):
    with_bias, without = checkpoint("qwen2", dtype="bfloat16"), checkpoint("llama", dtype="bfloat16")
    found = verify(("hf", with_bias), ("hf", without)).differences
    missing = [difference for difference in found if difference.is_missing]
    assert [difference.name for difference in missing] == [f"model.layers.{i}.self_attn.q_proj.bias" for i in range(4)]
    assert str(without) in str(missing[0])


def test_command_line_with_a_forward_pass_of_both(forms, tmp_path):
    argv = [sys.executable, str(TOOL), str(forms["bf16"][1]), str(forms["megatron"][1]), "--workers", "1"]
    out = tmp_path / "verdict.json"
    result = subprocess.run([*argv, "--logits", "--json", out], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    verdict = json.loads(out.read_text())
    assert verdict["same"] and verdict["max_logprob_diff"] < 1e-4


def test_command_line_on_what_is_no_checkpoint(tmp_path):
    argv = [sys.executable, str(TOOL), str(tmp_path), str(tmp_path / "absent")]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and str(tmp_path) in result.stderr
