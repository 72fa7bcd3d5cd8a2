"""What can be configured: the option files of `conf/` and the documented fields of the schema."""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from r1mega.config import choices


@dataclass(frozen=True)
class FieldDoc:
    """A field as written in the schema: dotted path, type, default (None: no default) and documentation."""

    path: str
    type: str
    default: str | None
    doc: str


def conf_dir() -> Path:
    """The directory of option files: inside an installed package, or beside the package in a checkout.

    Raises FileNotFoundError where neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for place in (package / "conf", package.parent / "conf"):
        if (place / "config.yaml").is_file():
            return place
    raise FileNotFoundError(f"no configuration files in {package / 'conf'}; install r1mega again")


def options() -> dict[str, dict[str, str]]:
    """Group name -> option name -> the first comment line of the option's file, groups and options sorted."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted(conf_dir().glob("*/*.yaml")):
        lines = [line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
        about = next((line for line in lines if not line.startswith("@package")), "")
        found.setdefault(file.parent.name, {})[file.stem] = about
    return found


@cache
def fields() -> tuple[FieldDoc, ...]:
    """Every field of the schema in the order written."""
    files = sorted(Path(__file__).parent.glob("schema*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    classes = {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}
    return tuple(
        doc
        for section in classes["Config"].body
        if isinstance(section, ast.AnnAssign)
        for doc in _section_fields(ast.unparse(section.target), classes[ast.unparse(section.annotation)])
    )


def _section_fields(section: str, node: ast.ClassDef) -> list[FieldDoc]:
    found = []
    for statement, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(statement, ast.AnnAssign):
            continue
        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        doc = str(after.value.value) if documented else ""
        path = f"{section}.{ast.unparse(statement.target)}"
        found.append(FieldDoc(path, _type_text(ast.unparse(statement.annotation)), _default_text(statement.value), doc))
    return found


def _type_text(annotation: str) -> str:
    members = getattr(getattr(choices, annotation, None), "__members__", None)
    return "|".join(members) if members else annotation.replace(" | None", "?")


def _default_text(value: ast.expr | None) -> str | None:
    text = ast.unparse(value) if value is not None else "MISSING"
    if text == "MISSING":
        return None
    if text.startswith("field("):
        return "{}" if text == "field(default_factory=dict)" else "[]"
    if isinstance(value, ast.Attribute):  # an enum member such as Template.r1_zero
        return value.attr
    return {"None": "null", "True": "true", "False": "false"}.get(text, text.strip("'"))


def suggestions(override: str) -> list[str]:
    """The nearest valid names for an override `[+~]key=value` whose key is unknown; empty where the key is known.

    Groups count as names, and so do the options of a known group where the value is none of them.
    """
    key, _, value = override.lstrip("+~").partition("=")
    key = key.partition("@")[0]
    groups = options()
    if key in groups:
        return [f"{key}={near}" for near in _near(value, sorted(groups[key]))] if value not in groups[key] else []
    paths = [entry.path for entry in fields()]
    known = list(dict.fromkeys([*paths, *(path.partition(".")[0] for path in paths), *groups]))
    if key in known or key.startswith("hydra"):
        return []
    near = _near(key, known)
    if not near:  # a field given without its section, or under another one
        near = [path for path in paths if path.rpartition(".")[2] == key.rpartition(".")[2]]
    return near


def _near(word: str, known: list[str]) -> list[str]:
    return difflib.get_close_matches(word, known, n=3, cutoff=0.6)
