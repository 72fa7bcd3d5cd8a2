"""What a publish plan moves: bytes of every rank, against what it needs and against sending everything to everyone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from r1mega.weights.plan import PublishPlan


@dataclass(frozen=True)
class Traffic:
    """Bytes of one publish.

    Args:
        sent: int64 [trainer ranks].
        received: int64 [receivers], in the order of the plan's `receivers.places`.
        needed: int64 [receivers], from the tensors' shapes alone: the receiver's experts and all of the rest.
        whole: of the whole model.
        num_links: pairs of a sender and a receiver that have something to send.
        num_deals: such pairs, counted in every bucket: the number of messages, parts not counted.
    """

    plan: PublishPlan
    sent: np.ndarray
    received: np.ndarray
    needed: np.ndarray
    whole: int
    num_links: int
    num_deals: int

    def stages(self) -> np.ndarray:
        """[stages, ranks of a stage]: bytes sent."""
        return self.sent.reshape(self.plan.trainer.pp, -1)

    def lines(self) -> Iterator[str]:
        """A table for people, in decimal gigabytes."""
        engines = self.plan.receivers.engines
        num_receivers = len(self.received)
        total, everything = int(self.received.sum()), self.whole * num_receivers
        yield f"trainer {self.plan.trainer}: {self.plan.trainer.world_size} ranks; {self.plan.dtype}"
        yield f"{len(self.plan.buckets)} buckets, {self.num_deals:,} messages on {self.num_links:,} links"
        yield ""
        yield (
            f"{'engine':24} {'engines':>7} {'ranks':>6} {'GB a rank':>10} {'of needed':>9} {'everything':>10} "
            f"{'less by':>8}"
        )
        for engine in dict.fromkeys(engines):
            mine = np.array([engines[index] == engine for index, _ in self.plan.receivers.places])
            most = int(self.received[mine].max())
            over = float((self.received[mine] / self.needed[mine]).max())
            yield (
                f"{str(engine):24} {engines.count(engine):7} {int(mine.sum()):6} {most / 1e9:10.3f} {over:9.3f} "
                f"{self.whole / 1e9:10.3f} {self.whole / most:7.2f}x"
            )
        yield f"{'all':24} {len(engines):7} {num_receivers:6} {total / 1e9:10.3f} {'':9} {everything / 1e9:10.3f} " + (
            f"{everything / total:7.2f}x"
        )
        yield ""
        yield f"{'stage':>5} {'ranks':>6} {'GB sent: mean':>14} {'least':>10} {'most':>10} {'most/mean':>9}"
        for stage, sent in enumerate(self.stages()):
            mean = sent.mean() / 1e9
            yield (
                f"{stage:5} {len(sent):6} {mean:14.3f} {sent.min() / 1e9:10.3f} {sent.max() / 1e9:10.3f} "
                f"{sent.max() / 1e9 / mean:9.4f}"
            )


def traffic_of(plan: PublishPlan) -> Traffic:
    """What every rank sends and receives, of all stages."""
    num_receivers = len(plan.receivers.places)
    sent = np.zeros(plan.trainer.world_size, dtype=np.int64)
    received = np.zeros(num_receivers, dtype=np.int64)
    deals: list[np.ndarray] = []
    for stage in range(plan.trainer.pp):
        of_bucket: dict[int, list[np.ndarray]] = {}
        for share in plan.shares(stage):
            sender, receiver, begin, end = share.stretches.T
            np.add.at(sent, sender, end - begin)
            np.add.at(received, receiver, end - begin)
            of_bucket.setdefault(share.bucket, []).append(sender * num_receivers + receiver)
        deals += [np.unique(np.concatenate(links)) for links in of_bucket.values()]
    needed = np.zeros(num_receivers, dtype=np.int64)
    for blocks, nbytes in _bytes_of_blocks(plan).items():
        needed[plan.receivers.of(blocks)] += nbytes
    return Traffic(
        plan,
        sent,
        received,
        needed,
        sum(plan.nbytes_of(slot) for slot in plan.slots),
        len(np.unique(np.concatenate(deals))),
        sum(map(len, deals)),
    )


def _bytes_of_blocks(plan: PublishPlan) -> dict[tuple[int, ...], int]:
    """Bytes of the tensors that the same receivers need."""
    found: dict[tuple[int, ...], int] = {}
    for slot in plan.slots:
        blocks = plan.receivers.blocks(slot.expert)
        found[blocks] = found.get(blocks, 0) + plan.nbytes_of(slot)
    return found
