"""Kernels that Megatron-Core calls and that need GPUs, in plain torch: what surrounds them then runs on a CPU too."""

from __future__ import annotations

import sys


def install() -> None:
    """Have Megatron find them. To be called before it is imported; it can be repeated."""
    from parity.stand_ins import apex, deep_ep

    if sys.modules.get("deep_ep.utils") is None:
        assert not any(name.startswith("megatron.core") for name in sys.modules), "Megatron has looked already"
        deep_ep.install()
        apex.install()
