"""Hugging Face checkpoint names resolved to places inside a transformers model in memory.

On disk every expert has tensors of its own (`model.layers.1.mlp.experts.3.gate_proj.weight`); in memory transformers 5
keeps one `gate_up_proj` [experts, 2 * ffn, hidden] and one `down_proj` [experts, hidden, ffn] per layer. `WeightTable`
resolves each checkpoint name to a view of the right slice once, so that a load is one in-place copy per tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from transformers import PreTrainedModel

_EXPERTS_GATE_UP = "mlp.experts.gate_up_proj"
_EXPERTS_DOWN = "mlp.experts.down_proj"
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_LISTED = 8  # names shown in an error; a first wrong publish can miss thousands


class WeightTable:
    """Where each tensor of a checkpoint goes in `model`.

    The views alias the model's storage, so the model must not be moved to another device or dtype afterwards.

    Tensors of the multi-token-prediction layers (`model.layers.{i}.*` with i from `num_hidden_layers` to
    `num_hidden_layers + num_nextn_predict_layers - 1`) are accepted and ignored: the model in memory has no such
    layers, while DeepSeek-V3 checkpoints carry them. `lm_head.weight` has no name of its own where the embeddings are
    tied.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        first_extra = config.num_hidden_layers
        self._ignored_layers = range(first_extra, first_extra + (getattr(config, "num_nextn_predict_layers", 0) or 0))
        self._views: dict[str, torch.Tensor] = {}
        tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
        for name, tensor in model.state_dict().items():
            if name in tied:
                continue
            covered = 0
            for checkpoint_name, view in checkpoint_tensors(name, tensor):
                self._views[checkpoint_name] = view
                covered += view.numel()
            assert covered == tensor.numel(), (
                f"{name}: its checkpoint tensors cover {covered} of {tensor.numel()} elements"
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint names that a load has to deliver, with their shapes."""
        return {name: tuple(view.shape) for name, view in self._views.items()}

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy `tensors` into the model, each cast to the dtype of its place.

        Raises ValueError on a name that the model does not have, a wrong shape, a dtype that would lose its scale
        (integers, 8-bit floats), a name delivered twice, and names that were not delivered. After an error the weights
        are a mixture.
        """
        missing = dict.fromkeys(self._views)
        for name, tensor in tensors:
            view = self._views.get(name)
            if view is None:
                if self._is_ignored(name):
                    continue
                raise ValueError(
                    f"weight {name!r}: the model has no such tensor; publish Hugging Face checkpoint names"
                )
            if name not in missing:
                raise ValueError(f"weight {name!r} was delivered twice in one load")
            if tensor.shape != view.shape:
                raise ValueError(f"weight {name!r}: got shape {list(tensor.shape)}, the model has {list(view.shape)}")
            if not tensor.is_floating_point() or tensor.element_size() < 2:
                raise ValueError(
                    f"weight {name!r}: got {tensor.dtype}, which needs a scale; publish 16- or 32-bit floats"
                )
            view.copy_(tensor)
            del missing[name]
        if missing:
            names = list(missing)
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            raise ValueError(
                f"{len(names)} of {len(self._views)} weights were not delivered: {', '.join(names[:_LISTED])}{more};"
                " a load has to carry the whole model"
            )

    def _is_ignored(self, name: str) -> bool:
        match = _LAYER.match(name)
        return match is not None and int(match[1]) in self._ignored_layers


def checkpoint_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint names of one tensor of the state dict, each with its slice of it."""
    if name.endswith(_EXPERTS_GATE_UP):
        prefix = name.removesuffix("gate_up_proj")
        ffn = tensor.shape[1] // 2
        for expert, fused in enumerate(tensor):
            yield f"{prefix}{expert}.gate_proj.weight", fused[:ffn]
            yield f"{prefix}{expert}.up_proj.weight", fused[ffn:]
    elif name.endswith(_EXPERTS_DOWN):
        prefix = name.removesuffix("down_proj")
        for expert, down in enumerate(tensor):
            yield f"{prefix}{expert}.down_proj.weight", down
    else:
        yield name, tensor
