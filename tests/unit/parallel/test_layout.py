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


SIZES = st.sampled_from([1, 2, 4])


@given(SIZES, SIZES, st.sampled_from([1, 2, 3]), SIZES, st.data())
def test_every_rank_has_its_own_place(tp, cp, pp, dp, data):
    etp = data.draw(st.sampled_from([n for n in (1, 2, 4) if (tp * cp * dp) % n == 0]))
    ep = data.draw(st.sampled_from([n for n in (1, 2, 4) if (tp * cp * dp) % (etp * n) == 0]))
    layout = Layout(tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, dp=dp)
    assert layout.problems() == []
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert len({(at.tp, at.cp, at.dp, at.pp) for at in places}) == layout.world_size
    assert len({(at.etp, at.ep, at.expert_dp, at.pp) for at in places}) == layout.world_size
    assert max(at.expert_dp for at in places) + 1 == layout.expert_dp


def test_context_ranks_lie_between_tensor_and_data_ranks():
    # tp2 x cp2 x dp2 on one stage: rank = tp + 2 * (cp + 2 * dp); experts re-cut all eight as ep4 x expert dp2.
    layout = Layout(tp=2, cp=2, dp=2, ep=4)
    at = layout.coordinate(6)
    assert (at.tp, at.cp, at.dp) == (0, 1, 1)
    assert (at.ep, at.expert_dp) == (2, 1)


def test_layers_go_to_chunks_in_order():
    even = Layout(pp=2, vpp=2)
    assert even.chunk_layers(8) == (2, 2, 2, 2)
    assert [even.layer_place(layer, 8) for layer in (0, 3, 7)] == [(0, 0), (1, 1), (3, 1)]
    uneven = Layout(pp=2, vpp=2, stages=(2, 3, 3, 0))
    assert [uneven.layer_place(layer, 8) for layer in (1, 2, 7)] == [(0, 1), (1, 0), (2, 2)]
    with pytest.raises(ValueError, match="must be below 8"):
        uneven.layer_place(8, 8)


@pytest.mark.parametrize("text", ["tp=2,pp=2,ep=2", "1", "dp=4", "cp=2,pp=2,vpp=2,stages=1+2+1+0"])
def test_parse_and_print(text):
    assert str(Layout.parse(text)) == text


@pytest.mark.parametrize("text", ["tp", "tp=0", "xp=2", "tp=x", "tp=-1", "pp=2,stages=1+x"])
def test_parse_refuses(text):
    with pytest.raises(ValueError, match="AXIS=N"):
        Layout.parse(text)


@pytest.mark.parametrize(
    ("layout", "shape", "words"),
    [
        (Layout(tp=3), V3, "parallel.tp: got 3; must divide the model's num_attention_heads = 128"),
        (Layout(pp=16), V3, "set parallel.stages=[4,4,4,4,4,4,4,4,4,4,4,4,4,3,3,3]"),
        (Layout(vpp=2), V3, "interleaving needs pipeline stages"),
        (Layout(pp=2, stages=(30, 30)), V3, "must add up to the model's num_hidden_layers = 61"),
        (Layout(pp=3, stages=(30, 31)), V3, "got 2 numbers; must be pp x vpp = 3"),
        (Layout(pp=3, stages=(30, 0, 31)), V3, "only the first chunk"),
        (Layout(ep=3, dp=3), V3, "n_routed_experts = 256"),
        (Layout(ep=4, dp=2), V3, "ep x etp must divide tp x cp x dp = 2"),
        (Layout(tp=4), DENSE, "num_key_value_heads = 2"),
        (Layout(ep=2, dp=2), DENSE, "this model has no experts"),
        (Layout(tp=0), DENSE, "must be at least 1"),
    ],
)
def test_impossible_layouts(layout, shape, words):
    assert any(words in problem for problem in layout.problems(shape))


def test_all_problems_at_once():
    assert len(Layout(tp=3, pp=2, ep=5).problems(V3)) >= 3
