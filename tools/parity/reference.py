"""What Megatron is compared with: transformers on one process, torch's autograd and torch's AdamW."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from parity.case import Case
from parity.mtp_reference import MtpReference, split_experts


class PlainReference:
    """A checkpoint in transformers, fp32; its weights and gradients by their names in the checkpoint."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        # transformers gives the padding token's embedding no gradient; in training it is a token like any other.
        self.model.get_input_embeddings().padding_idx = None

    def main_logprobs(self, tokens: list[int]) -> Tensor:
        """[T - 1] log-prob of each token after the first."""
        logits = self.model(torch.tensor([tokens])).logits[0, :-1]
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

    def parameters(self) -> list[torch.nn.Parameter]:
        """All that is trained."""
        return [parameter for _, parameter in self.model.named_parameters()]

    def modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """All modules, by their names in the checkpoint."""
        yield from self.model.named_modules()

    def weights(self) -> dict[str, Tensor]:
        """Every parameter by its name in the checkpoint."""
        return {
            name: parameter.detach()[place]
            for whole, parameter in self.model.named_parameters()
            for name, place in split_experts(whole, parameter)
        }

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of every parameter by its name in the checkpoint."""
        return {
            name: parameter.grad[place]
            for whole, parameter in self.model.named_parameters()
            for name, place in split_experts(whole, parameter)
        }


@dataclass
class _Gate:
    """A gate of the reference and what it chose for the sequence at hand and for all of them."""

    module: torch.nn.Module
    affinities_TE: list[Tensor] = field(default_factory=list)
    tokens_E: Tensor | None = None
    given_TK: Tensor | None = None  # the experts of all tokens but the last

    def replay(self, _module, _inputs, outputs) -> tuple[Tensor, Tensor, Tensor] | None:
        """DeepSeek-V3's Eq. 12-13 for the experts given: their affinities, normalised among themselves and scaled."""
        if self.given_TK is None:
            return None
        logits_TE, _, own_TK = outputs
        chosen_TK = torch.cat([self.given_TK.long(), own_TK[-1:]])
        affinity_TK = logits_TE.sigmoid().gather(1, chosen_TK)
        weight_TK = affinity_TK / affinity_TK.sum(1, keepdim=True) * self.module.routed_scaling_factor
        return logits_TE, weight_TK, chosen_TK

    def see(self, _module, _inputs, outputs) -> None:
        logits_TE, _, chosen_TK = outputs
        self.affinities_TE.append(logits_TE.sigmoid())
        counts = torch.bincount(chosen_TK.flatten(), minlength=logits_TE.shape[1])
        self.tokens_E = counts if self.tokens_E is None else self.tokens_E + counts


def open_reference(path: Path):
    """The reference of a checkpoint, with or without the multi-token-prediction layer."""
    config = json.loads((path / "config.json").read_text())
    has_mtp = config["model_type"] == "deepseek_v3" and config.get("num_nextn_predict_layers", 0) > 0
    return MtpReference(path) if has_mtp and _holds_mtp(path, config) else PlainReference(path)


def answer(path: Path, case: Case) -> dict:
    """Log-probs, gradients, their norm before each of `case.updates` steps, and the weights after them."""
    reference = open_reference(path)
    gates = {}
    for name, module in reference.modules():
        if hasattr(module, "e_score_correction_bias"):
            gates[name] = _Gate(module)
            module.register_forward_hook(gates[name].replay)  # the next one sees what it makes of the outputs
            module.register_forward_hook(gates[name].see)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=case.lr, betas=case.betas, eps=1e-8, weight_decay=0.0)
    found: dict = {"norms": []}
    for update in range(max(1, case.updates)):
        optimizer.zero_grad(set_to_none=False)
        logprobs = _backward(reference, case, gates)
        if update == 0:
            found["logprobs"] = logprobs
            found["gradients"] = {name: gradient.clone() for name, gradient in reference.gradients().items()}
        if case.updates:
            found["norms"].append(float(torch.nn.utils.clip_grad_norm_(reference.parameters(), case.clip_grad)))
            optimizer.step()
            _move_biases(gates, case.bias_update_rate)
    found["weights"] = {name: weight.clone() for name, weight in reference.weights().items()}
    found["biases"] = {f"{name}.e_score_correction_bias": g.module.e_score_correction_bias for name, g in gates.items()}
    return found


def _backward(reference, case: Case, gates: dict[str, _Gate]) -> list[Tensor]:
    """Accumulate the gradient of the case's loss; returns the response tokens' log-probs."""
    logprobs = []
    for at, ((tokens, response), weight) in enumerate(zip(case.sequences, case.weights, strict=True)):
        if case.choices is not None:
            for layer, gate in enumerate(gates.values()):
                gate.given_TK = case.choices[at][:, layer]
        logprobs.append(reference.main_logprobs(tokens)[-response:])
        loss = (logprobs[-1] * torch.tensor(weight)).sum()
        if case.balance_coef:
            loss = loss + _balance_loss(reference, case, gates)
        for gate in gates.values():
            gate.affinities_TE.clear()
        if case.mtp_weight and isinstance(reference, MtpReference):
            counted = {name: gate.tokens_E for name, gate in gates.items()}
            further = reference.logprobs(tokens)
            loss = loss - case.mtp_weight * further[-min(response, len(further)) :].sum()
            mtp_gates = {name: gate for name, gate in gates.items() if reference.is_mtp(name)}
            if case.balance_coef:
                loss = loss + _balance_loss(reference, case, mtp_gates)
            for name, gate in gates.items():
                if name not in mtp_gates:
                    gate.tokens_E = counted[name]  # the model ran a second time to feed the layer after it
                gate.affinities_TE.clear()
        loss.backward()
    return [values.detach() for values in logprobs]


def _balance_loss(reference, case: Case, gates: dict[str, _Gate]) -> Tensor:
    """V3 Eq. 17-20 of the sequence the gates saw last, over the number of sequences."""
    total = torch.zeros(())
    top_k = reference.model.config.num_experts_per_tok
    for gate in gates.values():
        if not gate.affinities_TE:
            continue
        affinity_TE = gate.affinities_TE[-1]
        length, experts = affinity_TE.shape
        chosen_TE = torch.zeros_like(affinity_TE).scatter(1, affinity_TE.topk(top_k, dim=1).indices, 1.0)
        fraction_E = chosen_TE.sum(0) * experts / (top_k * length)
        share_E = (affinity_TE / affinity_TE.sum(1, keepdim=True)).mean(0)
        total = total + (fraction_E * share_E).sum()
    return case.balance_coef * total / len(case.sequences)


@torch.no_grad()
def _move_biases(gates: dict[str, _Gate], rate: float) -> None:
    """V3 section 2.1.2: an overloaded expert's bias falls by gamma, an underloaded one's rises."""
    for gate in gates.values():
        if gate.tokens_E is not None:
            load_E = gate.tokens_E.float()
            gate.module.e_score_correction_bias += rate * torch.sign(load_E.mean() - load_E)
            gate.tokens_E = None


def _holds_mtp(path: Path, config: dict) -> bool:
    from r1mega.models import hf_fields

    return hf_fields.read(path).num_mtp_layers > 0
