"""Who owns and writes what: every parameter once, by a rank that holds most of it, within bounds of memory, evenly."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.models.tables import slots_of
from r1mega.parallel.layout import Layout
from r1mega.weights.bucket import loaded_together
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.engine_params import EngineBuild, engine_params
from r1mega.weights.spread_plan import SpreadPlan
from r1mega.weights.write_plan import WritePlan

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "dist"))
from imagined_671b import FIELDS as V3
from publish_checks import cases

V3_512 = "pp=16,ep=32,dp=32,stages=" + "+".join(["3"] + ["4"] * 14 + ["2"])


def together_of(fields, engine: EngineLayout) -> list[tuple[str, ...]]:
    ranks = (engine_params(fields, engine, rank, EngineBuild(device="cpu")) for rank in range(engine.num_ranks))
    return [param.tensors for params in ranks for param in params if len(param.tensors) > 1]


def units_of(plan: SpreadPlan, row) -> list[tuple]:
    """The jobs of a row, those together that a loader needs in one call."""
    return [row[first:last] for first, last in loaded_together([plan.slots[job.number] for job in row])]


def traffic(plan: SpreadPlan, turn: dict) -> tuple[dict[int, int], dict[int, int], dict[int, int], dict[int, int]]:
    """Bytes that each rank owns and sends in a turn, and of each those of what has to be in one turn."""
    owned, sent, largest_owned, largest_sent = {}, {}, {}, {}
    for owner, row in turn.items():
        for unit in units_of(plan, row):
            whole, parts = 0, {}
            for job in unit:
                size = plan.wire_bytes(plan.slots[job.number])
                whole += size * len(job.sources)
                for source in job.sources:
                    if source != owner:
                        parts[source] = parts.get(source, 0) + size
            owned[owner] = owned.get(owner, 0) + whole
            largest_owned[owner] = max(largest_owned.get(owner, 0), whole)
            for source, size in parts.items():
                sent[source] = sent.get(source, 0) + size
                largest_sent[source] = max(largest_sent.get(source, 0), size)
    return owned, sent, largest_owned, largest_sent


def check_turns(plan: SpreadPlan, limit: int) -> list[tuple[int, object]]:
    """(owner, job) of everything: from ranks that hold it, within the limit in each turn."""
    jobs = [(owner, job) for turn in plan.turns for owner, row in turn.items() for job in row]
    assert sorted(job.number for _, job in jobs) == list(range(len(plan.slots)))
    for _, job in jobs:
        slot = plan.slots[job.number]
        assert [plan.placement.shard_on(slot, rank) for rank in job.sources] == list(range(len(job.sources)))
    for turn in plan.turns:
        owned, sent, largest_owned, largest_sent = traffic(plan, turn)
        assert all(nbytes <= max(limit, largest_owned[rank]) for rank, nbytes in owned.items())
        assert all(nbytes <= max(limit, largest_sent[rank]) for rank, nbytes in sent.items())
    return jobs


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([64, 700, 4096, 1 << 20]), st.sampled_from([100, 3000, 1 << 20]))
def test_every_parameter_is_written_once_from_ranks_that_hold_it(case, limit, file_bytes):
    fields, trainer, engines = case
    together = together_of(fields, engines[0]) if fields.is_moe and engines[0].dp == engines[0].attn_dp == 1 else []
    plan = WritePlan(
        fields, trainer, serves="bf16", held="bf16", together=together, turn_bytes=limit, file_bytes=file_bytes
    )
    jobs = check_turns(plan, limit)
    writer_of = {tensor.name: writer for writer, job in jobs for tensor in plan.slots[job.number].tensors}
    assert all(len({writer_of[name] for name in names}) == 1 for names in together)
    # Each tensor of the table stands in one file, end to end after its head, in its writer's file.
    names = [tensor.name for slot in slots_of(fields) if not slot.is_copy for tensor in (*slot.tensors, *slot.aliases)]
    assert sorted(stored.name for file in plan.files for stored in file.stored) == sorted(names)
    for file in plan.files:
        at = len(file.head)
        for stored in file.stored:
            assert stored.at == at and stored.file == file.name
            assert writer_of.get(stored.name, file.writer) == file.writer
            at += stored.nbytes
        assert file.nbytes == at


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from([64, 700, 4096, 1 << 20]), st.booleans())
def test_what_a_loader_needs_in_one_call_is_in_one_turn_of_one_owner(case, limit, one_owner):
    """Whether checksums ask for it or not; a stage's lowest rank may own all, and layers that engines lack are left."""
    fields, trainer, _ = case
    options = {"serves": "bf16", "held": "bf16", "turn_bytes": limit, "with_mtp": False, "one_owner": one_owner}
    plan = SpreadPlan(fields, trainer, **options)
    jobs = check_turns(plan, limit)
    assert not any(plan.slots[job.number].name.startswith("mtp.") for _, job in jobs)
    if one_owner:
        stages = {plan.placement.stage(slot) for slot in plan.slots}
        assert {owner for owner, _ in jobs} == {stage * trainer.per_stage for stage in stages}
    place = {
        tensor.name: (number, owner)
        for number, turn in enumerate(plan.turns)
        for owner, row in turn.items()
        for job in row
        for tensor in plan.slots[job.number].tensors
    }
    for name in place:
        if name.endswith("q_a_proj.weight"):
            assert place[name] == place[name.replace("q_a_proj.weight", "kv_a_proj_with_mqa.weight")]


def loads_of(plan: WritePlan) -> list[int]:
    loads = [0] * plan.trainer.world_size
    for file in plan.files:
        loads[file.writer] += file.nbytes
    return loads


@pytest.mark.parametrize(("serves", "least", "most"), [("bf16", 1.3e12, 1.4e12), ("fp8", 0.65e12, 0.7e12)])
def test_deepseek_v3_on_512_ranks(serves: str, least: float, most: float, record_property) -> None:
    """PP16 x EP32 to engines of EP32: in each stage all write alike, but for whoever has a table."""
    together = together_of(V3, EngineLayout(tp=32, ep=32))
    began = time.process_time()
    plan = WritePlan(V3, Layout.parse(V3_512), serves=serves, held="bf16", together=together)
    loads = loads_of(plan)
    seconds = time.process_time() - began
    record_property("seconds", seconds)
    assert least < sum(loads) < most
    worst = max(max(row) * 32 / sum(row) for row in (loads[at : at + 32] for at in range(32, 15 * 32, 32)))
    record_property("largest of a stage over its mean", worst)
    assert worst < 1.2
    tables = 2 * 2 * V3["vocab_size"] * V3["hidden_size"]  # written twice: MTP repeats them
    assert max(loads) < tables + 1.2 * sum(loads[-32:]) / 32
    assert seconds < 60
