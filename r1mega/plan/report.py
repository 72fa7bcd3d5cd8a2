"""An assessment for people: tables on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from r1mega.plan.assess import Assessment, RankPlan
from r1mega.plan.job import GIB


def show(found: Assessment, suggestions: list[str], elements: int) -> None:
    """Print what was found."""
    console = Console(width=140 if not Console().is_terminal else None, highlight=False)
    _heading(console, found, elements)
    if found.ranks:
        console.print(_memory(found))
    if found.engines is not None:
        _engines(console, found)
    console.print(_times(found))
    _totals(console, found)
    for line in found.misfits:
        console.print(f"[red]does not fit[/red]  {line}")
    for line in suggestions:
        console.print(f"[yellow]would help[/yellow]    {line}")
    worst, phase, nbytes = found.worst()
    verdict = "[green]fits[/green]" if found.fits else "[red]does not fit[/red]"
    console.print(
        f"{verdict}: at most {nbytes / GIB:.1f} of {found.config.cluster.gpu_memory_gib:g} GiB of a device, in phase "
        f"{phase} on {'every rank' if worst is None else f'pipeline stage {worst.held.stage}'}"
    )


def _heading(console: Console, found: Assessment, elements: int) -> None:
    layout, cluster, fields = found.layout, found.config.cluster, found.fields
    ranks = f"layout {layout}: {layout.world_size} ranks" if found.ranks else f"engines of {found.num_gpus} ranks"
    console.print(
        f"[bold]{found.config.run.name}[/bold]  {fields.family}, {elements:,} elements; {ranks} on "
        f"{cluster.nodes} x {cluster.gpus_per_node} accelerators of {cluster.gpu_memory_gib:g} GiB"
    )
    if not found.ranks:
        return
    layers = layout.chunk_layers(fields["num_hidden_layers"])
    parts = [f"{sum(layers)} layers as {'+'.join(map(str, layers))}" if layout.pp > 1 else f"{sum(layers)} layers"]
    parts.append(f"{fields['num_attention_heads']} heads / tp {layout.tp}")
    if fields.is_moe:
        parts.append(f"{fields['n_routed_experts']} experts / ep {layout.ep}, {layout.expert_dp} copies of each")
    parts.append(f"{found.job.samples_per_update} sequences / dp {layout.dp}")
    console.print("valid: " + "; ".join(parts))


def _memory(found: Assessment) -> Table:
    table = Table(
        title="GiB of a device at the worst instant of each phase (slack and overhead included)", min_width=80
    )
    for name in ("stage", "ranks", "parameters", "weights"):
        table.add_column(name, justify="right")
    for phase in found.ranks[0].phases:
        table.add_column(phase, justify="right")
    table.add_column("host", justify="right")
    limit = found.config.cluster.gpu_memory_gib * GIB
    for rank, label in _grouped(found):
        cells = []
        for phase in rank.phases:
            nbytes = found.device_peak(rank, phase)
            text = f"{nbytes / GIB:.1f}"
            cells.append(f"[red]{text}[/red]" if nbytes > limit else text)
        host = sum(rank.host.values()) / GIB
        table.add_row(
            label,
            f"{rank.num_ranks}",
            f"{rank.held.parameters:,}",
            f"{rank.parameter_bytes / GIB:.2f}",
            *cells,
            f"{host:.1f}",
        )
    return table


def _grouped(found: Assessment) -> list[tuple[RankPlan, str]]:
    """Neighbouring stages alike in all figures share a row."""
    rows: list[tuple[RankPlan, int, int]] = []
    for rank in found.ranks:
        stage = rank.held.stage
        if rows and _same(rows[-1][0], rank):
            rows[-1] = (rows[-1][0], rows[-1][1], stage)
        else:
            rows.append((rank, stage, stage))
    return [(rank, str(first) if first == last else f"{first}-{last}") for rank, first, last in rows]


def _same(one: RankPlan, other: RankPlan) -> bool:
    alike = one.held.parameters == other.held.parameters
    return alike and all(abs(one.peak(phase) - other.peak(phase)) < 1e6 for phase in one.phases)


def _engines(console: Console, found: Assessment) -> None:
    engines = found.engines
    assert engines is not None
    where = "on the trainer's devices" if engines.shares_devices else f"on {engines.num_gpus} devices of their own"
    console.print(
        f"engines: {engines.count} of {engines.engine.tp} ranks {where}; of each rank {engines.weights / GIB:.1f} GiB "
        f"weights ({engines.engine.dtype}), {engines.cache / GIB:.1f} GiB cache: "
        f"{engines.generation.cached_tokens:,.0f} tokens, {engines.generation.batch} sequences at once, "
        f"{engines.generation.step_seconds * 1e3:.0f} ms a token"
    )


def _times(found: Assessment) -> Table:
    table = Table(title="seconds, from the efficiencies of the plan section", min_width=80)
    for name in ("of", "what", "seconds"):
        table.add_column(name, justify="right" if name == "seconds" else "left")
    for name, seconds in found.train_seconds.items():
        if seconds:
            table.add_row("an update", name, f"{seconds:,.1f}")
    of = f"a round of {found.job.updates_per_round} updates" if found.ranks else "a round"
    for name, seconds in found.phase_seconds.items():
        table.add_row(of, name, f"{seconds:,.1f}")
    return table


def _totals(console: Console, found: Assessment) -> None:
    job, total = found.job, found.seconds_per_update * found.job.updates
    hours = total / 3600 * found.num_gpus
    if not found.ranks:
        console.print(
            f"{job.updates:,} rounds of {job.samples_per_update:,} responses, {job.tokens_per_update:,.0f} tokens with "
            f"their prompts; {found.seconds_per_update:,.1f} s a round, {total / 86400:,.1f} days, {hours:,.0f} "
            "accelerator hours"
        )
        return
    console.print(
        f"{job.updates:,} updates of {job.tokens_per_update:,.0f} tokens ({found.micro_batches} micro-batches on each "
        f"data-parallel part), {found.flops_per_update:.3g} FLOPs; {found.seconds_per_update:,.1f} s an update, "
        f"{total / 86400:,.1f} days, {hours:,.0f} accelerator hours"
    )
    sent = ", ".join(f"{name} {nbytes / 1e9:,.1f}" for name, nbytes in found.traffic.items() if nbytes)
    if sent:
        console.print(f"network: GB that the busiest rank sends in an update: {sent}")
    console.print(
        f"disk: {found.disk['checkpoint_bytes'] / 1e9:,.0f} GB a checkpoint, "
        f"{found.disk['export_bytes'] / 1e9:,.0f} GB an export; host memory: {found.host_bytes() / GIB:,.0f} of "
        f"{found.config.cluster.host_memory_gib:g} GiB a machine; converting the checkpoint: "
        f"{found.conversion_bytes / GIB:.1f} GiB a worker"
    )
