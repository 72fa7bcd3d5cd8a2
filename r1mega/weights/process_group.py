"""Publish over process groups that trainer ranks share with engine ranks: gloo on CPU, NCCL on CUDA.

For engines on other processors and nodes. SGLang 0.5.21 takes weights so by broadcast alone, from rank 0 of a group to
all ranks of an engine, and its scheduler carries out one call at a time. So every engine rank receives every tensor
whole, also the experts that it does not own, which its loader drops; and several senders can only take turns.

Each trainer rank that owns tensors (`spread_plan`) is a **sender**, with a group of it and all ranks of all engines.
Over gloo all ranks may own some, so that experts leave from where they are trained and all ranks hash. NCCL takes
device memory of every engine rank for each group: over it the lowest rank of each pipeline stage owns all of its stage.

Turn by turn the owners bring their tensors together (`gathering`), and one after the other broadcasts them, while rank
0 tells the servers what comes. What an owner holds whole leaves from the memory that it is trained in. Meanwhile each
hashes what it owns and, over gloo, the next turn is brought together.

**Faults.** A server that fails, or whose ranks vanish, ends its call to rank 0; every rank hears of it before the next
broadcast. Then all leave the groups, and new ones are made at the next attempt. They are also made anew where a server
does not serve what was published last, because it was started again.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from r1mega.models.hf_fields import HfFields
from r1mega.models.safetensors_file import DTYPES
from r1mega.parallel.collectives import gather, share
from r1mega.parallel.layout import Layout
from r1mega.parallel.outside import OutsideGroup, address_towards
from r1mega.types import EngineFault, GroupAddress, Servers, TensorShape, TrainerWeights
from r1mega.weights.gathering import Gathering, Held, Wholes
from r1mega.weights.proof import Expectation, PublishProof, publish_twice, speaker
from r1mega.weights.served import as_reported, served
from r1mega.weights.spread_plan import SpreadPlan, entries_of

GLOO_SECONDS = 120.0  # of one broadcast (ours): 1 GiB at 9 MB/s
Given = list[tuple[str, list[tuple[str, torch.Tensor]]]]  # of each tensor of the table what engines are given


def plan_for(
    fields: HfFields,
    trainer: Layout,
    proof: PublishProof,
    *,
    serves: str,
    held: str,
    backend: str,
    turn_bytes: int,
) -> SpreadPlan:
    """Who owns which tensors for a GroupPublisher; arguments as SpreadPlan's."""
    return SpreadPlan(
        fields,
        trainer,
        serves=serves,
        held=held,
        together=proof.together(),
        turn_bytes=turn_bytes,
        with_mtp=False,
        one_owner=backend == "nccl",
    )


