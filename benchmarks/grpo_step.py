"""Seconds of one GRPO step: r1mega and TRL's GRPOTrainer take turns on the CPU.

    python -m benchmarks.grpo_step --family qwen2 --lengths both --steps 10 --json step.json

Both systems have the same random checkpoint of about one million parameters, the same 8 prompts x 16 samples, the
same forced completion lengths, the same reward, fp32, a KL term (so a reference forward), one update a rollout and no
gradient checkpointing. `--lengths equal` is 48 tokens each; `mixed` is drawn log-uniformly from 8 to 256 tokens.

Each system has one process of its own, and they are stepped in turn (A B A B ...), so that what changes on the machine
changes for both; medians are over steps, and the comparison is the median of the ratios of neighbouring steps.

Run it on an idle machine. With as many threads as cores and other busy processes, the equal step of qwen2 has been
seen at 6 to 58 s with TRL while r1mega's stayed near 2 s, where both take 1.5 s on an idle machine: such ratios say
nothing of either system. The range of the ratios is printed beside their median; with `--threads 1` both slow alike.
TRL is an extra: `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

from benchmarks.isolated import PEERS, IsolatedPeer
from benchmarks.models import FAMILIES, ModelSize, make_model
from benchmarks.workload import PHASES, REGIMES, Peer, StepReport, make_lengths, make_prompts

PACKAGES = ("torch", "transformers", "megatron-core", "trl")


@dataclass(frozen=True)
class Case:
    """One model family under one regime of lengths: the steps each system took, in order, and its peak memory (bytes).

    Memory is the resident size of the whole process, Python and libraries included.
    """

    family: str
    regime: str
    size: ModelSize
    steps: dict[str, list[StepReport]]
    peak_memory: dict[str, int]


def take_turns(peers: Sequence[Peer], num_steps: int, num_warmup: int) -> dict[str, list[StepReport]]:
    """Step every peer in turn, `num_warmup` rounds unrecorded and `num_steps` recorded; reports by name."""
    for _ in range(num_warmup):
        for peer in peers:
            peer.step()
    steps: dict[str, list[StepReport]] = {peer.name: [] for peer in peers}
    for _ in range(num_steps):
        for peer in peers:
            steps[peer.name].append(peer.step())
    return steps


def run_case(family: str, regime: str, systems: Sequence[str], options: argparse.Namespace) -> Case:
    """Make the checkpoint, start the systems on it, and let them take turns."""
    lengths, prompts = make_lengths(regime, options.seed), make_prompts(options.seed)
    peers: list[IsolatedPeer] = []
    with tempfile.TemporaryDirectory(prefix="grpo-step-") as folder:
        size = make_model(family, Path(folder), options.seed)
        try:
            for system in systems:
                arguments = {"model_dir": Path(folder), "prompts": prompts, "lengths": lengths, "kl": options.kl}
                peers.append(IsolatedPeer(system, arguments | {"threads": options.threads, "seed": options.seed}))
            steps = take_turns(peers, options.steps, options.warmup)
        finally:
            for peer in peers:
                peer.close()
    memory = {peer.name: peer.peak_memory for peer in peers}
    return Case(family=family, regime=regime, size=size, steps=steps, peak_memory=memory)


def median_report(steps: Sequence[StepReport]) -> dict[str, float]:
    """Medians over steps: `seconds`, `tokens_per_second` and the seconds of each phase."""
    return {
        "seconds": median(step.seconds for step in steps),
        "tokens_per_second": median(step.tokens_per_second for step in steps),
        **{phase: median(step.phases[phase] for step in steps) for phase in PHASES},
    }


def speed_ratios(case: Case) -> list[float]:
    """How many times as many tokens per second r1mega makes as TRL, step by step; empty unless both ran."""
    if set(case.steps) != set(PEERS):
        return []
    pairs = zip(case.steps["r1mega"], case.steps["trl"], strict=True)
    return [ours.tokens_per_second / theirs.tokens_per_second for ours, theirs in pairs]


def table(case: Case) -> str:
    """The case as text: one row for each system, in seconds."""
    tokens = next(iter(case.steps.values()))[0].completion_tokens
    header = ["system", "tok/s", "step", *(phase.replace("_", " ") for phase in PHASES), "MiB"]
    rows = [header]
    for system, steps in case.steps.items():
        medians = median_report(steps)
        seconds = [f"{medians[key]:.3f}" for key in ("seconds", *PHASES)]
        rows.append([system, f"{medians['tokens_per_second']:.0f}", *seconds, str(case.peak_memory[system] >> 20)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    title = f"{case.family}, {case.regime} lengths: {tokens} completion tokens a step, {case.size.total:,} parameters"
    if case.size.active != case.size.total:
        title += f" ({case.size.active:,} active)"
    ratios = speed_ratios(case)
    if ratios:
        lines.append(
            f"r1mega / trl, tokens per second: {median(ratios):.2f} (of {len(ratios)} pairs of steps: "
            f"{min(ratios):.2f} to {max(ratios):.2f})"
        )
    return "\n".join([title, *lines])


def to_json(cases: Sequence[Case], options: argparse.Namespace) -> dict[str, object]:
    """Everything measured, and what it was measured with."""
    installed = {}
    for package in PACKAGES:
        if package != "trl" or "trl" in options.systems:
            installed[package] = version(package)
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "python": platform.python_version(),
        "versions": installed,
        "threads": options.threads,
        "kl": options.kl,
        "seed": options.seed,
        "cases": [
            {
                **asdict(case),
                "medians": {system: median_report(steps) for system, steps in case.steps.items()},
                "speed_ratios": speed_ratios(case),
            }
            for case in cases
        ],
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grpo_step", description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=(*FAMILIES, "both"), default="both")
    parser.add_argument("--lengths", choices=(*REGIMES, "both"), default="both")
    parser.add_argument("--only", choices=tuple(PEERS), help="run this system alone")
    parser.add_argument("--steps", type=int, default=10, help="recorded steps of each system in each case")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--kl", type=float, default=0.001, help="KL coefficient")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and lengths")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every step's numbers there")
    options = parser.parse_args(arguments)
    for name, least in (("steps", 1), ("warmup", 0), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: got {getattr(options, name)}, must be {least} or more")
    if options.kl <= 0:
        parser.error(f"--kl: got {options.kl}, must be above 0: without it there is no reference forward to time")
    options.systems = (options.only,) if options.only else tuple(PEERS)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print a table for each case."""
    options = parse(arguments)
    families = FAMILIES if options.family == "both" else (options.family,)
    regimes = REGIMES if options.lengths == "both" else (options.lengths,)
    cases = []
    for family in families:
        for regime in regimes:
            cases.append(run_case(family, regime, options.systems, options))
            print(table(cases[-1]), end="\n\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(to_json(cases, options), indent=1) + "\n")


if __name__ == "__main__":
    main()
