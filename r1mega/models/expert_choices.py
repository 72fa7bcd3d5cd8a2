"""Which experts the tokens of a sequence were sent to, as an engine tells it and as a trainer keeps it."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from itertools import combinations

import torch

from r1mega.models.hf_fields import HfFields


@dataclass(frozen=True)
class ExpertChoices:
    """The shape of the choices of one model: `top_k` of `num_experts` in each of its MoE layers.

    SGLang tells of all `num_layers` decoder layers, and leaves those before `first_moe_layer`, the dense ones, at zero;
    kept are the MoE layers alone. The multi-token-prediction layer is no part of it.
    """

    num_layers: int
    first_moe_layer: int
    num_experts: int
    top_k: int

    @staticmethod
    def of(fields: HfFields) -> ExpertChoices:
        """The shape of a model that has experts."""
        layers = fields.moe_layers
        return ExpertChoices(layers.stop, layers.start, fields["n_routed_experts"], fields["num_experts_per_tok"])

    @property
    def dtype(self) -> torch.dtype:
        """The smallest type that holds an expert's number: a byte up to 256 experts."""
        return torch.uint8 if self.num_experts <= 256 else torch.int16

    def decode(self, text: str, num_tokens: int) -> torch.Tensor:
        """[num_tokens, MoE layers, top_k] of `dtype`, from base64 of int32 [num_tokens, num_layers, top_k].

        Raises ValueError where the text is none of it, an expert does not exist, or a token has the same one twice: an
        engine that has not noted a token's experts says zero for all of them.
        """
        try:
            # Not validated, which takes twice as long: what is no base64 shows as missing bytes.
            raw = bytearray(base64.b64decode(text))
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"routed_experts: not base64 ({error})") from None
        shape = (num_tokens, self.num_layers, self.top_k)
        if len(raw) != 4 * num_tokens * self.num_layers * self.top_k:
            raise ValueError(f"routed_experts: {len(raw)} bytes, not those of int32 {list(shape)}")
        if not raw:
            return torch.empty((0, self.num_layers - self.first_moe_layer, self.top_k), dtype=self.dtype)
        whole = torch.frombuffer(raw, dtype=torch.int32).view(shape)[:, self.first_moe_layer :]
        low, high = (int(bound) for bound in whole.aminmax())
        if low < 0 or high >= self.num_experts:
            raise ValueError(f"routed_experts: experts {low} to {high}, the model has {self.num_experts}")
        found = whole.to(self.dtype)
        by_place = found.movedim(-1, 0).contiguous()  # compared place by place: whole rows at once, not eight numbers
        for one, other in combinations(by_place, 2):
            same = one == other
            if not same.any():
                continue
            token, layer = same.nonzero()[0].tolist()
            experts = found[token, layer].tolist()
            raise ValueError(
                f"routed_experts: token {token}, layer {layer + self.first_moe_layer}: {experts} has one twice"
            )
        return found
