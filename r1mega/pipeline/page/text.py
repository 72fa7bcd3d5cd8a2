"""Figures and names as a reader wants them: units, signs, which way is better."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from r1mega.metrics.catalog import CATALOG
from r1mega.pipeline.page.markup import Child, Element, add, el

MINUS, POINTS, NONE = "\u2212", "\u00a0pts", "none"
# Parts of metric names. A share of 1 is shown as a percentage; more of it is better, but for what is in _WORSE.
_SHARES = re.compile(
    r"accura|(pass|cons)(@|_at_|_)?\d|(^|[/_ ])(right|correct|format|safety|consistency|consistent|readab\w*"
    r"|well.?formed|language\w*|mixed|share|fraction|truncated|cut.?off|no.?answer"
    r"|(pass|win|error|hit|solve)[_ ]rate)([/_ ]|$)"
)
_WORSE = re.compile(
    r"(^|[/_ ])(loss|error\w*|cut.?off|truncated|no.?answer|ungraded|mixed|repetition|repeated|unsafe)([/_ ]|$)"
)
# What lies between 0 and 1 and is no share.
_OTHER = re.compile(r"(^|[/_ ])(reward|loss|kl|entropy|score|ratio|norm|gap|token|length|second)s?([/_ ]|$)")
_BETTER = re.compile(r"reward|rating|percentile|score")
_WHOLE = 1e15


@dataclass(frozen=True)
class Unit:
    """How the figures of one row, chart or finding are written alike: shares of 1 as percent, numbers with `digits`
    decimals (None: three significant digits)."""

    is_share: bool
    digits: int | None = 1


def unit_of(name: str, values: Iterable[float | None], *, bounded_is_share: bool = False) -> Unit:
    """A share where the name says so and every value is one (from -1 for differences), else a number.

    With `bounded_is_share` any value that can be a share is one, but for what is named after something else.
    """
    known = [abs(value) for value in values if value is not None]
    lower = name.lower()
    if name in CATALOG:
        named = CATALOG[name].format(0.5).endswith("%")
    elif bounded_is_share:
        named = bool(_SHARES.search(lower)) or not _OTHER.search(lower)
    else:
        named = bool(_SHARES.search(lower))
    if named and all(value <= 1 for value in known):
        return Unit(is_share=True)
    return Unit(is_share=False, digits=_digits(known))


def _digits(sizes: Sequence[float]) -> int | None:
    """None for very small numbers, none for whole and for large ones."""
    largest = max(sizes, default=0.0)
    if all(size == round(size) for size in sizes) or largest >= 1000:
        return 0
    return next((digits for least, digits in ((10, 1), (1, 2), (0.1, 3)) if largest >= least), None)


def direction(name: str) -> int:
    """1 where more of this metric is better, -1 where less is, 0 where neither is known."""
    lower = name.lower()
    if _WORSE.search(lower):
        return -1
    return 1 if _SHARES.search(lower) or _BETTER.search(lower) else 0


def label(name: str) -> str:
    """A metric's name for people."""
    if name in CATALOG:
        return CATALOG[name].label
    text = re.sub(r"(pass|cons)_at_(\d+)", r"\1@\2", name.replace("__", "/"))
    return text.replace("_", " ").replace("/", ": ")


def written(value: float, unit: Unit, *, signed: bool = False) -> str:
    """A figure as text: `64.1%`, `1,234`, `0.0312`; signed: `+4.2 pts`, `-0.5` with a true minus."""
    size = abs(value)
    if unit.is_share:
        text = f"{100 * size:.1f}" + (POINTS if signed else "%")
    elif unit.digits is None or size >= _WHOLE:
        text = f"{size:.3g}"
    else:
        text = f"{size:,.{unit.digits}f}"
    if not re.search("[1-9]", text):
        return ("\u00b1" if signed else "") + text
    return (MINUS if value < 0 else "+" if signed else "") + text


def figure(value: float | None, unit: Unit, *, signed: bool = False, cls: str | None = None) -> Element:
    """A figure for the page; the exact value is its attribute."""
    if value is None:
        return el("span", NONE, cls="none")
    return el("data", written(value, unit, signed=signed), value=repr(value), title=repr(value), cls=cls)


def counts(values: Mapping[str, Any]) -> Child:
    """`samples 1,234 · tokens 56,789`."""
    if not values:
        return el("span", NONE, cls="none")
    parts: list[Child] = []
    for name, value in values.items():
        parts += [" · " if parts else None, f"{name.replace('_', ' ')} ", _count(value)]
    return el("span", *parts)


def _count(value: Any) -> Child:
    if isinstance(value, int | float) and not isinstance(value, bool):
        text = str(value)
        if abs(value) < _WHOLE:
            text = written(float(value), Unit(is_share=False, digits=_digits([abs(value)])))
        return el("data", text, value=repr(value))
    return NONE if value is None else str(value)


def plural(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def listed(names: list[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def shortened(text: str, most: int) -> str:
    """Without its middle where it is longer than `most` characters."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    tail = (most - 1) // 2
    return text[: most - 1 - tail] + "…" + text[-tail:]


def breakable(name: str, about: str | None = None) -> Element:
    """A name that may be broken after its underscores, for a narrow column; `about` is said where it is pointed at."""
    first, *others = name.split("_")
    shown = el("span", first, title=about)
    for part in others:
        add(shown, "_", el("wbr"), part)
    return shown


def anchor(prefix: str, index: int) -> str:
    """An id of the page: names of stages may hold anything, so their numbers stand in ids."""
    return f"{prefix}-{index}"
