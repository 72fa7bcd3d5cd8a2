"""What DeepEP's kernels can do, where tokens reach their experts by them (`parallel.dispatcher=flex`)."""

from __future__ import annotations

from collections.abc import Iterator

from r1mega.config.choices import DeviceType, Dispatcher, ParamDtype
from r1mega.config.faults import Fault
from r1mega.config.schema import Config

# Ranks of a group that DeepEP 1.2.1 has settings for (deep_ep/buffer.py, get_dispatch_config); it stops at others.
DEEP_EP_RANKS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)


def check_dispatcher(config: Config) -> Iterator[Fault]:
    """Faults that would otherwise end every rank in its first forward pass."""
    parallel = config.parallel
    if parallel.dispatcher is not Dispatcher.flex or config.device.type is not DeviceType.cuda:
        return
    num_ranks = parallel.ep * parallel.etp
    if num_ranks not in DEEP_EP_RANKS:
        constraint = f"DeepEP takes ep x etp of {', '.join(map(str, DEEP_EP_RANKS))}, which is {num_ranks}"
        yield Fault(
            "parallel.dispatcher", "flex", constraint, "change parallel.ep, or use parallel.dispatcher=alltoall"
        )
    if config.precision.params is not ParamDtype.bf16:
        constraint = f"DeepEP adds up bf16 alone, and precision.params={config.precision.params}"
        yield Fault("parallel.dispatcher", "flex", constraint, "use precision=bf16, or parallel.dispatcher=alltoall")
