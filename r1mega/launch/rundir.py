"""The run directory: created once by the launcher, never shared with another run."""

from __future__ import annotations

from pathlib import Path

from r1mega.config import io
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config

LOG_DIR = "logs"


def create(config: Config) -> Path:
    """Make `run.dir` with its log folder and write the resolved configuration into it; returns that file's path.

    Raises ConfigError where the directory already holds a run or cannot be written. Two launchers racing for one
    directory cannot both win: the file is created exclusively.
    """
    directory = Path(config.run.dir)
    path = directory / io.FILE_NAME
    try:
        (directory / LOG_DIR).mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(io.to_yaml(config))
    except FileExistsError as error:
        constraint = f"already holds a run ({Path(str(error.filename)).name})"
        remedy = "choose another run.dir, or remove or rename the old one"
        raise ConfigError([Fault("run.dir", str(directory), constraint, remedy)]) from error
    except OSError as error:
        reason = f"{directory} ({error.strerror})"
        raise ConfigError([Fault("run.dir", reason, "must be writable", "choose another run.dir")]) from error
    return path
