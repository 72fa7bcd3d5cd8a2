"""A configuration -> the engines of a run, and what a loop asks of them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from r1mega.config.choices import EngineKind, Loop
from r1mega.config.schema import Config
from r1mega.loop.wire_publish import Publish, patience_of, publisher_of, served_dtype, shelf_of, torch_dtype
from r1mega.parallel.seed import derive
from r1mega.types import Engine, Prompt, TrainerWeights

if TYPE_CHECKING:
    from r1mega.loop.wire import RlRun
    from r1mega.parallel.groups import Groups
    from r1mega.rollout.collector import Lockstep, Scorer, Streamed
    from r1mega.rollout.sglang import SglangEngines
    from r1mega.weights.probe import PublishProbe
    from r1mega.weights.shelf import Shelf


def engines_of(config: Config, run: RlRun) -> tuple[Engine | None, int, Publish]:
    """What this rank generates with, if it does; how many ranks do; and how weights go there, collectively.

    Also sets whose turn it is to have the memory (`run.turns`).
    """
    from r1mega.loop.turns import Turns
    from r1mega.rollout.occupancy import ServerMemory

    policy = run.policy if config.memory.offload else None
    if config.rollout.engine is EngineKind.embedded:
        run.turns = Turns(policy)
        return _embedded(config, run)
    place = shelf_of(config)
    servers = _servers(config, run, place) if run.groups.rank == 0 else None
    releases = config.sglang.release
    memory = ServerMemory(servers, patience_of(config)) if servers and releases else None
    run.turns = Turns(policy, run.groups.control if releases else None, memory, place)
    send = publisher_of(config, run, place, servers)

    def publish(weights: TrainerWeights, version: int) -> None:
        send(weights, version)
        if servers is not None:
            servers.go_on()

    return servers, 1, publish


def rollouts_of(config: Config, run: RlRun, engine: Engine | None, scorer: Scorer | None) -> Lockstep | Streamed:
    """What gives a round its groups: see rollout.collector."""
    from r1mega.rollout.collector import Lockstep, Streamed

    algo, rollout = config.algo, config.rollout
    assert run.collector is not None and run.prompts is not None
    if rollout.over_sampling == 1 and rollout.max_staleness == 0:
        return Lockstep(run.collector, run.prompts, algo.questions_per_round, algo.group_size)
    producer = None
    if run.groups.rank == 0:
        from r1mega.rollout.buffer import Buffer
        from r1mega.rollout.producer import Demand, Producer
        from r1mega.rollout.sglang import SglangEngines

        assert isinstance(engine, SglangEngines) and scorer is not None
        wanted = math.ceil(rollout.over_sampling * algo.questions_per_round)
        rounds_behind = rollout.max_staleness + rollout.carry_partial
        buffer = Buffer(algo.group_size, rounds_behind * algo.updates_per_round)
        demand = Demand(wanted, rollout.max_staleness, rollout.carry_partial)
        unchecked = 1 + config.sglang.speculative_steps
        producer = Producer(engine, buffer, run.prompts, demand, run.text_of, scorer, unchecked)
    return Streamed(producer, algo.questions_per_round, run.groups.control)


def _embedded(config: Config, run: RlRun) -> tuple[Engine | None, int, Publish]:
    from r1mega.rollout.embedded import EmbeddedEngine
    from r1mega.weights import memory

    rollout, engine = config.rollout, None
    if run.groups.rank < rollout.engines:
        dtype, device = torch_dtype(config.precision.params), run.groups.device
        engine = EmbeddedEngine(config.model.hf, run.tokenizer, dtype, device, rollout.max_batch)
    return engine, rollout.engines, lambda weights, version: memory.publish(weights, engine, version)


def _servers(config: Config, run: RlRun, place: Shelf) -> SglangEngines:
    from r1mega.models.expert_choices import ExpertChoices
    from r1mega.rollout.sglang import SglangEngines

    found = place.read_addresses()
    return SglangEngines(
        found.servers,
        max_in_flight=config.rollout.max_in_flight,
        patience_seconds=patience_of(config),
        choices=ExpertChoices.of(run.fields) if config.rollout.router_replay else None,
        router_url=found.router,
        directory_of=place.path if config.sglang.recovery_copy else None,
        overlaps=config.rollout.max_staleness > 0,
    )


def probe_of(config: Config, run: RlRun, engine: Engine | None, prompts: Sequence[Prompt]) -> PublishProbe | None:
    """What trainer and engines are compared by after a publish: questions with their answers, chosen by the seed."""
    from r1mega.weights.probe import MAX_TOKENS, PublishProbe

    count, algo = min(config.rollout.probe_sequences, len(prompts)), config.algo
    if not count:
        return None
    chosen = random.Random(derive(config.run.seed, "probe")).sample(prompts, count)
    longest = min(MAX_TOKENS, algo.max_tokens_per_micro_batch)
    sequences = [
        (*prompt.token_ids, *run.tokenizer(prompt.answer, add_special_tokens=False)["input_ids"])[:longest]
        for prompt in chosen
    ]
    return PublishProbe(sequences, partial(_ask, config, run, engine), _arithmetic(config), run.groups.control)


def _ask(config: Config, run: RlRun, engine: Engine | None, sequences: Sequence[Sequence[int]]) -> Mapping[str, list]:
    """Log-probs of the sequences by each engine that this rank speaks to, by its name."""
    if engine is None:
        return {}
    if config.rollout.engine is EngineKind.embedded:
        return {f"engine of rank {run.groups.rank}": engine.logprobs(sequences)}
    names = (f"engine {index} ({url})" for index, url in enumerate(engine.urls))
    return dict(zip(names, engine.logprobs_of_each(sequences), strict=True))


def _arithmetic(config: Config) -> str:
    """The coarsest that trainer or engines compute in."""
    if config.precision.fp8 or str(config.sglang.kv_cache_dtype).startswith("fp8"):
        return "fp8"
    used = {str(config.precision.params)}
    if config.rollout.engine is EngineKind.sglang:
        used.add(served_dtype(config))
    return next(name for name in ("fp8", "bf16", "fp32") if name in used)


def memory_figures(config: Config, groups: Groups) -> Callable[[], dict[str, float]]:
    """What reads the memory that this rank, and on the rank that speaks to servers they, hold now."""
    from r1mega.parallel.memory import figures

    has_servers = config.stage.loop is Loop.rl and config.rollout.engine is EngineKind.sglang
    processes = shelf_of(config).processes if has_servers and groups.rank == 0 else None
    return partial(figures, groups.device, processes)
