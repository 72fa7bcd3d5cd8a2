"""Taking the fields of a JSON object one by one, each with what it must be, and an error that names file and key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

_MISSING = object()
_LARGEST, _MOST_UPDATES = 1e100, 2**53  # beyond these no axis can be drawn
_MOST_SHOWN = 60  # characters of a wrong value in an error


class PageError(ValueError):
    """The page cannot be drawn: which file, which key, what is there, what was expected."""


@dataclass
class Fields:
    """An object of `file`, at the key `at` ("" is the whole file). Keys that nobody took go to `unshown` by `done`."""

    file: Path
    at: str
    values: dict[str, Any]
    unshown: list[str]
    taken: set[str] = field(default_factory=set)

    def fail(self, key: str, got: Any, expected: str) -> NoReturn:
        """Raise PageError for `key` of this object."""
        raise PageError(f"{self.file}: {self._path(key)}: got {shown(got)}; expected {expected}")

    def take(self, key: str, default: Any = _MISSING, expected: str = "this key to be there") -> Any:
        """The value of `key`. Raises PageError where it is not there and has no default."""
        self.taken.add(key)
        if key in self.values:
            return self.values[key]
        if default is _MISSING:
            raise PageError(f"{self.file}: {self._path(key)}: not there; expected {expected}")
        return default

    def text(self, key: str, default: Any = _MISSING) -> Any:
        """A text; where there is a default, null and a missing key are the default."""
        value = self.take(key, default, "a text")
        if value is None and default is not _MISSING:
            return default
        if not isinstance(value, str):
            self.fail(key, value, "a text" if default is _MISSING else "a text or null")
        return value

    def number(self, key: str) -> float | None:
        """A number; None where it is null, missing, or not finite."""
        return number(self, key, self.take(key, None), "a number or null")

    def sequence(self, key: str, expected: str, kind: type, default: Any = _MISSING) -> Sequence[Any]:
        """A list of values of one type."""
        value = self.take(key, default, expected)
        if value is default:
            return value
        if not isinstance(value, list) or any(type(each) is not kind for each in value):
            self.fail(key, value, expected)
        return value

    def objects(self, key: str, default: Any = _MISSING) -> Iterator[Fields]:
        """The objects of a list. Whoever reads one says `done` when it is read."""
        for index, value in enumerate(self.sequence(key, "a list of objects", dict, default)):
            yield Fields(self.file, self._path(f"{key}[{index}]"), value, self.unshown)

    def mapping(self, key: str, read: Callable[[str, Any], Any] = lambda at, value: value) -> dict[str, Any]:
        """An object, its values read by `read` from (key, value); empty where it is null or missing."""
        value = self.take(key, None)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.fail(key, value, "an object or null")
        return {name: read(f"{key}.{name}", each) for name, each in value.items()}

    def done(self) -> None:
        """Remember the keys that were not asked for."""
        self.unshown += [f"{self.file.name}: {self._path(key)}" for key in self.values if key not in self.taken]

    def _path(self, key: str) -> str:
        return f"{self.at}.{key}" if self.at else key


def number(fields: Fields, key: str, value: Any, expected: str) -> float | None:
    """`value` as a float; None for null and for what is not finite. Raises PageError where it is no number."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        fields.fail(key, value, expected)
    if abs(value) > _LARGEST:
        fields.fail(key, value, f"{expected}, at most {_LARGEST:g} in size")
    return float(value)


def points(fields: Fields, key: str, value: Any) -> tuple[tuple[int, float | None], ...]:
    """Pairs of an update and a value, ascending; where an update stands twice, as after a restart, the later counts."""
    expected = "a list of [update, value], an integer and a number or null"
    if not isinstance(value, list):
        fields.fail(key, value, expected)
    found: dict[int, float | None] = {}
    for index, pair in enumerate(value):
        at = f"{key}[{index}]"
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int or not 0 <= pair[0] < _MOST_UPDATES:
            fields.fail(at, pair, "[update, value], an integer of at least 0 and a number or null")
        found[pair[0]] = number(fields, f"{at}[1]", pair[1], "a number or null")
    return tuple(sorted(found.items()))


def shown(value: Any) -> str:
    """A value as JSON on one line, cut to a length for an error."""
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."
