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
import random
import sys
import tempfile
from pathlib import Path

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
    from r1mega.launch import local, supervise
    from r1mega.models import hf_fields
    from r1mega.parallel.layout import Layout

    try:
        layout = Layout.parse(args.layout)
        problems = layout.problems(hf_fields.read(args.hf).shape())
        if problems:
            raise ValueError("\n".join(problems))
        with tempfile.TemporaryDirectory(prefix="compare_logprobs-") as work:
            write_reference(args, Path(work))
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


def make_sequences(vocab_size: int, args: argparse.Namespace) -> tuple[list[tuple[list[int], int]], list[list[float]]]:
    """Random (tokens, response length) of unequal lengths, and a weight for each response token's log-prob."""
    rng = random.Random(args.seed)
    sequences, weights = [], []
    for _ in range(args.sequences):
        length = rng.randint(max(2, args.max_length // 4), args.max_length)
        response = rng.randint(1, length - 1)
        sequences.append(([rng.randrange(vocab_size) for _ in range(length)], response))
        weights.append([rng.uniform(-1, 1) for _ in range(response)])
    return sequences, weights


def write_reference(args: argparse.Namespace, work: Path) -> None:
    """transformers' log-probs, and the gradient of their weighted sum, by its own loader and torch's autograd."""
    import torch
    from transformers import AutoModelForCausalLM

    from r1mega.rollout.hf_weights import checkpoint_tensors

    model = AutoModelForCausalLM.from_pretrained(args.hf, dtype=torch.float32, attn_implementation="eager")
    # transformers gives the padding token's embedding no gradient; in training it is a token like any other.
    model.get_input_embeddings().padding_idx = None
    sequences, weights = make_sequences(model.config.vocab_size, args)
    logprobs = []
    for (tokens, response), weight in zip(sequences, weights, strict=True):
        logits = model(torch.tensor([tokens])).logits[0, -response - 1 : -1]
        logprobs.append(logits.log_softmax(-1).gather(1, torch.tensor(tokens[-response:])[:, None])[:, 0])
        (logprobs[-1] * torch.tensor(weight)).sum().backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients |= {hf: part.clone() for hf, part in checkpoint_tensors(name, parameter.grad)}
    torch.save({"logprobs": [values.detach() for values in logprobs], "gradients": gradients}, work / "reference.pt")


def compare(args: argparse.Namespace) -> int:
    """One process of the layout: load, score, take the gradient; rank 0 compares and writes the answer."""
    from r1mega.algo.packing import plan_batch
    from r1mega.models import hf_fields
    from r1mega.parallel import groups
    from r1mega.parallel.layout import Layout

    layout = Layout.parse(args.layout)
    world = groups.initialize(layout, args.device, seed=args.seed, timeout_minutes=args.timeout)
    import torch

    from r1mega.models.hf_config import ModelOptions
    from r1mega.models.hf_io import CheckpointReader
    from r1mega.train.batch import PackItem
    from r1mega.train.optimizer import AdamSettings
    from r1mega.train.policy import MegatronPolicy

    fields = hf_fields.read(args.hf)
    policy = MegatronPolicy(fields, world, ModelOptions(layer_spec=args.layer_spec), AdamSettings(lr=1e-3))
    if args.break_table:
        break_table(policy)
    policy.load(CheckpointReader(args.hf))
    sequences, weights = make_sequences(fields["vocab_size"], args)
    items = [PackItem(tokens, response) for tokens, response in sequences]
    chunk = args.chunk_tokens or 2 * args.max_length
    plan = plan_batch([len(item.tokens) for item in items], dp=layout.dp, max_tokens=chunk)
    logprobs = policy.logprobs(items, plan)

    def weighted_sum(logprobs_R, _entropy_R, batch):
        weight_R = torch.tensor([w for sample in batch.samples for w in weights[sample]], device=logprobs_R.device)
        return (logprobs_R * weight_R).sum(), {}

    policy.forward_backward(items, plan, weighted_sum)
    gradients = dict(policy.gradients())
    if world.rank == 0:
        reference = torch.load(Path(args.work) / "reference.pt")
        worst_logprob = max(
            float((ours - theirs).abs().max()) for ours, theirs in zip(logprobs, reference["logprobs"], strict=True)
        )
        differences = gradient_differences(gradients, reference["gradients"])
        worst = max(differences, key=differences.__getitem__)
        answer = {
            "max_abs_diff": worst_logprob,
            "max_rel_grad_diff": differences[worst],
            "worst_tensor": worst,
            "layout": str(layout),
            "world_size": layout.world_size,
            "parameters": len(differences),
        }
        (Path(args.work) / "answer.json").write_text(json.dumps(answer))
    groups.shutdown()
    return 0


def break_table(policy) -> None:
    """Swap gate_proj and up_proj wherever the table joins them: the names still fit, the model is another."""
    from dataclasses import replace

    from r1mega.models.param_map import GateUp

    sharded = policy.sharded
    swapped = {
        id(slot): replace(slot, tensors=slot.tensors[::-1]) if isinstance(slot.op, GateUp) else slot
        for slot in sharded.slots
    }
    sharded.slots = list(swapped.values())
    sharded.local = [(swapped[id(slot)], shard, parameter) for slot, shard, parameter in sharded.local]


def gradient_differences(ours: dict, theirs: dict) -> dict[str, float]:
    """Per tensor, the norm of the difference over the norm of the reference; a missing tensor counts as infinite."""
    differences = {name: float("inf") for name in set(ours) ^ set(theirs)}
    # An expert no token was routed to has gradient zero on both sides: measured against the median tensor instead.
    norms = {name: float(gradient.norm()) for name, gradient in theirs.items()}
    typical = sorted(norms.values())[len(norms) // 2]
    for name in set(ours) & set(theirs):
        difference = float((ours[name].cpu().float() - theirs[name]).norm())
        differences[name] = difference / (norms[name] if norms[name] > 1e-6 * typical else typical)
    return differences


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
