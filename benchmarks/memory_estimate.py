"""What `r1mega plan` says of the cases of `benchmarks.memory`, beside what was measured: a table with each error.

    python -m benchmarks.memory_estimate memory.jsonl

Measured are bytes of torch's allocator, less what it held before the case; estimated is the same, without the slack and
overhead that a plan adds. Exit code 1 where an error of a training or log-probs peak is above 15%.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.memory import lines
from r1mega.models.hf_fields import parse
from r1mega.parallel.layout import Layout
from r1mega.plan.activations import Compute, Layers, Pack
from r1mega.plan.held import Table
from r1mega.plan.memory import StageMemory, States

TOLERANCE = 0.15


def stage_of(case: dict[str, Any], micro_batches: int, *, has_te: bool) -> StageMemory:
    """The one stage of a case, as a plan sees it."""
    fields = parse(case["model"])
    itemsize = {"fp32": 4, "bf16": 2}[case["params"]]
    compute = Compute(
        layer_spec=case["layer_spec"],
        itemsize=itemsize,
        fp8=case["fp8"],
        recompute=case["recompute"],
        recompute_modules=tuple(case["recompute_modules"]),
        recompute_num_layers=case["recompute_num_layers"],
        chunk_tokens=case["chunk_tokens"],
    )
    states = States(itemsize, {"fp32": 4, "bf16": 2}[case["moments"]], steps_in_place=has_te)
    (held,) = Table(fields).held(Layout(), freezes_mtp=False)
    pack = Pack.of(case["lengths"], sum(length - length // 4 for length in case["lengths"]))
    return StageMemory(held, Layers(fields, Layout(), compute), states, pack, micro_batches)


def estimates(stage: StageMemory) -> dict[tuple[str, str], float]:
    """(phase, peak or after) -> bytes."""
    states = sum(stage.on_device.values())
    # The moments come with the first step, and with them, where they are bf16, what master weights have besides.
    later = stage.optimizer if stage.states.moments == 2 else 2 * stage.states.moments * sum(stage.shares)
    worst, step = sum(stage.train().values()) - states, stage.states.step * max(stage.shares)
    passes = max(stage.in_flight() + stage.backward(), stage.in_flight() + stage.head_backward())
    forward = sum(stage.logprobs().values())
    return {
        ("load", "after"): states - later - stage.fp8_weights,
        ("forward_backward_1", "peak"): states - later + passes,
        ("forward_backward_2", "peak"): states + passes,
        ("forward_backward_2", "after"): states,
        ("optimizer_step_2", "peak"): states + step,
        ("logprobs", "peak"): forward,
        ("reference_logprobs", "peak"): sum(stage.logprobs(reference=True).values()),
        ("hand_over", "after"): stage.fp8_weights,
        ("logprobs_offloaded", "peak"): forward - states + stage.weights + stage.fp8_weights,
        ("train", "peak"): states + worst,
    }


def compared(line: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """(phase, peak or after, measured, estimated) of one case."""
    measured, before = line["bytes"], line["bytes"]["before"]["after"]
    for (phase, kind), estimate in estimates(
        stage_of(line["case"], line["micro_batches"], has_te=bool(line["transformer_engine"]))
    ).items():
        if phase == "train":
            found = max(measured[name]["peak"] for name in ("forward_backward_2", "optimizer_step_2"))
        else:
            found = measured[phase][kind]
        yield phase, kind, float(found - before), estimate


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    worst = 0.0
    print(f"{'case':<26}{'phase':<22}{'':<7}{'measured':>10}{'estimated':>11}{'error':>8}   GB")
    for line in lines(Path(sys.argv[1])):
        for phase, kind, measured, estimate in compared(line):
            error = estimate / measured - 1 if measured > 5e7 else 0.0
            if kind == "peak":
                worst = max(worst, abs(error))
            print(f"{line['name']:<26}{phase:<22}{kind:<7}{measured / 1e9:>10.3f}{estimate / 1e9:>11.3f}{error:>+8.1%}")
    print(f"largest error of a peak: {worst:.1%}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
