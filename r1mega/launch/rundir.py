"""The run directory: created once by the launcher, never shared with another run."""

from __future__ import annotations

from pathlib import Path

from r1mega.config import io
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config

LOG_DIR = "logs"
RESUMED = "config.resumed-{}.yaml"


def latest_config(directory: Path | str) -> Path | None:
    """The configuration the run in this directory was last started or resumed with; None where there is no run."""
    first = Path(directory) / io.FILE_NAME
    resumed = sorted(Path(directory).glob(RESUMED.format("*")), key=lambda path: int(path.stem.rpartition("-")[2]))
    return resumed[-1] if resumed else first if first.exists() else None


def create(config: Config) -> Path:
    """Make `run.dir` with its log folder and write the resolved configuration into it; returns that file's path.

    A run that is gone on with gets a file of its own for each time. Two launchers racing for one directory cannot both
    win: the file is created exclusively. Raises ConfigError where the directory holds a run already or is not writable.
    """
    directory = Path(config.run.dir)
    path = directory / io.FILE_NAME
    if path.exists() and (config.run.resume or config.run.resume_from):
        path = directory / RESUMED.format(len(list(directory.glob(RESUMED.format("*")))) + 1)
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
