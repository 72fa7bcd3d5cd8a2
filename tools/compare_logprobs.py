"""Compare a checkpoint's log-probs and gradients on Megatron, at any layout, with transformers on one process.

Starts the processes of the layout itself and prints one JSON line: `max_abs_diff` of the per-token log-probs,
`max_rel_grad_diff` over all parameters (norm of the difference over norm of transformers' gradient) with the
`worst_tensor`, and the `layout`. Exit code 0 where both are within the tolerances, 1 where not, 2 on bad input.

    python tools/compare_logprobs.py --hf DIR --layout tp=2,pp=2,ep=2
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from parity.case import Case, random_case

# fp32 sums over another order of ranks and kernels; measured differences are some 1e-6.
MAX_LOGPROB_DIFF = 1e-4
MAX_GRADIENT_DIFF = 1e-3


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint directory")
    parser.add_argument("--layout", default="1", help="axes and sizes, e.g. tp=2,pp=2,ep=2,etp=1,dp=1; 1: one process")
    parser.add_argument("--sequences", type=int, default=6, help="random sequences to compare on (default 6)")
    parser.add_argument("--max-length", type=int, default=48, help="their longest length in tokens (default 48)")
    parser.add_argument(
        "--chunk-tokens", type=int, default=0, help="tokens of a micro-batch (default: about two a rank)"
    )
    parser.add_argument(
        "--mtp-weight",
        type=float,
        default=0.3,
        help="weight of the loss two tokens ahead, where the checkpoint has MTP",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layer-spec", choices=("torch", "te"), default="torch")
    parser.add_argument(
        "--break-table", action="store_true", help="swap gate_proj and up_proj in the table, to see the comparison fail"
    )
    parser.add_argument(
        "--timeout", type=float, default=10, help="minutes after which a collective gives up (default 10)"
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # set for the processes this program starts
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    if args.work:
        return compare(args)
    import torch

    from r1mega.launch import local, supervise
    from r1mega.models import hf_fields
    from r1mega.parallel.layout import Layout

    try:
        layout = Layout.parse(args.layout)
        problems = layout.problems(hf_fields.read(args.hf).shape())
        if problems:
            raise ValueError("\n".join(problems))
        with tempfile.TemporaryDirectory(prefix="compare_logprobs-") as work:
            from parity import reference

            found = reference.answer(args.hf, make_case(args))
            torch.save({name: found[name] for name in ("logprobs", "gradients")}, Path(work) / "reference.pt")
            argv = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--work", work]
            result = supervise.run_world(
                argv, layout.world_size, log_dir=Path(work) / "logs", env=local.worker_env(args.device, 1)
            )
            if result.exit_code:
                print(result.message, file=sys.stderr)
                return result.exit_code
            answer = json.loads((Path(work) / "answer.json").read_text())
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(answer))
    good = answer["max_abs_diff"] <= MAX_LOGPROB_DIFF and answer["max_rel_grad_diff"] <= MAX_GRADIENT_DIFF
    return 0 if good else 1


def make_case(args: argparse.Namespace) -> Case:
    """The random sequences and the weights of their log-probs; the same in every process."""
    from r1mega.models import hf_fields

    return random_case(
        hf_fields.read(args.hf)["vocab_size"],
        num_sequences=args.sequences,
        max_length=args.max_length,
        seed=args.seed,
        mtp_weight=args.mtp_weight,
    )


def compare(args: argparse.Namespace) -> int:
    """One process of the layout: load, score, take the gradient; rank 0 compares and writes the answer."""
    from r1mega.parallel import groups
    from r1mega.parallel.layout import Layout

    layout = Layout.parse(args.layout)
    world = groups.initialize(layout, args.device, seed=args.seed, timeout_minutes=args.timeout)
    import torch

    from parity import breaks, ranks

    case = make_case(args)
    with breaks.broken("gate_up" if args.break_table else None):
        policy = ranks.build(args.hf, world, case, layer_spec=args.layer_spec)
        found = ranks.answer(policy, args.hf, case, chunk_tokens=args.chunk_tokens or 2 * args.max_length)
    if world.rank == 0:
        cell = ranks.compare(found, torch.load(Path(args.work) / "reference.pt"))
        cell |= {"layout": str(layout), "world_size": layout.world_size}
        (Path(args.work) / "answer.json").write_text(json.dumps(cell))
    groups.shutdown()
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
