"""One rank's side of the comparison: the same case through Megatron at a layout, and the differences."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from parity.case import Case
from r1mega.models import hf_fields
from r1mega.models.hf_config import ModelOptions
from r1mega.models.hf_io import CheckpointReader
from r1mega.parallel.groups import Groups
from r1mega.train import routes
from r1mega.train.batch import MicroBatch, PackItem
from r1mega.train.optimizer import AdamSettings
from r1mega.train.policy import MegatronPolicy


def build(path: Path, world: Groups, case: Case, **options) -> MegatronPolicy:
    """The policy of a checkpoint, not loaded yet. `options` are those of ModelOptions and a few others'."""
    options["params_dtype"] = getattr(torch, options.pop("params_dtype", "float32"))
    chunk_tokens = options.pop("logprob_chunk_tokens", None)
    overlap = {name: options.pop(name) for name in list(options) if name.startswith("overlap_")}
    chosen = ModelOptions(
        router_bias_update_rate=case.bias_update_rate, router_balance_coef=case.balance_coef, **options
    )
    beta1, beta2 = case.betas
    adam = AdamSettings(lr=case.lr, beta1=beta1, beta2=beta2, weight_decay=0.0, clip_grad=case.clip_grad, **overlap)
    policy = MegatronPolicy(hf_fields.read(path), world, chosen, adam)
    policy.logprob_chunk_tokens = chunk_tokens or policy.logprob_chunk_tokens
    return policy


def answer(policy: MegatronPolicy, path: Path, case: Case, *, chunk_tokens: int) -> dict:
    """What `reference.answer` gives, of Megatron. Every rank calls it; all get the same."""
    policy.load(CheckpointReader(path))
    items = [PackItem(tokens, response) for tokens, response in case.sequences]
    if case.choices is not None:
        items = routes.deal(items, case.choices, policy.fields, policy.groups, piece_bytes=1 << 9)
    plan = policy.plan(items, chunk_tokens)

    def weighted_sum(logprobs_R: Tensor, _entropy_R: Tensor, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        weight_R = torch.tensor([w for sample in batch.samples for w in case.weights[sample]], device=logprobs_R.device)
        return (logprobs_R * weight_R).sum(), {}

    found: dict = {"logprobs": policy.logprobs(items, plan), "norms": []}
    mtp_weight = case.mtp_weight if policy.fields.num_mtp_layers else 0.0
    for update in range(max(1, case.updates)):
        policy.forward_backward(items, plan, weighted_sum, mtp_weight=mtp_weight)
        if update == 0:
            found["gradients"] = {name: gradient.clone() for name, gradient in policy.gradients()}
        if case.updates:
            found["norms"].append(policy.optimizer_step(case.lr))
    found["weights"] = {name: tensor.float().clone() for name, tensor in policy.export_hf()}
    return found


def compare(ours: dict, theirs: dict) -> dict:
    """The differences of an answer from the reference's, each with the tensor where it is largest."""
    gradient, where = _worst(_relative(ours["gradients"], theirs["gradients"]))
    cell = {
        "max_abs_diff": max(
            float((a.float() - b).abs().max()) for a, b in zip(ours["logprobs"], theirs["logprobs"], strict=True)
        ),
        "max_rel_grad_diff": gradient,
        "worst_tensor": where,
        "parameters": len(theirs["gradients"]),
    }
    if theirs.get("norms"):
        pairs = zip(ours["norms"], theirs["norms"], strict=True)
        cell["max_rel_norm_diff"] = max(abs(a - b) / b for a, b in pairs)
    if "weights" in theirs:
        trained = {name: ours["weights"][name] for name in theirs["weights"]}
        cell["max_rel_weight_diff"], cell["worst_weight"] = _worst(_relative(trained, theirs["weights"]))
        cell["max_bias_diff"] = max(
            (float((ours["weights"][name].cpu() - bias).abs().max()) for name, bias in theirs["biases"].items()),
            default=0.0,
        )
    return cell


def _relative(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Per tensor, the norm of the difference over the norm of the reference; a missing tensor counts as infinite."""
    differences = {name: float("inf") for name in set(ours) ^ set(theirs)}
    # An expert no token was routed to has gradient zero on both sides: measured against the median tensor instead.
    norms = {name: float(tensor.norm()) for name, tensor in theirs.items()}
    typical = sorted(norms.values())[len(norms) // 2]
    for name in set(ours) & set(theirs):
        difference = float((ours[name].cpu().float() - theirs[name]).norm())
        differences[name] = difference / (norms[name] if norms[name] > 1e-6 * typical else typical)
    return differences


def _worst(differences: dict[str, float]) -> tuple[float, str]:
    name = max(differences, key=differences.__getitem__)
    return differences[name], name
