"""Publish to an engine in the trainer's own process: the gathered tensors are copied straight into it."""

from __future__ import annotations

from r1mega.types import Engine, TrainerWeights


def publish(weights: TrainerWeights, engine: Engine | None, version: int) -> None:
    """Load the stream into this rank's engine; a rank without one only takes part in gathering it.

    Raises ValueError where the stream is not exactly the engine's model (see Engine.load).
    """
    tensors = weights.export_hf(wanted=engine is not None)
    if engine is None:
        for _ in tensors:
            raise AssertionError("a rank without an engine asked for tensors")
        return
    engine.load(tensors, version)
