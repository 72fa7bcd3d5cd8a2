"""HTML as a tree: text becomes markup nowhere, since only the serializer of the standard library writes any."""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.etree import ElementTree

Element = ElementTree.Element
Child = Element | str | None
# What HTML cannot hold, and half a surrogate pair, which UTF-8 cannot. Of the control characters only tab and newline.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f]")
_INVALID = re.compile("[\x80-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def el(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Element:
    """An element. `cls` is its class, `_` in a name a hyphen; None and False leave an attribute out, True is bare."""
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None and value is not False:
            key = "class" if name == "cls" else name.rstrip("_").replace("_", "-")
            made.set(key, "" if value is True else cleaned(str(value)))
    return add(made, *children)


def add(parent: Element, *children: Child) -> Element:
    """Append elements and texts to `parent`, which is returned."""
    for child in children:
        if isinstance(child, str):
            _append_text(parent, cleaned(child))
        elif child is not None:
            parent.append(child)
    return parent


def _append_text(parent: Element, text: str) -> None:
    if len(parent):
        parent[-1].tail = (parent[-1].tail or "") + text
    else:
        parent.text = (parent.text or "") + text


def cleaned(text: str) -> str:
    """`text` with what no page can hold made visible: pictures of control characters, U+FFFD for what is none."""
    text = text.replace("\r\n", "\n")
    text = _CONTROL.sub(lambda found: "\u2421" if found[0] == "\x7f" else chr(0x2400 + ord(found[0])), text)
    return _INVALID.sub("\ufffd", text)


def raw(tag: str, content: str, **attributes: str) -> Element:
    """A style or script element, whose content is ours and written as it is."""
    assert tag in ("style", "script") and "</" not in content
    made = Element(tag, attributes)
    made.text = content
    return made


def details(summary: Child, *children: Child, **attributes: str | bool | None) -> Element:
    """What is folded away until it is asked for."""
    return el("details", el("summary", summary), *children, **attributes)


def table(head: Iterable[Child], rows: Iterable[Element], *, caption: Child = None, cls: str | None = None) -> Element:
    """A table with a header row; it scrolls by itself where the window is narrow."""
    first = el("thead", el("tr", *(el("th", cell, scope="col") for cell in head)))
    made = el("table", None if caption is None else el("caption", caption), first, el("tbody", *rows), cls=cls)
    return el("div", made, cls="scroll", tabindex=0)


def definitions(pairs: Iterable[tuple[str, Child]], cls: str | None = None) -> Element:
    """A list of names and what they are."""
    return el("dl", *(el("div", el("dt", name), el("dd", what)) for name, what in pairs), cls=cls)


def to_html(root: Element) -> str:
    """The document."""
    return "<!DOCTYPE html>\n" + ElementTree.tostring(root, encoding="unicode", method="html") + "\n"
