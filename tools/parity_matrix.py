"""Every model family at every kind of layout, against transformers on one process: log-probs, gradients, updates.

Makes tiny checkpoints of random weights, starts the processes of each layout itself, and prints a line for each cell:
the largest difference of a response token's log-prob, of a gradient, of the norm by which gradients are clipped and,
after five Adam steps, of a parameter (norm of the difference over norm of the reference), with the worst tensor. Exit
code 0 where all cells are within the tolerances, 1 where not, 2 on bad input. The layer after the last (multi-token
prediction), which transformers lacks, is compared with a plain torch module written from the paper's equations.

    python tools/parity_matrix.py --json out.json
    python tools/parity_matrix.py --families qwen2 --layouts tp=2 cp=2
    python tools/parity_matrix.py --break expert_reduction gate_up --families deepseek_v3 --layouts tp=2
    python tools/parity_matrix.py --device cuda --share-gpu --layer-spec te        # all layouts on one GPU
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from parity import cells, stand_ins
from parity.breaks import NAMES as BREAKS


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all cells there")
    parser.add_argument("--families", nargs="+", choices=cells.FAMILIES, default=cells.FAMILIES, metavar="NAME")
    parser.add_argument(
        "--layouts", nargs="+", default=None, metavar="LAYOUT", help="e.g. tp=2,pp=2 cp=2 (default: the whole matrix)"
    )
    parser.add_argument(
        "--levers",
        choices=("with", "without", "only"),
        default="with",
        help="the cells of recomputation and the like (default: with, unless --layouts chooses others)",
    )
    parser.add_argument("--core", action="store_true", help="only the cells that `make test` compares")
    parser.add_argument(
        "--break",
        dest="broken",
        nargs="+",
        choices=BREAKS,
        default=[],
        metavar="NAME",
        help=f"make each of these known mistakes in each cell, to see it turn red: {', '.join(BREAKS)}",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--share-gpu", action="store_true", help="all processes on the GPUs there are, over the host")
    parser.add_argument("--layer-spec", choices=("torch", "te"), default="torch")
    parser.add_argument(
        "--timeout", type=float, default=5, help="minutes after which a collective gives up (default 5)"
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # set for the processes this program starts
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.work:
        return run_rank(args)
    try:
        planned = cells.plan(
            args.families, args.layouts, args.levers, args.broken, core=args.core, layer_spec=args.layer_spec
        )
        with tempfile.TemporaryDirectory(prefix="parity_matrix-") as work:
            found = run_worlds(args, planned, Path(work))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    compared = [cell for cell in found if "refused" not in cell]
    red = [cell for cell in compared if not cells.is_green(cell)]
    print(f"{len(compared)} cells compared, {len(red)} red; {len(found) - len(compared)} refused")
    return 1 if red or not compared else 0


def run_worlds(args: argparse.Namespace, planned: list[dict], work: Path) -> list[dict]:
    """Make the checkpoints and the references, then run the cells of each number of processes in one world."""
    from r1mega.launch import local, supervise
    from r1mega.parallel.layout import Layout

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print("making checkpoints and references", flush=True)
    shapes = cells.prepare(work, args.families)
    reasons = [cells.refusals(cell, shapes, args.layer_spec, args.device) for cell in planned]
    refused = [cell | {"refused": why} for cell, why in zip(planned, reasons, strict=True) if why]
    for cell in refused:
        print(f"{cells.title(cell)} refused: {cell['refused'][0]}", flush=True)
    runnable = [cell for cell, why in zip(planned, reasons, strict=True) if not why]
    print(cells.HEADER, flush=True)
    for world_size in sorted({Layout.parse(cell["layout"]).world_size for cell in runnable}):
        mine = [cell for cell in runnable if Layout.parse(cell["layout"]).world_size == world_size]
        (work / "cells.json").write_text(json.dumps(mine))
        argv = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--work", str(work)]
        result = supervise.run_world(
            argv, world_size, log_dir=work / f"logs-{world_size}", env=local.worker_env(args.device, 1)
        )
        if result.exit_code:
            raise ValueError(result.message)
    done = [json.loads(line) for line in (work / "found.jsonl").read_text().splitlines()] if runnable else []
    return done + refused


def run_rank(args: argparse.Namespace) -> int:
    """One process: all cells of this world's size, one after another; rank 0 compares and prints."""
    import gc

    from r1mega.parallel import groups

    if args.device == "cpu":
        stand_ins.install()
    for cell in json.loads((args.work / "cells.json").read_text()):
        run_cell(args, cell)
        groups.release()
        gc.collect()  # the policy holds its groups in a circle
    groups.shutdown()
    return 0


def run_cell(args: argparse.Namespace, cell: dict) -> None:
    """Join a world cut as the cell's layout says, measure, compare."""
    from r1mega.parallel import groups
    from r1mega.parallel.layout import Layout

    layout = Layout.parse(cell["layout"])
    world = groups.initialize(layout, args.device, seed=0, timeout_minutes=args.timeout, share_gpu=args.share_gpu)
    import torch

    from parity import breaks, ranks

    path = args.work / cell["family"]
    case = cells.case_of(path, cell)
    with breaks.broken(cell["broken"]):
        policy = ranks.build(path, world, case, layer_spec=args.layer_spec, **cell["options"])
        found = ranks.answer(policy, path, case, chunk_tokens=100)
        policy.close()
    if world.rank == 0:
        reference = torch.load(args.work / cells.reference_name(cell))
        cell |= ranks.compare(found, reference) | {"world_size": layout.world_size}
        with (args.work / "found.jsonl").open("a") as file:
            file.write(json.dumps(cell) + "\n")
        print(cells.line(cell), flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
