"""One fault of a run's input, and the error that carries all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """What is wrong with one field: where, what was given, what must hold, how to mend it."""

    field: str
    got: str
    constraint: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: got {self.got}; {self.constraint}; {self.remedy}"


class ConfigError(ValueError):
    """The run cannot start. `faults` holds every fault found (a Fault, or its text), the message lists them all."""

    def __init__(self, faults: Sequence[Fault | str]) -> None:
        assert faults, "a ConfigError needs at least one fault"
        self.faults = tuple(faults)
        noun = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n".join([f"the run cannot start, {noun}:", *(f"  {fault}" for fault in faults)]))
