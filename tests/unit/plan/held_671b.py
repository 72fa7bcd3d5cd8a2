"""DeepSeek-V3 at a layout: what a plan says ranks hold, beside what Megatron builds for ranks of the whole world.

Prints one JSON line. `python held_671b.py LAYOUT [--mtp] [--stage=N]`: all pipeline stages, or one of them.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from pathlib import Path

import torch

from r1mega.models import cards, hf_fields
from r1mega.parallel import groups
from r1mega.parallel.layout import Layout
from r1mega.plan import held


def megatron_bytes(fields: hf_fields.HfFields, layout: Layout, rank: int) -> tuple[int, int]:
    """Parameters and their bytes of the model of one rank of the world as it is, data-parallel copies and all."""
    world = groups.imagine(layout, rank)
    from r1mega.models.build import build_chunks
    from r1mega.models.hf_config import ModelOptions

    with held._unfilled():
        (model,) = build_chunks(fields, world, ModelOptions(params_dtype=torch.bfloat16))
    found = [(parameter.numel(), parameter.nbytes) for parameter in model.parameters()]
    groups.shutdown()
    return sum(count for count, _ in found), sum(nbytes for _, nbytes in found)


def main() -> None:
    layout = Layout.parse(sys.argv[1])
    fields = hf_fields.read(cards.folder("deepseek_v3_671b"), allow_fp8=True, drop_mtp="--mtp" not in sys.argv)
    assert not layout.problems(fields.shape())
    begin = time.perf_counter()
    chosen = [int(option.partition("=")[2]) for option in sys.argv[2:] if option.startswith("--stage=")]
    stages = chosen or range(layout.pp)
    parts = held.from_megatron(fields, layout, freezes_mtp=True, stages=stages)
    # Not ru_maxrss, which is that of whoever started this program where that was larger.
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    seconds = time.perf_counter() - begin
    draw, wrong = random.Random(0), []
    for part in parts:
        rank = part.stage * layout.per_stage + draw.randrange(layout.per_stage)
        if megatron_bytes(fields, layout, rank) != (part.parameters, 2 * part.parameters):
            wrong.append(rank)
    print(
        json.dumps(
            {
                "ranks": layout.world_size,
                "wrong": wrong,
                "table_agrees": [held.table_of(fields).held(layout, freezes_mtp=True)[stage] for stage in stages]
                == parts,
                "stages": [part.stage for part in parts],
                "elements": sum(part.distinct for part in parts),
                "gate_biases": sum(part.gate_biases for part in parts),
                "parameter_bytes": [2 * part.parameters for part in parts],
                "seconds": round(seconds, 1),
                "peak_bytes": peak,
            }
        )
    )


if __name__ == "__main__":
    main()
