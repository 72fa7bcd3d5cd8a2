"""Rank coordinates by hand and by invariants; every impossible layout says why."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1mega.parallel.layout import Layout, ShapeNumbers

V3 = ShapeNumbers(
    num_layers=61, num_heads=128, num_kv_heads=128, ffn_hidden_size=18432, num_experts=256, moe_ffn_hidden_size=2048,
    shared_ffn_hidden_size=2048,
)  # fmt: skip
DENSE = ShapeNumbers(num_layers=28, num_heads=12, num_kv_heads=2, ffn_hidden_size=8960)


def test_coordinates_by_hand():
    # Two stages of four ranks (tp2 x dp2); experts re-cut the four as ep2 x expert dp2 with etp1.
    layout = Layout(tp=2, pp=2, ep=2, dp=2)
    assert layout.world_size == 8
    at = layout.coordinate(6)
    assert (at.pp, at.dp, at.tp) == (1, 1, 0)
    assert (at.expert_dp, at.ep, at.etp) == (1, 0, 0)


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.data())
def test_every_rank_has_its_own_place(tp, pp, dp, data):
    etp = data.draw(st.sampled_from([n for n in (1, 2, 4) if (tp * dp) % n == 0]))
    ep = data.draw(st.sampled_from([n for n in (1, 2, 4) if (tp * dp) % (etp * n) == 0]))
    layout = Layout(tp=tp, pp=pp, ep=ep, etp=etp, dp=dp)
    assert layout.problems() == []
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert len({(at.tp, at.dp, at.pp) for at in places}) == layout.world_size
    assert len({(at.etp, at.ep, at.expert_dp, at.pp) for at in places}) == layout.world_size
    assert max(at.expert_dp for at in places) + 1 == layout.expert_dp


@pytest.mark.parametrize("text", ["tp=2,pp=2,ep=2", "1", "dp=4"])
def test_parse_and_print(text):
    assert str(Layout.parse(text)) == text


@pytest.mark.parametrize("text", ["tp", "tp=0", "cp=2", "tp=x", "tp=-1"])
def test_parse_refuses(text):
    with pytest.raises(ValueError, match="AXIS=N"):
        Layout.parse(text)


@pytest.mark.parametrize(
    ("layout", "shape", "words"),
    [
        (Layout(tp=3), V3, "parallel.tp: got 3; must divide the model's num_attention_heads = 128"),
        (Layout(pp=16), V3, "num_hidden_layers = 61"),
        (Layout(ep=3, dp=3), V3, "n_routed_experts = 256"),
        (Layout(ep=4, dp=2), V3, "ep x etp must divide tp x dp = 2"),
        (Layout(tp=4), DENSE, "num_key_value_heads = 2"),
        (Layout(ep=2, dp=2), DENSE, "this model has no experts"),
        (Layout(tp=0), DENSE, "must be at least 1"),
    ],
)
def test_impossible_layouts(layout, shape, words):
    assert any(words in problem for problem in layout.problems(shape))


def test_all_problems_at_once():
    assert len(Layout(tp=3, pp=2, ep=5).problems(V3)) >= 3
