"""Whose turn it is to have an accelerator's memory, where trainer and engines share it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from r1mega.parallel.collectives import gather, share
from r1mega.rollout.server import EVERYTHING, WEIGHTS

if TYPE_CHECKING:
    from r1mega.rollout.occupancy import ServerMemory
    from r1mega.train.policy import MegatronPolicy
    from r1mega.weights.shelf import Shelf


class Turns:
    """Moves memory from one side to the other. Every method is collective and harmless when repeated.

    Without a policy the trainer keeps what it has, without a group the servers do: both in `Turns()`.

    Args:
        policy: hands its memory over while engines generate.
        group: all ranks, for objects; given where the servers give memory back.
        servers, place: on the rank that speaks to the servers.
    """

    def __init__(
        self,
        policy: MegatronPolicy | None = None,
        group: dist.ProcessGroup | None = None,
        servers: ServerMemory | None = None,
        place: Shelf | None = None,
    ) -> None:
        self._policy, self._group, self._servers, self._place = policy, group, servers, place
        self._held: tuple[str, ...] = EVERYTHING

    def engines(self) -> None:
        """Engines generate: the trainer's memory goes to the host, and the servers have all of theirs."""
        if self._policy is not None:
            self._policy.hand_over()
        self._hold(EVERYTHING)

    def both(self) -> None:
        """Weights are published or saved: the servers have theirs and no cache, the trainer its own; what only an
        update needs stays on the host until something asks for it."""
        if self._policy is not None and self._group is not None:
            self._policy.hand_over(keeps_weights=True)
        self._hold((WEIGHTS,))

    def trainer(self) -> None:
        """The trainer computes: the servers have nothing."""
        self._hold(())

    def _hold(self, tags: tuple[str, ...]) -> None:
        if self._group is None or tags == self._held:
            return
        gather(None, self._group)  # every rank has handed over before a server takes
        if self._servers is not None and self._place is not None:
            self._place.set_turn(trainers=False)  # a server that waits to be started is, and then gives back
            self._servers.hold(tags)
            self._place.set_turn(trainers=not tags)
        share(None, self._group)  # the servers have given back before a rank takes
        self._held = tags
