"""An assessment for programs: one JSON document."""

from __future__ import annotations

from typing import Any

from r1mega.plan.assess import Assessment, EnginePlan, RankPlan


def as_document(found: Assessment, suggestions: list[str], elements: int) -> dict[str, Any]:
    """The one JSON document of `plan.format=json`."""
    engines = found.engines
    _, phase, peak = found.worst()
    updates = found.job.updates
    return {
        "world_size": found.layout.world_size if found.ranks else 0,
        "num_gpus": found.num_gpus,
        "layout": str(found.layout),
        "fits": found.fits,
        "misfits": found.misfits,
        "suggestions": suggestions,
        "model_elements": elements,
        "ranks": [_rank_document(found, rank) for rank in found.ranks],
        "engines": None if engines is None else _engine_document(engines),
        "host_bytes_per_node": round(found.host_bytes()),
        "device_peak": {"phase": phase, "bytes": round(peak)},
        "headroom_bytes": round(found.headroom()),
        "updates": updates,
        "updates_per_round": found.job.updates_per_round,
        "samples_per_update": found.job.samples_per_update,
        "tokens_per_update": round(found.job.tokens_per_update),
        "micro_batches": found.micro_batches,
        "flops_per_update": found.flops_per_update,
        "seconds_per_update": found.seconds_per_update,
        "train_seconds": found.train_seconds,
        "round_seconds": found.phase_seconds,
        "total_seconds": found.seconds_per_update * updates,
        "sent_bytes_per_update": found.traffic,
        "disk": found.disk,
        "conversion_bytes_per_worker": found.conversion_bytes,
    }


def _rank_document(found: Assessment, rank: RankPlan) -> dict[str, Any]:
    return {
        "coordinate": rank.coordinate,
        "first_rank": rank.first_rank,
        "num_ranks": rank.num_ranks,
        "parameters": rank.held.parameters,
        "parameter_bytes": rank.parameter_bytes,
        "gate_biases": rank.held.gate_biases,
        "bytes": {phase: {name: round(size) for name, size in parts.items()} for phase, parts in rank.phases.items()},
        "device_peak": {phase: round(found.device_peak(rank, phase)) for phase in rank.phases},
        "host_bytes": {name: round(size) for name, size in rank.host.items()},
        "checkpoint_host_bytes": {name: round(size) for name, size in rank.checkpoint_host.items()},
    }


def _engine_document(engines: EnginePlan) -> dict[str, Any]:
    return {
        "count": engines.count,
        "gpus_each": engines.engine.tp,
        "shares_devices": engines.shares_devices,
        "weight_bytes": round(engines.weights),
        "cache_bytes": round(engines.cache),
        "cached_tokens": round(engines.generation.cached_tokens),
        "sequences_at_once": engines.generation.batch,
        "step_seconds": engines.generation.step_seconds,
    }
