"""Habits of the house that no linter holds."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Absolute places that exist on somebody's machine only.
MACHINE_PATH = re.compile(r"(?<![\w.$}/-])/(?:work|home|Users|root|tmp|mnt|scratch)/\w")


def sources(suffixes: tuple[str, ...] = (".py",)) -> Iterator[Path]:
    for folder in ("r1mega", "tools", "benchmarks", "conf", "slurm", "docs"):
        yield from sorted(path for path in (REPO / folder).rglob("*") if path.suffix in suffixes)


def too_long(text: str) -> list[str]:
    found = []
    num_lines = len(text.splitlines())
    if num_lines > MAX_FILE_LINES:
        found.append(f"{num_lines} lines")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{node.name}: {length} lines")
    return found


def test_files_and_functions_stay_short() -> None:
    files = list(sources())
    assert len(files) > 20
    offences = [f"{path.relative_to(REPO)}: {what}" for path in files for what in too_long(path.read_text("utf-8"))]
    assert offences == []


@pytest.mark.parametrize("num_lines", [MAX_FUNCTION_LINES, MAX_FUNCTION_LINES + 1])
def test_the_measure_of_functions(num_lines: int) -> None:
    text = "def f():\n" + "    x = 1\n" * (num_lines - 1)
    assert too_long(text) == ([] if num_lines == MAX_FUNCTION_LINES else [f"f: {num_lines} lines"])


def test_the_measure_of_files() -> None:
    assert too_long("x = 1\n" * MAX_FILE_LINES) == []
    assert too_long("x = 1\n" * (MAX_FILE_LINES + 1)) == [f"{MAX_FILE_LINES + 1} lines"]


def test_nothing_names_a_place_on_somebodys_machine() -> None:
    files = [*sources((".py", ".yaml", ".sh", ".md", ".sbatch")), *(REPO / name for name in ("Makefile", "setup.cfg"))]
    offences = [
        f"{path.relative_to(REPO)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert offences == []


@pytest.mark.parametrize(
    ("line", "is_found"),
    [
        ('open("/home/me/x")', True),
        ("path=/tmp/x", True),
        ("runs/tmp/x", False),
        ("https://host/home/page", False),
        ("model.hf=DIR/hf", False),
    ],
)
def test_what_counts_as_such_a_place(line: str, is_found: bool) -> None:
    assert bool(MACHINE_PATH.search(line)) is is_found


def test_every_package_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(REPO / "setup.cfg")
    listed = setup["options"]["packages"].split()
    folders = {path.parent.relative_to(REPO) for path in (REPO / "r1mega").rglob("*.py")}
    outside = {"r1mega.conf", "r1mega.slurm"}  # folders beside the package
    expected = {".".join(folder.parts) for folder in folders} | outside
    assert set(listed) == expected
    assert listed == sorted(listed)
    for package in expected - outside:
        assert (REPO.joinpath(*package.split(".")) / "__init__.py").is_file(), f"{package} has no __init__.py"


def test_every_option_file_is_installed() -> None:
    patterns = configparser.ConfigParser()
    patterns.read(REPO / "setup.cfg")
    globs = [part.strip() for part in patterns["options.package_data"]["r1mega.conf"].split(",")]
    shipped = {path for pattern in globs for path in (REPO / "conf").glob(pattern)}
    assert shipped == {path for path in (REPO / "conf").rglob("*.yaml")}


def test_no_source_is_left_out_of_the_repository() -> None:
    """An ignore pattern such as `dist/` takes a whole folder of tests out of it in silence."""
    folders = ("r1mega", "conf", "tools", "tests", "benchmarks", "docs")
    asked = subprocess.run(
        ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "--", *folders],
        cwd=REPO, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    if asked.returncode != 0:
        pytest.skip(f"not a git checkout: {asked.stderr.strip()}")
    left_out = [line for line in asked.stdout.splitlines() if "__pycache__" not in line and ".egg-info" not in line]
    assert left_out == []


def test_every_folder_of_tests_is_collected() -> None:
    """pytest's own list of folders to pass over holds `dist` and `build`."""
    setup = configparser.ConfigParser()
    setup.read(REPO / "setup.cfg")
    passed_over = setup["tool:pytest"]["norecursedirs"].split()
    folders = {path.parent for path in (REPO / "tests").rglob("test_*.py")}
    assert (REPO / "tests" / "dist") in folders
    names = {part for folder in folders for part in folder.relative_to(REPO).parts}
    assert not [name for name in names if any(fnmatch(name, pattern) for pattern in passed_over)]


def test_only_one_version_of_torch_is_named() -> None:
    # The Makefile reads the pin from setup.cfg, so exactly one line may match.
    pins = re.findall(r"^ *(torch==.*)$", (REPO / "setup.cfg").read_text("utf-8"), re.MULTILINE)
    assert len(pins) == 1
    assert "torch==2" not in (REPO / "Makefile").read_text("utf-8")
