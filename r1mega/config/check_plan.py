"""Bounds of what `r1mega plan` assumes: see check.py."""

from __future__ import annotations

_SHARE = ((">", 0.0), ("<=", 1.0))

# field, bounds it must keep
PLAN_BOUNDS: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = (
    ("plan.mfu", _SHARE),
    ("plan.decode_bandwidth", _SHARE),
    ("plan.decode_mfu", _SHARE),
    ("plan.network_efficiency", _SHARE),
    ("plan.decode_step_ms", ((">", 0),)),
    ("plan.rows", ((">=", 1),)),
    ("plan.mean_prompt_tokens", ((">=", 1),)),
    ("plan.mean_response_tokens", ((">=", 1),)),
    ("plan.expert_unevenness", ((">=", 1),)),
    ("plan.overhead_gib", ((">=", 0),)),
    ("plan.allocator_slack", ((">=", 0),)),
    ("plan.host_overhead_gib", ((">=", 0),)),
    ("plan.search_rows", ((">=", 1),)),
    ("plan.search_max_tp", ((">=", 1),)),
)
