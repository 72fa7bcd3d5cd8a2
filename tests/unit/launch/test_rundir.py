from __future__ import annotations

import os
from pathlib import Path

import pytest

from r1mega.config import io
from r1mega.config.faults import ConfigError
from r1mega.config.schema import Config, RunConfig
from r1mega.launch import rundir


def config_at(path: Path) -> Config:
    # Fields whose value the schema leaves open are of no interest here; OmegaConf writes them as `???`.
    return Config(run=RunConfig(dir=str(path)))


def test_the_resolved_file_is_written_once(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    path = rundir.create(config_at(target))
    assert path == target / "config.yaml"
    assert path.read_text() == io.to_yaml(config_at(target))
    assert (target / "logs").is_dir()
    path.write_text("somebody's run")
    with pytest.raises(ConfigError, match=r"run\.dir: got .*b; already holds a run \(config\.yaml\); choose another"):
        rundir.create(config_at(target))
    assert path.read_text() == "somebody's run"


def test_an_empty_directory_may_be_there_already(tmp_path: Path) -> None:
    assert rundir.create(config_at(tmp_path)).is_file()


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc").is_dir(), reason="needs a place where nobody may write")
def test_an_unwritable_place_is_named() -> None:
    place = Path("/proc/r1mega-run")
    with pytest.raises(ConfigError, match=r"run\.dir: got /proc/r1mega-run \(.+\); must be writable"):
        rundir.create(config_at(place))


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir"):
        rundir.create(config_at(tmp_path / "file"))
