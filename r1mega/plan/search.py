"""`r1mega plan search`: layouts for a model and a cluster, the fastest that fit first.

Every layout that divides the model and uses all accelerators (those of servers of their own left out) is assessed with
the configuration's other options, and with and without recomputation: powers of two on tp, cp, pp and ep, neither
interleaved nor with etp. What ranks hold comes from the family's table, which says what Megatron says.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

from r1mega.config.check_cluster import server_ranks, takes_turns
from r1mega.config.choices import Loop, Mtp, PlanFormat, Recompute
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.metrics.flops import ModelShape
from r1mega.models.hf_fields import HfFields
from r1mega.models.size import model_shape
from r1mega.parallel.layout import Layout
from r1mega.plan import rows, validity
from r1mega.plan.assess import Assessment, assess
from r1mega.plan.held import Table, table_of
from r1mega.plan.job import GIB
from r1mega.plan.run import DOES_NOT_FIT, FITS, Progress

_MAX_PP, _MAX_CP = 32, 16


@dataclass(frozen=True)
class Candidate:
    """A layout, how it computes, and what comes of it."""

    layout: Layout
    recompute: str
    result: Assessment


def search(config: Config) -> int:
    """Print the layouts; 0 where one fits, 1 where none does. Raises ConfigError where none divides the model."""
    if config.stage.loop in (Loop.reject, Loop.evaluate):
        constraint = "trains nothing: there is no layout to look for"
        raise ConfigError([Fault("stage.loop", str(config.stage.loop), constraint, "use r1mega plan")])
    fields = validity.model_of(config)
    if faults := rows.missing(config):
        raise ConfigError(faults)
    found = candidates(config, fields)
    if not found:
        got = f"{config.cluster.num_gpus} accelerators"
        constraint = "no layout divides the model and its batch and uses all that servers leave"
        raise ConfigError([Fault("cluster", got, constraint, "take another number of machines, or a larger batch")])
    shown = found[: config.plan.search_rows]
    if config.plan.format is PlanFormat.json:
        print(json.dumps({"searched": len(found), "layouts": [_document(one) for one in shown]}), flush=True)
    else:
        _show(config, found, shown)
    return FITS if any(one.result.fits for one in found) else DOES_NOT_FIT


def candidates(config: Config, fields: HfFields) -> list[Candidate]:
    """All layouts that can be, those that fit first, then by the time of an update."""
    table = table_of(fields)
    layouts = list(_layouts(config, fields))
    progress, found = Progress("layout", len(layouts)), []
    for number, layout in enumerate(layouts):
        progress(number)
        best = None
        for recompute in dict.fromkeys((config.memory.recompute, Recompute.none, Recompute.full)):
            one = _assessed(config, fields, table, layout, recompute)
            if one is not None and (best is None or _rank(one) < _rank(best)):
                best = one
        if best is not None:
            found.append(best)
    return sorted(found, key=_rank)


def _rank(one: Candidate) -> tuple[bool, float, float]:
    result = one.result
    return (not result.fits, result.seconds_per_update if result.fits else -result.headroom(), -result.headroom())


def _assessed(config: Config, fields: HfFields, table: Table, layout: Layout, recompute: Recompute) -> Candidate | None:
    sizes = {name: getattr(layout, name) for name in ("tp", "cp", "pp", "vpp", "ep", "etp", "dp")}
    parallel = replace(config.parallel, **sizes, stages=list(layout.stages) or None)
    changed = replace(config, parallel=parallel, memory=replace(config.memory, recompute=recompute))
    if validity.problems(changed, fields, layout):
        return None
    held = table.held(layout, freezes_mtp=config.model.mtp is Mtp.freeze)
    return Candidate(layout, str(recompute), assess(changed, fields, held))


def _layouts(config: Config, fields: HfFields) -> Iterator[Layout]:
    """Powers of two on every axis, layers dealt so that the stages' FLOPs are as even as can be."""
    gpus = config.cluster.num_gpus - _beside(config)
    shape, numbers = model_shape(fields), fields.shape()
    for tp in _powers(min(config.plan.search_max_tp, config.cluster.gpus_per_node)):
        for pp in _powers(min(_MAX_PP, numbers.num_layers)):
            for cp in _powers(_MAX_CP):
                if gpus % (tp * pp * cp):
                    continue
                dp = gpus // (tp * pp * cp)
                for ep in _powers(min(numbers.num_experts, tp * cp * dp) if numbers.num_experts else 1):
                    layout = Layout(tp=tp, pp=pp, cp=cp, dp=dp, ep=ep, stages=even_stages(shape, pp))
                    if not layout.problems(numbers):
                        yield layout


def _beside(config: Config) -> int:
    """Accelerators that servers have for themselves."""
    return 0 if takes_turns(config) else server_ranks(config)


def even_stages(shape: ModelShape, pp: int) -> tuple[int, ...]:
    """Layers of each stage, so that the largest stage's forward FLOPs are least; empty where they divide evenly.

    The output table counts with the last stage: at a vocabulary of 129,280 it weighs as much as two layers.
    """
    if pp == 1 or shape.num_layers % pp == 0:
        return ()
    most = -(-shape.num_layers // pp)
    missing = most * pp - shape.num_layers
    counts = [most] * pp
    # The last stage has the output table, the first ones the cheaper dense layers but most micro-batches in flight.
    for number in range(missing):
        counts[_lightened(number, pp)] -= 1
    return tuple(counts) if min(counts) > 0 else ()


def _lightened(number: int, pp: int) -> int:
    """Which stage goes without a layer, one after the other: the last and the first in turn, then inwards."""
    inward, is_front = divmod(number, 2)
    return inward % pp if is_front else pp - 1 - inward % pp


def _powers(limit: int) -> Iterator[int]:
    size = 1
    while size <= limit:
        yield size
        size *= 2


def _document(one: Candidate) -> dict[str, object]:
    result = one.result
    return {
        "layout": str(one.layout),
        "recompute": one.recompute,
        "fits": result.fits,
        "seconds_per_update": result.seconds_per_update,
        "train_seconds": sum(result.train_seconds.values()),
        "headroom_bytes": round(result.headroom()),
        "misfits": result.misfits,
    }


def _show(config: Config, found: list[Candidate], rows: list[Candidate]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    fitting = sum(one.result.fits for one in found)
    title = f"{fitting} of {len(found)} layouts fit {config.cluster.num_gpus} accelerators; the first {len(rows)}"
    table = RichTable(title=title)
    for name in ("layout", "recompute", "s / update", "of it training", "bubble", "GiB at most", "left", "phase"):
        table.add_column(name, justify="left" if name in ("layout", "recompute", "phase") else "right")
    for one in rows:
        result = one.result
        train = sum(result.train_seconds.values())
        _, phase, worst = result.worst()
        left = f"{result.headroom() / GIB:.1f}"
        table.add_row(
            str(one.layout),
            one.recompute,
            f"{result.seconds_per_update:,.1f}",
            f"{train:,.1f}",
            f"{result.train_seconds['pipeline bubble'] / train:.0%}",
            f"{worst / GIB:.1f}",
            left if result.fits else f"[red]{left}[/red]",
            phase,
        )
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print(table)
    if rows and not rows[0].result.fits:
        for line in rows[0].result.misfits:
            console.print(f"the first does not fit: {line}")
