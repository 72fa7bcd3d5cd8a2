"""Small JSON files that are whole or not there, whenever a process is killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, values: Any) -> None:
    """Write beside, then move into place."""
    part = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def read_json(path: Path) -> Any:
    """What the file holds; None where there is none. Raises ValueError naming a file that is not JSON."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it, and what it says is worked out again") from error
