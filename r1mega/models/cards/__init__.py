"""The config.json of published models, as published: what a run is planned with where no checkpoint is at hand."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The models there are cards of."""
    return sorted(path.parent.name for path in _FOLDER.glob("*/config.json"))


def folder(name: str) -> Path:
    """The directory that holds the card's config.json. Raises ValueError for a name that has none."""
    if name not in names():
        raise ValueError(f"model.card: got {name}; there are {', '.join(names())}; choose one of them or null")
    return _FOLDER / name
