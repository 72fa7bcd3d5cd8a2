"""The lineage: a drawing of what was made of what, its table, and the stages that made it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from r1mega.metrics.catalog import format_seconds
from r1mega.pipeline.page.input import Artifact, Page, Work
from r1mega.pipeline.page.layout import Layout, ancestors, layout
from r1mega.pipeline.page.markup import Child, Element, details, el, table
from r1mega.pipeline.page.text import anchor, breakable, counts, plural, shortened

_BOX_W, _BOX_H, _GAP_X, _ROW = 182, 44, 42, 58
_MARGIN = 10
_MOST_LETTERS = 22
_KINDS = 6  # classes k0..k5 of the style sheet
_DIGEST = re.compile(r"(sha256:)?[0-9a-f]{16,}")


def lineage(page: Page) -> Element:
    """The drawing with what it says in words, the artifacts as a table, the stages as a table."""
    made = el("div")
    if not page.artifacts:
        made.append(el("p", "none", cls="none"))
    else:
        made.append(_roots(page))
        made.append(_legend(_kinds(page.artifacts)))
        made.append(el("div", _drawing(page), cls="scroll graph", tabindex=0))
        made.append(el("p", _HINT, id="chosen", aria_live="polite"))
        made.append(details("The artifacts as a table", _table(page), id="artifacts"))
    made.append(el("h3", "What each stage did"))
    made.append(_works(page.works) if page.works else el("p", "none", cls="none"))
    return made


_HINT = "Point at an artifact, or go to it by Tab, to see what it was made of."


def _roots(page: Page) -> Element:
    edges = [(edge.source, edge.target) for edge in page.made]
    targets = {target for _, target in edges}
    roots = [one for one in page.artifacts if one.id not in targets]
    given = [one.id for one in roots if one.stage is None]
    text = f"{plural(len(page.artifacts), 'artifact')}, all made of what was given: {', '.join(given) or 'none'}."
    lost = [one.id for one in roots if one.stage is not None]
    if lost:
        text = f"{plural(len(page.artifacts), 'artifact')}, given: {', '.join(given) or 'none'}. "
        text += f"The lineage does not say of what these were made: {', '.join(lost)}."
    return el("p", text)


def _kinds(artifacts: Sequence[Artifact]) -> dict[str, str]:
    kinds = list(dict.fromkeys(one.kind for one in artifacts))
    return {kind: f"k{index % _KINDS}" for index, kind in enumerate(kinds)}


def _legend(kinds: dict[str, str]) -> Element:
    return el("ul", *(el("li", el("i", cls=cls), el("span", kind)) for kind, cls in kinds.items()), cls="legend")


def _drawing(page: Page) -> Element:
    ids = [one.id for one in page.artifacts]
    edges = [(edge.source, edge.target) for edge in page.made]
    placed, kinds = layout(ids, edges), _kinds(page.artifacts)
    number = {one: index for index, one in enumerate(ids)}
    above = ancestors(ids, edges)
    width = round(2 * _MARGIN + placed.num_layers * (_BOX_W + _GAP_X) - _GAP_X)
    height = round(2 * _MARGIN + placed.num_rows * _ROW - (_ROW - _BOX_H))
    lines = []
    for edge, path in zip(page.made, placed.paths, strict=True):
        title = el("title", f"{edge.source} to {edge.target}, by {edge.stage}")
        lines.append(
            el("path", title, d=_curve(path), data_from=number[edge.source], data_to=number[edge.target], cls="edge")
        )
    boxes = []
    for index, one in enumerate(page.artifacts):
        up = " ".join(str(number[other]) for other in sorted(above[one.id], key=number.__getitem__))
        boxes.append(_box(one, index, placed, kinds[one.kind], up))
    said = f"Lineage of {plural(len(ids), 'artifact')}; the same stands in the table below it."
    return el(
        "svg",
        *lines,
        *boxes,
        width=width,
        height=height,
        viewBox=f"0 0 {width} {height}",
        role="group",
        aria_label=said,
    )


def _corner(layer: int, row: float) -> tuple[float, float]:
    return _MARGIN + layer * (_BOX_W + _GAP_X), _MARGIN + row * _ROW


def _curve(path: Sequence[tuple[int, float]]) -> str:
    """From the right side of the source's box to the left side of the target's, level where it passes a layer."""
    (x, y), last = _corner(*path[0]), len(path) - 1
    x, y = x + _BOX_W, y + _BOX_H / 2
    parts = [f"M{x:.0f} {y:.1f}"]
    for index, place in enumerate(path[1:], start=1):
        left, top = _corner(*place)
        level, bend = top + _BOX_H / 2, (left - x) / 2
        parts.append(f"C{x + bend:.0f} {y:.1f} {left - bend:.0f} {level:.1f} {left:.0f} {level:.1f}")
        x, y = left, level
        if index < last:
            x = left + _BOX_W
            parts.append(f"H{x:.0f}")
    return "".join(parts)


def _box(one: Artifact, index: int, placed: Layout, kind: str, up: str) -> Element:
    x, y = _corner(*placed.place[one.id])
    made_by = f"made by {one.stage}" if one.stage else "given to the pipeline"
    title = el("title", f"{one.id}: {one.kind}, {made_by}\n{one.path}\nsha256 {one.sha256}")
    return el(
        "a",
        title,
        el("rect", width=_BOX_W, height=_BOX_H, rx=6, cls="body"),
        el("rect", width=5, height=_BOX_H, rx=2, cls=f"kind {kind}"),
        el("text", shortened(_name(one), _MOST_LETTERS), x=14, y=19, cls="id"),
        el("text", _what(one), x=14, y=35, cls="what"),
        href=f"#{anchor('artifact', index)}",
        transform=f"translate({x:.0f} {y:.1f})",
        cls="box",
        data_box=index,
        data_up=up,
        aria_label=f"{one.id}, {one.kind}, {made_by}",
    )


def _what(one: Artifact) -> str:
    """Its kind, and who made it where the name does not say that."""
    kind = shortened(one.kind, _MOST_LETTERS - 8)
    if one.stage and _name(one).startswith(one.stage):
        return kind
    return f"{kind} · {shortened(one.stage or 'given', _MOST_LETTERS + 2 - len(kind))}"


def _name(one: Artifact) -> str:
    """The id, or the end of the path where the id is a digest."""
    if _DIGEST.fullmatch(one.id):
        return one.path.rstrip("/").rpartition("/")[2] or one.id
    return one.id


def _table(page: Page) -> Element:
    number = {one.id: index for index, one in enumerate(page.artifacts)}
    sources: dict[str, list[str]] = {}
    for edge in page.made:
        if edge.source not in sources.setdefault(edge.target, []):
            sources[edge.target].append(edge.source)
    rows = []
    for index, one in enumerate(page.artifacts):
        made_of: list[Child] = []
        for source in sources.get(one.id, []):
            made_of += [", " if made_of else None, el("a", source, href=f"#{anchor('artifact', number[source])}")]
        cells: list[Child] = [
            one.kind,
            one.stage or "given",
            el("span", *made_of) if made_of else el("span", "none", cls="none"),
            counts(one.counts),
            el("code", one.path),
            el("code", one.sha256, cls="digest"),
        ]
        row = el(
            "tr",
            el("th", breakable(one.id), scope="row"),
            *(el("td", cell) for cell in cells),
            id=anchor("artifact", index),
        )
        rows.append(row)
    return table(["artifact", "kind", "made by", "made of", "counts", "path", "sha256"], rows, cls="artifacts")


def _works(works: Sequence[Work]) -> Element:
    rows = []
    for work in works:
        config: Child = el("span", "none", cls="none")
        if work.config not in (None, {}, ""):
            text = (
                work.config if isinstance(work.config, str) else json.dumps(work.config, indent=1, ensure_ascii=False)
            )
            config = details("config", el("pre", text))
        seconds: Child = el("span", "none", cls="none")
        if work.seconds is not None:
            seconds = el("data", format_seconds(work.seconds), value=repr(work.seconds), title=f"{work.seconds!r} s")
        cells = [work.about, seconds, counts(work.counts), config, el("code", work.key, cls="digest")]
        rows.append(el("tr", el("th", breakable(work.name), scope="row"), *(el("td", cell) for cell in cells)))
    return table(["stage", "about", "time", "counts", "options", "key"], rows, cls="works")
