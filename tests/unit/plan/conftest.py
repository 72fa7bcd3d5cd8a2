"""`r1mega plan` with what ranks hold from the table, which says what Megatron says (test_held) and takes less time."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from r1mega import cli
from r1mega.config import io
from r1mega.config.registry import conf_dir
from r1mega.plan import held, run


@pytest.fixture
def by_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The table instead of Megatron, and no Hydra but one's own."""

    def from_table(fields, layout, *, freezes_mtp, on_stage):
        return held.table_of(fields).held(layout, freezes_mtp=freezes_mtp)

    monkeypatch.setattr(run.holdings, "from_megatron", from_table)
    # A plan starts Hydra itself, and other tests of this process may have one open.
    others = GlobalHydra.instance()
    open_one, others.hydra = others.hydra, None
    yield
    GlobalHydra.set_instance(others)
    others.hydra = open_one


@pytest.fixture
def planned(by_table: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch) -> Callable[..., tuple]:
    """`planned(*arguments)` -> exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["r1mega"])

    def ask(*arguments: str) -> tuple[int, str, str]:
        root = logging.getLogger()
        level, handlers = root.level, list(root.handlers)
        code = cli.main(["plan", *arguments])
        root.setLevel(level)  # Hydra has set up logging, to a stream that is closed with this test
        root.handlers[:] = handlers
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return ask


@pytest.fixture
def plan_of(by_table: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict]]:
    """`plan_of(*overrides)` -> exit code and document; without Hydra's own command line, which takes longer."""

    def ask(*overrides: str) -> tuple[int, dict]:
        cli.register_schema()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = io.typed(compose("config", [*overrides, "plan.format=json"]))
        code = cli._plan_one(config)
        return code, json.loads(capsys.readouterr().out)

    return ask
