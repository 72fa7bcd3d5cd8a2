#!/usr/bin/env python
"""Show what publishing a model's weights from a trainer to its engines moves, rank by rank, before any is started.

    python tools/publish_plan.py --hf DIR --trainer tp=2,pp=4,ep=8,dp=8 --engines 4 --engine tp=8,ep=8

--trainer is a layout of the trainer as in parallel.*: tp pp ep etp dp cp vpp, and stages=N+N+... for uneven stages.
--engine is one engine: tp, ep and attn_dp within tp, dp for whole copies; it may be given again for engines of another
shape. Only config.json is read. The table compares each engine rank's bytes with what it needs and with being sent
everything, and the most loaded trainer rank of each stage with the stage's mean.
Exit code 0: shown; 2: the layouts do not fit the model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--hf", type=Path, required=True, metavar="DIR", help="a checkpoint, or its config.json")
    top.add_argument("--trainer", required=True, metavar="LAYOUT", help="e.g. tp=2,pp=2,ep=2; 1 for one process")
    top.add_argument("--engine", action="append", required=True, metavar="LAYOUT", help="e.g. tp=8,ep=8; 1: one rank")
    top.add_argument("--engines", type=int, default=1, metavar="N", help="engines of each shape (default: 1)")
    top.add_argument("--dtype", choices=("bf16", "fp32", "fp8"), default="bf16", help="that the engines serve")
    top.add_argument("--bucket-mib", type=int, default=1024, metavar="N", help="of one bucket (default: %(default)s)")
    top.add_argument("--no-mtp", action="store_true", help="leave out the multi-token-prediction layer")
    return top


def main() -> int:
    """Plan and print."""
    arguments = parser().parse_args()
    from r1mega.models import hf_fields
    from r1mega.parallel.layout import Layout
    from r1mega.weights.engine_layout import EngineLayout
    from r1mega.weights.plan import PublishPlan
    from r1mega.weights.traffic import traffic_of

    try:
        plan = PublishPlan(
            hf_fields.read(arguments.hf if arguments.hf.is_dir() else arguments.hf.parent, allow_fp8=True),
            Layout.parse(arguments.trainer),
            [EngineLayout.parse(text) for text in arguments.engine for _ in range(arguments.engines)],
            dtype=arguments.dtype,
            bucket_bytes=arguments.bucket_mib << 20,
            with_mtp=not arguments.no_mtp,
        )
    except ValueError as error:
        print(f"publish_plan: {error}", file=sys.stderr)
        return 2
    print("\n".join(traffic_of(plan).lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
