"""A group with others that do not come, and the address they would find it at."""

from __future__ import annotations

import time

import pytest

from r1mega.parallel.outside import OutsideGroup, address_towards


def test_nobody_comes() -> None:
    group = OutsideGroup("nobody", 2, "gloo", seconds=1, step_seconds=1)
    assert 0 < group.port < 1 << 16
    began = time.monotonic()
    with pytest.raises(RuntimeError):
        group.meet()
    assert time.monotonic() - began < 20
    group.close()
    group.close()


def test_two_at_once_have_ports_of_their_own() -> None:
    one, other = (OutsideGroup(name, 2, "gloo", seconds=1, step_seconds=1) for name in ("one", "other"))
    assert one.port != other.port
    one.close()
    other.close()


def test_address() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