class GroupPublisher:
    """Broadcasts weights to servers.

    Args:
        gathering: this rank's part in a plan of `plan_for`.
        servers: on the rank that speaks to them, rank 0 of the group; None on the others.
        proof: what the servers have to report, on every rank.
        group: all ranks, for objects.
        num_ranks: of each server.
        backend: "gloo" or "nccl".
        seconds: that a call to a server, or the meeting of a group, may take.

    Raises:
        ValueError: the servers hold parameters of tensors that the plan does not send.
    """

    def __init__(
        self,
        gathering: Gathering,
        servers: Servers | None,
        proof: PublishProof,
        group: dist.ProcessGroup,
        *,
        num_ranks: Sequence[int],
        backend: str,
        seconds: float,
    ) -> None:
        self._gathering, self._servers, self._proof, self._group = gathering, servers, proof, group
        self._speak = speaker(servers, group)
        self._num_ranks, self._backend, self._seconds = list(num_ranks), backend, seconds
        plan = gathering.plan
        self._senders = sorted({owner for turn in plan.turns for owner in turn})
        self._mine = plan.tensors_of(gathering.rank)
        absent = sorted(proof.tensors - {tensor.name for slot in plan.slots for tensor in slot.tensors})
        if absent:
            raise ValueError(f"publish: the servers hold parameters of {', '.join(absent[:4])}, which are not sent")
        self._outside: OutsideGroup | None = None  # of a sender
        self._names: list[str] = []  # of the groups, by sender; none while there are no groups
        self._published: int | None = None
        self._telling, self._hashing = ThreadPoolExecutor(1), ThreadPoolExecutor(1)  # while tensors move
        self._call: Future[None] | None = None
        self._hashed: list[Future[None]] = []  # of each turn

    def publish(self, weights: TrainerWeights, version: int) -> None:
        """Bring the weights to every server. Collective.

        Raises PublishError on every rank where it fails a second time.
        """
        publish_twice(lambda: self._once(weights, version), version, speaks=self._servers is not None)

    def _once(self, weights: TrainerWeights, version: int) -> list[str]:
        """What went wrong, the same on every rank."""
        expected = self._proof.expect(version, tensors=self._mine)
        held = self._gathering.held(weights.shards())
        faults = self._speak(lambda servers: servers.begin_update()) or self._meet() or self._send(held, expected)
        for hashed in self._hashed:
            hashed.result()
        if faults:
            self._part()
            return faults
        faults = self._speak(lambda servers: servers.end_update(version))
        self._published = None if faults else version
        if faults or not self._proof.share:
            return faults
        digests = self._proof.merged(gather(expected.results(), self._group), version)
        return self._speak(lambda servers: self._proof.faults(digests, servers.checksums()))

    def _send(self, held: Held, expected: Expectation) -> list[str]:
        """Every turn: brought together while the broadcasts of the one before are under way."""
        self._hashed = []
        for turn, owners in enumerate(self._gathering.plan.turns):
            if turn > 1:
                self._hashed[turn - 2].result()  # its memory is used again
            given, fault = self._given(self._gathering.exchange(turn, held))
            self._hashed.append(self._hashing.submit(_hash, expected, given))
            for sender in owners:
                faults = self._finish(fault)
                if faults:
                    return faults
                self._start(turn, sender, given)
                if self._backend == "nccl":
                    # A broadcast that hangs would hold up what comes after it on the device: nobody could end it.
                    faults = self._finish()
                    if faults:
                        return faults
        return self._finish()

    def _given(self, wholes: Wholes) -> tuple[Given, str | None]:
        """What this rank sends in a turn, and what is wrong with it."""
        plan = self._gathering.plan
        try:
            return [
                (tensor.name, served(slot, tensor, value, plan.serves))
                for number, values in wholes.items()
                for slot in [plan.slots[number]]
                for tensor, value in zip(slot.tensors, values, strict=True)
            ], None
        except ValueError as error:
            return [], str(error)

    def _start(self, turn: int, sender: int, given: Given) -> None:
        if self._servers is not None:
            name = self._names[self._senders.index(sender)]
            announced = self._announced(turn, sender)
            self._call = self._telling.submit(self._servers.update_from_group, name, announced)
        if sender == self._gathering.rank:
            assert self._outside is not None
            self._outside.send([tensor for _, pairs in given for _, tensor in pairs])

    def _announced(self, turn: int, sender: int) -> list[TensorShape]:
        """What a sender broadcasts in a turn, one after the other."""
        plan = self._gathering.plan
        slots = [plan.slots[job.number] for job in plan.turns[turn][sender]]
        return [
            (name, str(DTYPES[dtype]).removeprefix("torch."), shape)
            for slot in slots
            for tensor in slot.tensors
            for name, dtype, shape in entries_of(slot, tensor, plan.serves)
        ]

    def _finish(self, fault: str | None = None) -> list[str]:
        """Wait until the servers have what was sent last. `fault`: of this rank, which all then hear of."""
        call, self._call = self._call, None
        found = [] if fault is None else [fault]
        try:
            if call is not None:
                call.result()
        except EngineFault as error:
            found.append(str(error))
        faults = [fault for part in gather(found, self._group) for fault in part]
        if self._outside is not None and faults:
            self._outside.close()  # the broadcast may hang, and keep the other servers waiting
        elif self._outside is not None:
            self._outside.wait()
        return faults

    def _meet(self) -> list[str]:
        """Make the groups, where there are none that every server is still in. Collective."""
        if self._names and not self._speak(self._restarted):
            return []
        self._part()
        rank, size = dist.get_rank(self._group), 1 + sum(self._num_ranks)
        url, run = share((self._servers.urls[0], uuid.uuid4().hex[:8]) if self._servers else None, self._group)
        names = [f"r1mega-{run}-{sender}" for sender in self._senders]
        own = None
        if rank in self._senders:
            name = names[self._senders.index(rank)]
            # NCCL's own limit ends the process: the call to the server has to fail before.
            step = 2 * self._seconds if self._backend == "nccl" else min(GLOO_SECONDS, self._seconds)
            self._outside = OutsideGroup(name, size, self._backend, seconds=self._seconds, step_seconds=step)
            own = (address_towards(urlsplit(url).hostname), self._outside.port)
        hosts = gather(own, self._group)
        self._names = names
        first = [1 + sum(self._num_ranks[:i]) for i in range(len(self._num_ranks))]
        for sender, name in zip(self._senders, names, strict=True):
            address = GroupAddress(name, *hosts[sender], size, self._backend)
            call = self._telling.submit(self._servers.join_group, address, first) if self._servers is not None else None
            late = self._wait_for_others() if rank == sender else []
            told = self._speak(lambda _, call=call: call.result() if call else None)
            faults = told + [fault for part in gather(late, self._group) for fault in part]
            if faults:
                return faults
        return []

    def _wait_for_others(self) -> list[str]:
        assert self._outside is not None
        try:
            self._outside.meet()
        except RuntimeError as error:
            return [f"group {self._outside.name}: {error}"]
        return []

    def _restarted(self, servers: Servers) -> list[str]:
        found = zip(servers.urls, servers.weight_versions(), strict=True)
        return [f"{url} serves weights {version}" for url, version in found if version != str(self._published)]

    def _part(self) -> None:
        """Leave the groups. A server that cannot be told is no hindrance: no name is used again."""
        self._published = None
        if self._outside is not None:
            self._outside.close()
            self._outside = None
        names, self._names = self._names, []
        if self._servers is not None and names:
            self._servers.leave_groups(names)


def _hash(expected: Expectation, given: Given) -> None:
    for name, pairs in given:
        if expected.wants(name):
            expected.add(name, as_reported(pairs))
