"""A training's tensors on disk, in Megatron's distributed checkpoint format, which any layout can load.

Each global tensor (a parameter, a moment of Adam) is stored once, in whatever pieces the saving ranks held; a rank that
loads asks for its own pieces. A kept copy of the weights, such as the reference, is stored like the weights themselves
under its own name.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException as DcpException

_METADATA = {
    # Adam's state by parameter, not by the saving layout's buffers: what makes it loadable at another layout.
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    # A tensor for each layer, as `models.dist_tensors` names them, where layers alike would be stacked into one.
    "non_homogeneous_layers": True,
}


# What linear layers save besides weights: Transformer Engine's delayed scaling, which no recipe here uses.
_EXTRA = "._extra_state"


class Trained(Protocol):
    """What is saved: the policy."""

    chunks: Sequence[Any]
    optimizer: MegatronOptimizer

    def copies(self) -> Sequence[str]:
        """Names of the kept copies of the weights."""

    def keep_copy(self, name: str) -> None:
        """Keep the present weights under a name."""

    def weights(self, name: str) -> AbstractContextManager[None]:
        """Put a kept copy in the place of the weights inside the block."""


def save(policy: Trained, path: Path, *, asynchronous: bool = False) -> AsyncRequest | None:
    """Write weights, optimizer and kept copies into the empty directory `path`. Collective over all ranks.

    Asynchronous, it copies the tensors and returns a request that writes them; an AsyncCallsQueue takes it.
    """
    state = _model_state(policy)
    state["optimizer"] = policy.optimizer.sharded_state_dict(state, is_loading=False, metadata=_METADATA)
    for name in policy.copies():
        with policy.weights(name):
            state[f"copy.{name}"] = _renamed(_held(_model_state(policy)), name)
    if asynchronous:
        return dist_checkpointing.save(state, str(path), content_metadata=_METADATA, async_sharded_save=True)
    with _results_in_this_process():
        return dist_checkpointing.save(state, str(path), content_metadata=_METADATA)


@contextmanager
def _results_in_this_process() -> Iterator[None]:
    """Let Megatron note what it has written in a plain queue while it saves synchronously.

    Its own queue is for writers in another process: a server beside every rank holds it, which imports torch first.
    """
    before, filesystem_async._results_queue = filesystem_async._results_queue, queue.Queue()
    try:
        yield
    finally:
        filesystem_async._results_queue = before


def load(policy: Trained, path: Path, copies: Sequence[str] = ()) -> None:
    """Fill weights, optimizer and the kept copies named, from what `save` wrote at this or another layout. Collective.

    Raises ValueError where a tensor is missing or of another shape than this model's.
    """
    for optimizer in policy.optimizer.chained_optimizers:
        _begin_state(optimizer)
    for name in copies:
        _fill(policy, _load(_renamed(_model_state(policy), name), path))
        policy.keep_copy(name)
    state = _model_state(policy)
    state["optimizer"] = policy.optimizer.sharded_state_dict(state, is_loading=True, metadata=_METADATA)
    loaded = _load(state, path)
    _fill(policy, loaded)
    policy.optimizer.load_state_dict(loaded["optimizer"])
    for optimizer in policy.optimizer.chained_optimizers:
        _part_steps(optimizer.optimizer)


def load_weights(policy: Trained, path: Path) -> None:
    """Fill the weights alone from a distributed checkpoint, a training's or a converted one. Collective.

    Raises ValueError where a tensor is missing or of another shape than this model's.
    """
    _fill(policy, _load(_model_state(policy), path))


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(path))
    except (CheckpointingException, DcpException) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(
            f"{path}: {reason}; must hold every tensor of this model; resume with the model.* of the run's start, or "
            "choose another checkpoint with run.resume_from"
        ) from error


def _fill(policy: Trained, loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(policy.chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        assert not unexpected and all(name.endswith(_EXTRA) for name in missing), (missing, unexpected)


def _begin_state(optimizer: Any) -> None:
    """Give torch's Adam the state that its first step would make: Megatron asks it for the number of steps.

    The fused Adams of Transformer Engine and apex keep that number elsewhere.
    """
    adam = optimizer.optimizer
    if not isinstance(adam, torch.optim.AdamW | torch.optim.Adam):
        return
    for parameter in (parameter for group in adam.param_groups for parameter in group["params"]):
        if not adam.state[parameter]:
            adam.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    fill = type(optimizer)._set_main_param_and_optimizer_states

    def fill_all_but_step(model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        # Megatron restores the step before the moments, and then misses it among them.
        group, order = optimizer.model_param_group_index_map[model_param]
        step = adam.state[adam.param_groups[group]["params"][order]]["step"]
        fill(optimizer, model_param, {"step": step, **tensors})

    optimizer._set_main_param_and_optimizer_states = fill_all_but_step


def _part_steps(adam: torch.optim.Optimizer) -> None:
    """Megatron gives all parameters one tensor as their step, which each of them would then count up."""
    for state in adam.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _model_state(policy: Trained) -> dict[str, Any]:
    return {
        f"model{index}": {
            name: value
            for name, value in chunk.sharded_state_dict(metadata=dict(_METADATA)).items()
            if not name.endswith(_EXTRA)
        }
        for index, chunk in enumerate(policy.chunks)
    }


def _leaves(state: Any) -> Iterator[ShardedBase]:
    if isinstance(state, dict):
        for value in state.values():
            yield from _leaves(value)
    elif isinstance(state, list):
        for value in state:
            yield from _leaves(value)
    elif isinstance(state, ShardedBase):
        yield state


def _renamed(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The same tensors under keys of their own."""
    for leaf in _leaves(state):
        leaf.key = f"copy.{name}.{leaf.key}"
    return state


def _held(state: dict[str, Any]) -> dict[str, Any]:
    """Take hold of the tensors as they are now: a parameter will point elsewhere when the block ends."""
    for leaf in _leaves(state):
        if isinstance(leaf, ShardedTensor | ShardedTensorFactory) and isinstance(leaf.data, torch.Tensor):
            leaf.data = leaf.data.detach()
    return state
