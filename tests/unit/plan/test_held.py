"""What ranks hold of DeepSeek-V3 is what Megatron builds for them, and adds up to the published model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega.models import cards, hf_fields
from r1mega.models.hf_fields import parse
from r1mega.parallel.layout import Layout
from r1mega.plan.held import Table, smallest_world

SCRIPT = Path(__file__).with_name("held_671b.py")
ELEMENTS, GATE_BIASES = 671_026_419_200, 14_848
MTP_ELEMENTS, MTP_GATE_BIASES = 11_610_068_224, 256
FOURS = "stages=" + "+".join(["4"] * 15 + ["1"])
QWEN2 = {
    "model_type": "qwen2", "vocab_size": 251, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
}  # fmt: skip


def asked(layout: str, *options: str) -> dict:
    argv = [sys.executable, str(SCRIPT), layout, *options]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("layout", "ranks", "has_mtp"),
    [
        pytest.param("tp=8,pp=4,ep=32,dp=4,stages=16+15+15+15", 128, True, marks=pytest.mark.extended),
        pytest.param(f"tp=8,pp=16,ep=8,dp=2,{FOURS}", 256, True, marks=pytest.mark.extended),
        pytest.param(f"tp=8,pp=16,ep=8,dp=2,{FOURS}", 256, False, marks=pytest.mark.extended),
        pytest.param(f"pp=16,ep=32,dp=32,{FOURS}", 512, False, marks=pytest.mark.extended),
        pytest.param(f"pp=16,ep=32,dp=32,{FOURS}", 512, True, marks=pytest.mark.extended),
        pytest.param(f"pp=16,ep=64,dp=128,{FOURS}", 2048, False, marks=pytest.mark.extended),
        pytest.param(f"pp=16,ep=64,dp=128,{FOURS}", 2048, True, marks=pytest.mark.extended),
    ],
)
def test_every_coordinate_is_megatrons_and_all_add_up(layout, ranks, has_mtp):
    found = asked(layout, *(["--mtp"] if has_mtp else []))
    assert found["ranks"] == ranks and found["wrong"] == [] and found["table_agrees"]
    assert found["elements"] == ELEMENTS + has_mtp * MTP_ELEMENTS
    assert found["gate_biases"] == GATE_BIASES + has_mtp * MTP_GATE_BIASES
    assert found["seconds"] < 60 and found["peak_bytes"] < 2e9


def test_one_stage_is_megatrons_in_every_run_of_the_tests():
    """The last stage of V3's own 16 x 64 cut over 2,048 ranks: a layer of experts, the head, and the layer that
    predicts further. The extended tests ask for all stages."""
    found = asked(f"pp=16,ep=64,dp=128,{FOURS}", "--mtp", "--stage=15")
    assert found["stages"] == [15] and found["wrong"] == [] and found["table_agrees"]
    assert found["gate_biases"] == 256 + MTP_GATE_BIASES
    assert found["peak_bytes"] < 2e9


@pytest.mark.parametrize("layout", ["1", "tp=8,pp=4,ep=32,dp=16,stages=16+15+15+15", "tp=2,pp=61,ep=4,etp=4,dp=8"])
def test_the_table_adds_up_at_any_layout(layout):
    fields = hf_fields.read(cards.folder("deepseek_v3_671b"), allow_fp8=True, drop_mtp=True)
    held = Table(fields).held(Layout.parse(layout), freezes_mtp=False)
    assert sum(part.distinct for part in held) == ELEMENTS
    assert sum(part.gate_biases for part in held) == GATE_BIASES


def test_a_vocabulary_that_tp_does_not_divide_is_rounded_up_and_a_tied_table_stands_twice():
    (whole,) = Table(parse({**QWEN2, "tie_word_embeddings": True})).held(Layout(), freezes_mtp=False)
    layer = 64 * 64 * 2 + 2 * 64 * 32 + 64 + 2 * 32 + 3 * 64 * 96 + 2 * 64  # q, o, k, v, biases, mlp, norms
    assert whole.dense == 251 * 64 + 4 * layer + 64
    first, last = Table(parse({**QWEN2, "tie_word_embeddings": True})).held(Layout(tp=2, pp=2), freezes_mtp=False)
    assert first.dense == 126 * 64 + 2 * (layer - 2 * 64) // 2 + 2 * 2 * 64
    assert last.dense == first.dense + 64  # the table again, and the final norm
    assert first.distinct + last.distinct == whole.distinct


def test_a_reward_model_has_a_row_for_its_table():
    fields = parse({**QWEN2, "tie_word_embeddings": False})
    (whole,), (scoring,) = (Table(own).held(Layout(), freezes_mtp=False) for own in (fields, fields.as_reward_model()))
    assert whole.dense - scoring.dense == 251 * 64 - 64


def test_the_smallest_world_keeps_every_cut():
    layout = Layout(tp=8, pp=16, ep=64, etp=2, dp=64)
    small = smallest_world(layout)
    assert (small.tp, small.pp, small.ep, small.etp, small.dp) == (8, 16, 64, 2, 16)
    assert small.problems() == []
