"""Which versions stay on the shelf."""

from __future__ import annotations

from pathlib import Path

from r1mega.weights.shelf import Shelf


def names(place: Shelf) -> list[str]:
    return sorted(path.name for path in place.folder.glob("version-*"))


def test_what_may_be_in_the_making_is_not_dropped(tmp_path: Path) -> None:
    """A writer's thread may come to dropping only when the next publish has begun, or the same one once more."""
    place = Shelf(tmp_path / "engines")
    place.prepare()
    made = ["000002", "000002.old", "000003.part", "000004", "000005", "000005.part", "000006.part", "1000000.part"]
    for name in made:
        (place.folder / f"version-{name}").mkdir()
        (place.folder / f"version-{name}" / "model.safetensors").write_bytes(b"weights")
    place.drop_others(4, 5)
    assert names(place) == ["version-" + name for name in made[3:]]
    place.drop_others(5)
    assert names(place) == ["version-" + name for name in made[4:]]
