"""Parameters counted from config.json alone, against the tensors of the model's table and the published counts."""

from __future__ import annotations

import json
import math

import pytest

from r1mega.models import cards, hf_fields
from r1mega.models.size import num_parameters
from r1mega.models.tables import slots_of

# DeepSeek-V3: without and with its multi-token-prediction layer; the others as the papers round them, in 1e9.
ROUNDED = {
    "r1_distill_qwen_1_5b": 1.777, "r1_distill_qwen_7b": 7.616, "r1_distill_qwen_14b": 14.770,
    "r1_distill_qwen_32b": 32.764, "r1_distill_llama_8b": 8.030, "r1_distill_llama_70b": 70.554, "qwen2_5_32b": 32.764,
}  # fmt: skip


def tensors_of(fields: hf_fields.HfFields) -> int:
    """Elements of all tensors of the table, those under a second name once."""
    return sum(math.prod(tensor.shape) for slot in slots_of(fields) if not slot.is_copy for tensor in slot.tensors)


@pytest.mark.parametrize("name", cards.names())
def test_cards_have_the_parameters_of_their_tables(name: str) -> None:
    fields = hf_fields.read(cards.folder(name), allow_fp8=True)
    assert num_parameters(fields) == tensors_of(fields)
    if name in ROUNDED:
        assert round(num_parameters(fields) / 1e9, 3) == ROUNDED[name]


def test_every_card_is_compared_with_a_published_count() -> None:
    assert set(ROUNDED) | {"deepseek_v3_671b"} == set(cards.names())
    whole = hf_fields.read(cards.folder("deepseek_v3_671b"), allow_fp8=True)
    without = hf_fields.read(cards.folder("deepseek_v3_671b"), allow_fp8=True, drop_mtp=True)
    assert num_parameters(without) == 671_026_419_200
    assert num_parameters(whole) - num_parameters(without) == 11_610_068_224


def test_the_base_of_the_smallest_student_has_tied_tables() -> None:
    raw = json.loads((cards.folder("r1_distill_qwen_1_5b") / "config.json").read_text())
    base = hf_fields.parse(raw | {"tie_word_embeddings": True, "max_position_embeddings": 4096, "use_mrope": False})
    assert num_parameters(base) == tensors_of(base) == 1_543_714_304


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2", "llama"])
def test_small_models_too(checkpoint, family: str) -> None:
    fields = hf_fields.read(checkpoint(family))
    assert num_parameters(fields) == tensors_of(fields)
