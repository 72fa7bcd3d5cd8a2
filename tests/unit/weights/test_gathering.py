"""Whole tensors on the ranks that own them: random models and layouts, ranks as threads that pass messages in order."""

from __future__ import annotations

import queue
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.parallel.layout import Layout
from r1mega.weights import gathering
from r1mega.weights.gathering import Gathering
from r1mega.weights.spread_plan import SpreadPlan

sys.path.insert(0, str(Path(__file__).parent))
from publish_checks import Coded, cases, fields_of

SECONDS = 20.0
CPU = torch.device("cpu")


class Mail:
    """torch.distributed's messages between threads: those from one rank to another come in the order they were sent."""

    def __init__(self) -> None:
        self.boxes: dict[tuple[int, int], queue.SimpleQueue[torch.Tensor]] = defaultdict(queue.SimpleQueue)
        self.here = threading.local()
        self.moved = 0

    def as_dist(self) -> SimpleNamespace:
        return SimpleNamespace(isend="isend", irecv="irecv", P2POp=lambda *op: op, batch_isend_irecv=self.post)

    def post(self, operations) -> list[SimpleNamespace]:
        works = []
        for op, tensor, peer in operations:
            assert tensor.dtype == torch.uint8 and tensor.is_contiguous()
            if op == "isend":
                self.moved += tensor.nbytes
                self.boxes[self.here.rank, peer].put(tensor.clone())
                works.append(SimpleNamespace(wait=lambda: None))
            else:
                works.append(SimpleNamespace(wait=lambda rank=self.here.rank, t=tensor, p=peer: self.take(rank, t, p)))
        return works

    def take(self, rank: int, tensor: torch.Tensor, peer: int) -> None:
        tensor.copy_(self.boxes[peer, rank].get(timeout=SECONDS))  # of another size it raises


def shards_of(plan: SpreadPlan, coded: Coded, rank: int) -> list:
    found = []
    for slot in plan.slots:
        shard = plan.placement.shard_on(slot, rank)
        if shard is not None:
            found.append((slot, shard, coded.shard(slot, shard).float()))
    return found


def gathered(plan: SpreadPlan, coded: Coded, mail: Mail, rank: int) -> dict[str, torch.Tensor]:
    """All that a rank owns, turn by turn, copied before the turn after the next."""
    mail.here.rank = rank
    made = Gathering(plan, rank, CPU)
    held, found = made.held(shards_of(plan, coded, rank)), {}
    for turn in range(len(plan.turns)):
        for number, values in made.exchange(turn, held).items():
            for tensor, value in zip(plan.slots[number].tensors, values, strict=True):
                assert tensor.name not in found and value.is_contiguous()
                found[tensor.name] = value.clone()
    return found


@settings(max_examples=40, deadline=None)
@given(
    cases(),
    st.sampled_from([64, 4096, 1 << 20]),
    st.sampled_from([1, 200, 1 << 16]),
    st.sampled_from(["bf16", "fp32"]),
    st.booleans(),
)
def test_every_tensor_comes_together_on_its_owner(case, limit, alone, serves, one_owner) -> None:
    fields, trainer, _ = case
    plan = SpreadPlan(fields, trainer, serves=serves, held="fp32", turn_bytes=limit, one_owner=one_owner)
    coded, mail, ranks = Coded(fields, trainer), Mail(), range(trainer.world_size)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[serves]
    patches = mock.patch.multiple(gathering, dist=mail.as_dist(), _ALONE_BYTES=alone)
    with patches, ThreadPoolExecutor(len(ranks)) as threads:
        parts = list(threads.map(lambda rank: gathered(plan, coded, mail, rank), ranks))
    assert all(box.empty() for box in mail.boxes.values())
    names = sorted(tensor.name for slot in plan.slots for tensor in slot.tensors)
    assert sorted(name for part in parts for name in part) == names
    whole = {name: value for part in parts for name, value in part.items()}
    for slot in plan.slots:
        for tensor in slot.tensors:
            wanted = coded.tensor(tensor.name, tensor.shape).float()
            given_as = torch.float32 if slot.fp32 else dtype
            assert torch.equal(whole[tensor.name].to(given_as), wanted.to(given_as)), tensor.name


def test_what_an_owner_holds_whole_is_not_copied() -> None:
    fields = fields_of("deepseek_v3", layers=2)
    plan = SpreadPlan(fields, Layout.parse("dp=2,ep=2"), serves="fp32", held="fp32")
    coded, mail = Coded(fields, plan.trainer), Mail()
    for rank in range(2):
        mail.here.rank = rank
        made = Gathering(plan, rank, CPU)
        held = made.held(shards_of(plan, coded, rank))
        memory = {parameter.untyped_storage().data_ptr() for parameter in held.values()}
        with mock.patch.object(gathering, "dist", mail.as_dist()):
            for values in made.exchange(0, held).values():
                assert all(value.untyped_storage().data_ptr() in memory for value in values)
    assert mail.moved == 0


def test_a_shard_of_another_model_is_refused() -> None:
    fields = fields_of("qwen2", layers=2)
    plan = SpreadPlan(fields, Layout(), serves="fp32", held="fp32")
    made, shards = Gathering(plan, 0, CPU), shards_of(plan, Coded(fields, Layout()), 0)
    slot, shard, parameter = shards[3]
    shape = list(parameter.shape)
    with pytest.raises(ValueError, match=f"publish: {slot.name} is missing; config.json makes a shard of it"):
        made.held(shards[:3] + shards[4:])
    shards[3] = slot, shard, torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"has shape \[3, 5\]; config.json makes a shard of it ") as raised:
        made.held(shards)
    assert str(shape) in str(raised.value)
