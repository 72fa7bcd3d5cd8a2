from __future__ import annotations

import dataclasses
from enum import StrEnum
from typing import get_type_hints

import pytest

from r1mega.config import choices, schema
from r1mega.config.registry import conf_dir, fields, options, suggestions


def test_every_field_is_listed_and_documented() -> None:
    listed = [entry.path for entry in fields()]
    sections = get_type_hints(schema.Config)
    expected = [f"{section}.{f.name}" for section, kind in sections.items() for f in dataclasses.fields(kind)]
    assert listed == expected
    undocumented = [entry.path for entry in fields() if len(entry.doc) < 10 or not entry.doc.endswith(".")]
    assert undocumented == []


def test_a_field_is_shown_as_one_would_write_it() -> None:
    shown = {entry.path: (entry.type, entry.default) for entry in fields()}
    assert shown["stage.loop"] == ("rl|sft|reward_model", None)
    assert shown["data.template"] == ("r1_zero|plain|chat", "r1_zero")
    assert shown["data.eval"] == ("str?", "null")
    assert shown["rollout.stop"] == ("list[str]", "[]")
    assert shown["data.shuffle"] == ("bool", "true")
    assert shown["optim.lr"] == ("float", "3e-06")
    assert shown["run.name"] == ("str", "r1mega")


def test_members_of_enums_are_named_as_their_values() -> None:
    enums = [kind for kind in vars(choices).values() if isinstance(kind, type) and issubclass(kind, StrEnum)]
    enums.remove(StrEnum)
    assert len(enums) > 10
    assert [member for kind in enums for member in kind if member.name != member.value] == []


def test_every_option_says_what_it_is() -> None:
    found = options()
    files = {f"{path.parent.name}/{path.stem}" for path in conf_dir().glob("*/*.yaml")}
    assert {f"{group}/{name}" for group, names in found.items() for name in names} == files
    assert [(group, name) for group, names in found.items() for name, about in names.items() if not about] == []


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("algo.update=4", "algo.updates"),
        ("+algo.grop_size=4", "algo.group_size"),
        ("paralel.tp=2", "parallel.tp"),
        ("experiment=toi", "experiment=toy"),
        ("learning_rate=1", None),
        ("lr=1", "optim.lr"),
        ("algo.updates=4", None),
        ("experiment=toy", None),
        ("hydra.run.dir=x", None),
    ],
)
def test_suggestions(override: str, first: str | None) -> None:
    found = suggestions(override)
    assert len(found) == len(set(found))
    assert (found[0] if found else None) == first
