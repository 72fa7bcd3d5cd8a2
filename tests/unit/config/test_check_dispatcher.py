"""What DeepEP's kernels cannot do is refused before a start."""

from __future__ import annotations

import pytest

from r1mega.config.check_dispatcher import check_dispatcher
from r1mega.config.choices import DeviceType, Dispatcher, ParamDtype
from r1mega.config.schema import Config


def messages(ep: int, etp: int = 1, params: ParamDtype = ParamDtype.bf16, device=DeviceType.cuda) -> list[str]:
    config = Config()
    config.device.type, config.parallel.dispatcher = device, Dispatcher.flex
    config.parallel.ep, config.parallel.etp, config.precision.params = ep, etp, params
    return [str(fault) for fault in check_dispatcher(config)]


@pytest.mark.parametrize(("ep", "etp"), [(2, 1), (4, 2), (64, 1), (72, 2)])
def test_groups_that_deep_ep_knows(ep: int, etp: int) -> None:
    assert messages(ep, etp) == []


@pytest.mark.parametrize(("ep", "etp"), [(1, 1), (3, 1), (48, 1), (256, 1), (3, 2)])
def test_groups_that_it_does_not(ep: int, etp: int) -> None:
    assert messages(ep, etp) == [
        "parallel.dispatcher: got flex; DeepEP takes ep x etp of 2, 4, 8, 16, 24, 32, 64, 128, 144, 160, which is "
        f"{ep * etp}; change parallel.ep, or use parallel.dispatcher=alltoall"
    ]


def test_it_adds_up_bf16() -> None:
    assert messages(2, params=ParamDtype.fp32) == [
        "parallel.dispatcher: got flex; DeepEP adds up bf16 alone, and precision.params=fp32; use precision=bf16, or "
        "parallel.dispatcher=alltoall"
    ]


def test_what_has_no_gpu_is_refused_for_that_alone() -> None:
    assert messages(3, params=ParamDtype.fp32, device=DeviceType.cpu) == []


def test_another_dispatcher_has_no_such_bounds() -> None:
    config = Config()
    config.device.type, config.parallel.ep = DeviceType.cuda, 3
    assert list(check_dispatcher(config)) == []
