from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping
from xml.etree.ElementTree import Element

import pytest

from r1mega.pipeline.page.chart import Line, chart, smoothed, value_range
from r1mega.pipeline.page.layout import ancestors, crossings, layout, spread
from r1mega.pipeline.page.samples import split
from r1mega.pipeline.page.text import Unit, direction, label, listed, shortened, unit_of, written

DIAMOND = (("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("a", "d"))


def test_layers_go_by_the_longest_path() -> None:
    placed = layout("abcde", (*DIAMOND, ("e", "d")))
    assert {box: layer for box, (layer, _) in placed.place.items()} == {"a": 0, "b": 1, "c": 1, "d": 2, "e": 1}
    assert placed.num_layers == 3
    assert [layer for layer, _ in placed.paths[4]] == [0, 1, 2]  # a to d passes the layer of b and c


@pytest.mark.parametrize("seed", range(8))
def test_boxes_do_not_touch_and_lines_go_right(seed: int) -> None:
    rng = random.Random(seed)
    boxes = [f"n{number}" for number in range(24)]
    edges = sorted({(boxes[i], boxes[j]) for i, j in (sorted(rng.sample(range(24), 2)) for _ in range(40))})
    placed = layout(boxes, edges)
    by_layer: dict[int, list[float]] = {}
    for layer, height in placed.place.values():
        by_layer.setdefault(layer, []).append(height)
    for heights in by_layer.values():
        assert all(b - a > 1 - 1e-9 for a, b in itertools.pairwise(sorted(heights)))
        assert min(heights) >= 0 and max(heights) <= placed.num_rows - 1 + 1e-9
    for (source, target), path in zip(edges, placed.paths, strict=True):
        assert [path[0], path[-1]] == [placed.place[source], placed.place[target]]
        assert all(right == left + 1 for (left, _), (right, _) in itertools.pairwise(path))
        inside = {layer: height for layer, height in path[1:-1]}
        for layer, height in placed.place.values():  # a line runs beside the boxes that it passes, not through them
            assert layer not in inside or abs(inside[layer] - height) > 0.7
    assert layout(boxes, edges) == placed


def test_crossings_are_counted_and_undone() -> None:
    crossed = {"a": ["y"], "b": ["x"]}
    assert crossings([["a", "b"], ["x", "y"]], crossed) == 1
    assert crossings([["a", "b"], ["y", "x"]], crossed) == 0
    everything = {"a": ["x", "y", "z"], "b": ["x", "y", "z"]}
    assert crossings([["a", "b"], ["x", "y", "z"]], everything) == 3
    placed = layout(["a", "b", "c", "z", "y", "x"], [("a", "x"), ("b", "y"), ("c", "z")])
    assert all(path[0][1] == path[1][1] for path in placed.paths)  # straight lines: none crosses


def test_ancestors_by_hand() -> None:
    assert ancestors("abcd", DIAMOND) == {"a": {"a"}, "b": set("ab"), "c": set("ac"), "d": set("abcd")}


def test_spread_is_the_nearest_that_leaves_room() -> None:
    assert spread([0, 5, 9], [1, 1]) == [0, 5, 9]
    assert spread([2, 2], [1]) == [1.5, 2.5]
    assert spread([3, 0, 0], [1, 1]) == [0, 1, 2]  # by hand: levels 3, -1, -2 pool to their mean 0
    assert spread([], []) == []
    wanted, gaps = [0.0, 0.3, 0.1, 4.0, 3.5], [1.0, 0.5, 1.0, 1.0]
    found = spread(wanted, gaps)

    def cost(heights: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(heights, wanted, strict=True))

    rng = random.Random(1)
    for _ in range(2000):  # nothing near it that keeps the gaps is better
        other = [height + rng.gauss(0, 0.2) for height in found]
        if all(b - a >= gap for a, b, gap in zip(other, other[1:], gaps, strict=False)):
            assert cost(other) >= cost(found)


@pytest.mark.parametrize(
    ("values", "from_zero", "ends"),
    [
        ([], True, (0, 1)),
        ([0.223, 0.884], True, (0, 1.0)),
        ([18.1, 33.2], True, (0, 40)),
        ([-0.3, 0.1], True, (-0.3, 0.1)),
        ([2.31, 2.39], False, (2.3, 2.4)),
        ([0.1, 2.4], False, (0, 2.5)),
        ([5, 5], False, (5, 6)),
        ([0.0, 0.0], True, (0, 0.2)),
        ([1e-6, 1e-6], False, (1e-6, 1.2e-6)),
    ],
)
def test_axes_end_at_round_numbers(values: list[float], from_zero: bool, ends: tuple[float, float]) -> None:
    assert value_range(values, from_zero=from_zero) == pytest.approx(ends)


def drawn(by_seed: Mapping[str, tuple[tuple[int, float | None], ...]]) -> Element:
    line = Line("accuracy", by_seed)
    return chart("Accuracy", [line], Unit(is_share=True), (0, max(line.updates())), (0.0, 1.0))


def paths(figure: Element, cls: str) -> list[str]:
    return [one.get("d", "") for one in figure.iter("path") if cls in (one.get("class") or "").split()]


def test_a_thin_line_for_each_seed_and_their_mean() -> None:
    figure = drawn({"0": ((0, 0.25), (10, 0.5)), "1": ((0, 0.75), (10, 1.0), (20, 0.5))})
    assert len(paths(figure, "seed")) == 2
    # By hand: from x 64 to 454 over 20 updates, from y 246 to 16 over a share of 1. At update 20 seed 0 has nothing.
    assert paths(figure, "mean") == ["M64.0 131.0L259.0 73.5"]
    assert paths(figure, "seed")[0] == "M64.0 188.5L259.0 131.0"
    assert "thin: each of 2 seeds" in "".join(figure.itertext())
    assert "75.0%" in list(figure.itertext())


def test_a_gap_is_no_line() -> None:
    figure = drawn({"": ((0, 0.5), (1, 0.5), (2, None), (3, 0.5), (4, 0.5))})
    assert [part[0] + "L" * part.count("L") for part in re.findall("M[^M]*", paths(figure, "mean")[0])] == ["ML", "ML"]
    assert paths(figure, "seed") == []


def test_very_long_histories_are_thinned_and_keep_their_end() -> None:
    points = tuple((update, update / 10400) for update in range(0, 10401))
    figure = drawn({"": points})
    raw = paths(figure, "seed")[0]
    assert raw.count("L") <= 1000 and raw.endswith("L454.0 16.0")
    assert sum(1 for _ in figure.iter("tr")) <= 202
    assert "One of 53 of the 10,401 updates" in "".join(figure.itertext())
    assert len(list(figure.iter("circle"))) == 0


def test_smoothing_keeps_a_straight_line() -> None:
    assert smoothed([(u, 2.0 * u) for u in range(100)])[50] == (50, 100.0)
    assert smoothed([(u, 1.0) for u in range(100)]) == [(u, 1.0) for u in range(100)]


@pytest.mark.parametrize(
    ("response", "parts"),
    [
        (" <think> a </think> <answer> b </answer>", ("<think> a </think>", "<answer> b </answer>")),
        ("a </think> b", ("a </think>", "b")),
        ("<think> a </think> b </think> c", ("<think> a </think> b </think>", "c")),
        ("<think> a", ("<think> a", "")),
        ("a", ("", "a")),
        ("", ("", "")),
    ],
)
def test_thinking_is_told_from_the_answer(response: str, parts: tuple[str, str]) -> None:
    assert split(response) == parts


def test_units() -> None:
    assert unit_of("eval/pass_at_1", [0.5]) == unit_of("well_formed", [0.2, None]) == Unit(is_share=True)
    assert unit_of("accuracy", [64.1]) == Unit(is_share=False, digits=1)
    assert unit_of("train/lr", [3e-6]) == Unit(is_share=False, digits=None)
    assert unit_of("kept", [9120.0]) == Unit(is_share=False, digits=0)
    assert unit_of("distilled beats RL", [0.6, 0.4], bounded_is_share=True).is_share
    assert not unit_of("kl_falls", [0.6, 0.4], bounded_is_share=True).is_share
    assert not unit_of("distilled beats RL", [0.6, 0.4]).is_share


@pytest.mark.parametrize(
    ("value", "unit", "signed", "text"),
    [
        (0.6412, Unit(True), False, "64.1%"),
        (-0.6412, Unit(True), True, "\u221264.1\u00a0pts"),
        (0.00001, Unit(True), True, "\u00b10.0\u00a0pts"),
        (-0.00001, Unit(True), False, "0.0%"),
        (1234.0, Unit(False, 0), False, "1,234"),
        (15.0, Unit(False, 1), True, "+15.0"),
        (3e-6, Unit(False, None), False, "3e-06"),
        (1e20, Unit(False, 0), False, "1e+20"),
    ],
)
def test_figures(value: float, unit: Unit, signed: bool, text: str) -> None:
    assert written(value, unit, signed=signed) == text


def test_names() -> None:
    assert label("eval/pass_at_1") == "held-out pass@1" and label("pass_at_8") == "pass@8"
    assert [direction(name) for name in ("accuracy", "cut_off", "mixed_language", "response_tokens")] == [1, -1, -1, 0]
    assert listed(["a", "b", "c"]) == "a, b and c" and listed([]) == ""
    assert shortened("abcdefghij", 7) == "abc…hij" and shortened("abcdefg", 7) == "abcdefg"
