"""Sequences in one pack do not see each other, and of a conversation its answers are learned alone.

Kind of claim: fp32, sums in another order: 1e-5 of the loss and of the norm of each tensor's gradient, between packed
and single and against transformers (typical: 5e-7). The negative control is the same packs laid as one sequence each.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-5


def worst(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference of a tensor over its norm; of tensors that get next to no gradient, over the median's."""
    assert ours.keys() == theirs.keys()
    norms = {name: float(value.norm()) for name, value in theirs.items()}
    typical = sorted(norms.values())[len(norms) // 2]
    return max((float((ours[name] - theirs[name]).norm()) / max(norms[name], 1e-3 * typical), name) for name in theirs)


@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_packed_is_single(world, checkpoint, family):
    hf = checkpoint(family)
    found = torch.load(world("isolation", hf, "1", "--chunk-tokens", 128), weights_only=False)
    assert max(len(chunk) for chunk in found["chunks"]) >= 4, "packs of several"
    (loss, gradients), (single_loss, single), (mixed_loss, mixed) = (found[k] for k in ("packed", "alone", "mixed"))
    assert loss == pytest.approx(single_loss, rel=TOLERANCE)
    assert worst(gradients, single) < (TOLERANCE,)
    # negative control
    assert abs(mixed_loss - single_loss) > 100 * TOLERANCE * single_loss
    assert worst(mixed, single) > (100 * TOLERANCE,)
    if family == "llama":
        expected_loss, expected = by_transformers(hf, found["items"])
        assert loss == pytest.approx(expected_loss, rel=TOLERANCE)
        assert worst(gradients, expected) < (TOLERANCE,)
        # negative control: the loss on as many tokens at the end, without the hole
        at_the_end, _ = by_transformers(hf, found["items"], without_holes=True)
        assert abs(at_the_end - loss) > 100 * TOLERANCE * loss


def by_transformers(hf, items, *, without_holes: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients with labels at the places of each answer, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    model.get_input_embeddings().padding_idx = None  # whose row it would give no gradient, though it is a token here
    total, count = 0.0, sum(item.num_response for item in items)
    for item in items:
        ids = torch.tensor([item.tokens])
        labels = torch.full_like(ids, -100)
        size = len(item.tokens)
        for begin, end in ((size - item.num_response, size),) if without_holes else item.spans:
            labels[0, begin:end] = ids[0, begin:end]
        logits = model(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum") / count
        loss.backward()
        total += float(loss.detach())
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}
