"""Where the boxes of a directed acyclic graph stand: layers from left to right, few crossings, short lines.

The steps of Sugiyama, Tagawa and Toda (IEEE Trans. SMC 11(2), 1981): layers by longest path, barycentre sweeps for the
order in a layer, then heights. Every step is deterministic: the same graph is drawn the same, to the byte.
"""

from __future__ import annotations

import graphlib
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SWEEPS = 12
_BEND_ROOM = 0.45  # rows: what a line needs that passes a layer without a box there
Node = str | tuple[str, int]  # a box, or where the lines from this box pass this layer: one trunk for all of them
Edge = tuple[str, str]


@dataclass(frozen=True)
class Layout:
    """`place`: box -> (layer, height in rows); `paths`: for each edge its (layer, height) from source to target."""

    place: Mapping[str, tuple[int, float]]
    paths: Sequence[Sequence[tuple[int, float]]]
    num_layers: int
    num_rows: float


def layout(boxes: Sequence[str], edges: Sequence[Edge]) -> Layout:
    """Place `boxes` (unique), of which `edges` go from left to right. Raises graphlib.CycleError where they cannot."""
    layers = _layers(boxes, edges)
    order: list[list[Node]] = [[] for _ in range(max(layers.values(), default=0) + 1)]
    for box in boxes:
        order[layers[box]].append(box)
    chains: list[list[Node]] = []
    for source, target in edges:
        bends: list[Node] = [(source, layer) for layer in range(layers[source] + 1, layers[target])]
        for layer, bend in enumerate(bends, start=layers[source] + 1):
            if bend not in order[layer]:
                order[layer].append(bend)
        chains.append([source, *bends, target])
    before, after = _neighbours(chains)
    order = _fewest_crossings(order, before, after)
    heights = _heights(order, before, after)
    lowest = min(heights.values(), default=0.0)
    heights = {node: height - lowest for node, height in heights.items()}
    layer_of: dict[Node, int] = {node: layer for layer, nodes in enumerate(order) for node in nodes}
    return Layout(
        place={box: (layers[box], heights[box]) for box in boxes},
        paths=[[(layer_of[node], heights[node]) for node in chain] for chain in chains],
        num_layers=len(order) if boxes else 0,
        num_rows=max(heights.values(), default=-1.0) + 1,
    )


def ancestors(boxes: Sequence[str], edges: Sequence[Edge]) -> dict[str, set[str]]:
    """For each box all from which a path leads to it, itself included."""
    graph = _graph(boxes, edges)
    found: dict[str, set[str]] = {}
    for box in graphlib.TopologicalSorter(graph).static_order():
        found[box] = {box}.union(*(found[source] for source in graph[box]))
    return found


def _graph(boxes: Sequence[str], edges: Sequence[Edge]) -> dict[str, list[str]]:
    graph: dict[str, list[str]] = {box: [] for box in boxes}
    for source, target in edges:
        graph[target].append(source)
    return graph


def _layers(boxes: Sequence[str], edges: Sequence[Edge]) -> dict[str, int]:
    """Longest path from the left; what has no source stands just before what is first made of it."""
    graph = _graph(boxes, edges)
    layers: dict[str, int] = {}
    for box in graphlib.TopologicalSorter(graph).static_order():
        layers[box] = max((layers[source] + 1 for source in graph[box]), default=0)
    for box in boxes:
        targets = [layers[target] for source, target in edges if source == box]
        if not graph[box] and targets:
            layers[box] = min(targets) - 1
    return layers


def _neighbours(chains: Sequence[Sequence[Node]]) -> tuple[dict[Node, list[Node]], dict[Node, list[Node]]]:
    before: dict[Node, list[Node]] = {}
    after: dict[Node, list[Node]] = {}
    for chain in chains:
        for left, right in zip(chain, chain[1:], strict=False):
            if right not in after.setdefault(left, []):
                after[left].append(right)
                before.setdefault(right, []).append(left)
    return before, after


def _fewest_crossings(
    order: list[list[Node]], before: Mapping[Node, list[Node]], after: Mapping[Node, list[Node]]
) -> list[list[Node]]:
    best, fewest = order, crossings(order, after)
    for sweep in range(_SWEEPS):
        order = [list(nodes) for nodes in order]
        indices = range(1, len(order)) if sweep % 2 == 0 else range(len(order) - 2, -1, -1)
        for index in indices:
            beside, near = (order[index - 1], before) if sweep % 2 == 0 else (order[index + 1], after)
            at = {node: rank for rank, node in enumerate(beside)}
            wanted = {node: _mean([at[n] for n in near.get(node, [])], rank) for rank, node in enumerate(order[index])}
            order[index].sort(key=wanted.__getitem__)
        if (count := crossings(order, after)) < fewest:
            best, fewest = order, count
    return best


def crossings(order: Sequence[Sequence[Node]], after: Mapping[Node, Sequence[Node]]) -> int:
    """How many pairs of lines between neighbouring layers cross."""
    total = 0
    for left, right in zip(order, order[1:], strict=False):
        at = {node: rank for rank, node in enumerate(right)}
        seen: list[int] = []
        for node in left:
            ends = sorted(at[target] for target in after.get(node, []))
            total += sum(len(seen) - bisect(seen, end) for end in ends)
            for end in ends:
                seen.insert(bisect(seen, end), end)
    return total


def _heights(
    order: Sequence[Sequence[Node]], before: Mapping[Node, list[Node]], after: Mapping[Node, list[Node]]
) -> dict[Node, float]:
    """Rows: each node as near as its order allows to the mean of its neighbours, a row between two boxes."""
    found = {node: float(rank) for nodes in order for rank, node in enumerate(nodes)}
    for sweep in range(2 * _SWEEPS):
        near = (before, after) if sweep % 2 == 0 else (after, before)
        for nodes in order if sweep % 2 == 0 else reversed(order):
            wanted = []
            for node in nodes:
                around = near[0].get(node) or near[1].get(node) or []
                wanted.append(_mean([found[n] for n in around], found[node]))
            found.update(zip(nodes, spread(wanted, _gaps(nodes)), strict=True))
    return found


def _gaps(nodes: Sequence[Node]) -> list[float]:
    room = [1.0 if isinstance(node, str) else _BEND_ROOM for node in nodes]
    return [(one + other) / 2 for one, other in zip(room, room[1:], strict=False)]


def spread(wanted: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """The heights nearest to `wanted` (least squares) of which each is at least its gap after the one before.

    With the gaps taken off this is isotonic regression: neighbours that would come too near are pooled.
    """
    offsets = [0.0]
    for gap in gaps[: max(len(wanted) - 1, 0)]:
        offsets.append(offsets[-1] + gap)
    pools: list[tuple[float, int]] = []  # sum and number of the values that share one level
    for value, offset in zip(wanted, offsets, strict=False):
        total, count = value - offset, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            other = pools.pop()
            total, count = total + other[0], count + other[1]
        pools.append((total, count))
    levels = [total / count for total, count in pools for _ in range(count)]
    return [level + offset for level, offset in zip(levels, offsets, strict=False)]


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else float(otherwise)
