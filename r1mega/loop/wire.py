"""A configuration -> the objects a loop works with. Config objects stop here: everything below takes plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from r1mega.algo.lr import learning_rate
from r1mega.config.checkpoint_files import is_megatron
from r1mega.config.choices import Init, Loop, Mtp
from r1mega.config.schema import Config
from r1mega.data.mixture import MixedSource, read_general
from r1mega.data.prompts import PromptSource, read_qa, tokenize_prompts
from r1mega.loop.checkpoints import Checkpoints, read_pending, restore
from r1mega.loop.rounds import UpdateRecord
from r1mega.loop.runlog import RunLog
from r1mega.loop.state import RunState
from r1mega.loop.turns import Turns
from r1mega.loop.wire_engines import engines_of, memory_figures, probe_of, rollouts_of
from r1mega.loop.wire_publish import torch_dtype
from r1mega.loop.wire_reward import judge_of, model_options, reward_models_of, rule_of
from r1mega.metrics.memory import PhaseMemory
from r1mega.metrics.timer import PhaseTimer
from r1mega.models import hf_fields
from r1mega.models.hf_fields import HfFields
from r1mega.models.hf_score import classifier_changes
from r1mega.parallel import groups as process_groups
from r1mega.parallel.groups import Groups
from r1mega.parallel.layout import Layout
from r1mega.parallel.seed import derive
from r1mega.reward.compose import Rule
from r1mega.reward.pool import RewardPool
from r1mega.types import Prompt, TrainerWeights

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from r1mega.rollout.collector import Collector, Lockstep, Streamed
    from r1mega.train.policy import MegatronPolicy
    from r1mega.train.reward_model import FrozenRewardModel
    from r1mega.weights.probe import PublishProbe

REFERENCE = "reference"
COPIES = (REFERENCE,)  # what RL keeps beside the weights


@dataclass
class Run:
    """What both loops have: the policy, its place in the world, the log."""

    config: Config
    layout: Layout
    groups: Groups
    fields: HfFields
    policy: MegatronPolicy
    tokenizer: PreTrainedTokenizerBase
    log: RunLog
    timer: PhaseTimer
    memory: PhaseMemory
    checkpoints: Checkpoints | None = None
    state: RunState = field(default_factory=RunState)

    @property
    def is_resumed(self) -> bool:
        """Whether the run goes on from a checkpoint."""
        return self.config.run.resume_from is not None

    def mtp_weight(self, num_tokens: int) -> float:
        """Weight of one token's loss two tokens ahead, where that layer is trained."""
        model = self.config.model
        return model.mtp_loss_coef / num_tokens if self.fields.num_mtp_layers and model.mtp is Mtp.train else 0.0

    def learning_rate(self, total_updates: int) -> float:
        """The learning rate of the update that comes next."""
        optim = self.config.optim
        return learning_rate(
            self.state.update,
            lr=optim.lr,
            min_lr=optim.min_lr,
            schedule=str(optim.schedule),
            warmup_updates=optim.warmup_updates,
            total_updates=total_updates,
        )

    def export(self, name: str) -> Path:
        """Write the policy as a Hugging Face checkpoint into the run directory. Collective; rank 0 writes."""
        return export(self.policy, self.fields, self.config, name, writes=self.groups.rank == 0)


@dataclass
class RlRun(Run):
    """What the RL loop has besides."""

    publish: Callable[[TrainerWeights, int], None] | None = None  # to every engine, under a version; collective
    turns: Turns = field(default_factory=Turns)
    probe: PublishProbe | None = None
    collector: Collector | None = None  # for evaluations
    rollouts: Lockstep | Streamed | None = None
    prompts: PromptSource | MixedSource | None = None
    reward_models: dict[str, FrozenRewardModel] = field(default_factory=dict)  # by their names in `reward`
    held_out: list[Prompt] = field(default_factory=list)
    updates: list[UpdateRecord] = field(default_factory=list)  # of the round at hand

    def text_of(self, token_ids: Sequence[int]) -> str:
        """The text rewards are given: the response without the end-of-sequence token that closed it."""
        if token_ids and token_ids[-1] == self.tokenizer.eos_token_id:
            token_ids = token_ids[:-1]
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)


@contextmanager
def wire_rl(config: Config) -> Iterator[RlRun]:
    """The RL loop's objects on this rank; all of them are closed at the end, however it comes."""
    total = config.algo.updates
    with wired(config, RlRun, temperature=config.rollout.temperature, total_updates=total) as run:
        from r1mega.rollout.collector import Collector

        data, reward = config.data, config.reward
        prompts = load_prompts(config, data.train, run.tokenizer)
        run.prompts = prompt_source(config, prompts, run.tokenizer)
        run.reward_models = reward_models_of(config, run.groups)
        if run.is_resumed:
            restore(config, run.groups, run.policy, run.state, run.prompts, COPIES)
        if data.eval is not None:
            run.held_out = load_prompts(config, data.eval, run.tokenizer)[: data.eval_limit]
        engine, num_speakers, run.publish = engines_of(config, run)
        run.probe = probe_of(config, run, engine, prompts)
        pool = judge = scorer = None
        if engine is not None:
            pool = RewardPool(partial(Rule, *rule_of(config)), reward.workers, reward.timeout_seconds)
            judge, scorer = judge_of(config, pool.submit)
        run.collector = Collector(engine, num_speakers, run.text_of, scorer, run.groups.control)
        try:
            run.rollouts = rollouts_of(config, run, engine, scorer)
            if run.is_resumed:
                pending = read_pending(Path(config.run.resume_from), with_experts=config.rollout.router_replay)
                run.rollouts.restore(pending)
            yield run
        finally:
            if run.rollouts is not None:
                run.rollouts.close()
            if judge:
                judge.close()
            if pool:
                pool.close()


@contextmanager
def wire_replay(config: Config) -> Iterator[RlRun]:
    """The RL loop's objects without engines, rewards and logs, where the replay starts from."""
    with wired(config, RlRun, temperature=config.rollout.temperature, logs=False) as run:
        if run.is_resumed:
            restore(config, run.groups, run.policy, run.state, None, COPIES)
        else:
            run.policy.keep_copy(REFERENCE)
        yield run


def load_prompts(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The questions of a file, tokenized. Raises ValueError for a malformed row or a prompt over the limit."""
    data = config.data
    prompts = read_qa(path, data.question_key, data.answer_key)
    return tokenize_prompts(prompts, tokenizer, str(data.template), data.max_prompt_tokens)


def prompt_source(
    config: Config, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase
) -> PromptSource | MixedSource:
    """What hands out the questions of each round: those of data.train, and general ones where data.general is given."""
    data, seed = config.data, config.run.seed
    train = PromptSource(prompts, seed, data.shuffle)
    if data.general is None:
        return train
    rows = read_general(data.general, data.question_key)
    general = tokenize_prompts(rows, tokenizer, str(data.template), data.max_prompt_tokens)
    return MixedSource(
        train,
        # A seed of its own: the two orders have nothing to do with each other.
        PromptSource(general, derive(seed, "general"), data.shuffle),
        share=data.general_share,
        begin=config.reward.preference_from,
    )


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The tokenizer of the run. Raises ValueError where its directory holds none."""
    from transformers import AutoTokenizer

    path = config.model.tokenizer or config.model.hf
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model.tokenizer: got {path}; must hold a Hugging Face tokenizer ({reason}); set model.tokenizer"
        ) from None


def export(policy: MegatronPolicy, fields: HfFields, config: Config, name: str, *, writes: bool) -> Path:
    """Write the policy's weights, with the config and tokenizer of its source, to RUN_DIR/name."""
    from r1mega.models.hf_io import CheckpointWriter

    path = Path(config.run.dir) / name
    writer = None
    if writes:
        dtypes = _stored_dtypes(config)
        tokenizer = Path(config.model.tokenizer) if config.model.tokenizer else None
        # What was left out of the model must not be promised by its config.json.
        changes = {"num_nextn_predict_layers": 0} if config.model.mtp is Mtp.drop and fields.is_moe else {}
        if fields.has_score:
            changes |= classifier_changes(fields.family)
        writer = CheckpointWriter(
            path, source=fields.path.parent, dtypes=dtypes, tokenizer=tokenizer, config_changes=changes
        )
    for tensor_name, tensor in policy.export_hf(wanted=writes):
        writer.add(tensor_name, tensor)
    if writer:
        writer.close()
    return path


@contextmanager
def wired(
    config: Config, kind: type, *, temperature: float = 1.0, logs: bool = True, total_updates: int = 0
) -> Iterator[Run]:
    optim = config.optim
    layout = Layout.of(**config.parallel.sizes())
    groups = process_groups.initialize(
        layout,
        str(config.device.type),
        seed=config.run.seed,
        timeout_minutes=config.run.timeout_minutes,
        threads=config.device.threads,
    )
    # Megatron may be imported only now: the device bridge is laid.
    from r1mega.train.optimizer import AdamSettings
    from r1mega.train.policy import MegatronPolicy
    from r1mega.train.reward_model import MegatronRewardModel

    scores = config.stage.loop is Loop.reward_model
    fields = hf_fields.read(config.model.hf, drop_mtp=config.model.mtp is Mtp.drop)
    if scores:
        fields = fields.as_reward_model()
    log = RunLog(
        config,
        enabled=logs and groups.rank == 0,
        model=fields.family,
        layout=str(layout),
        world_size=layout.world_size,
        total_updates=total_updates,
    )
    try:
        adam = AdamSettings(
            lr=optim.lr,
            beta1=optim.beta1,
            beta2=optim.beta2,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            clip_grad=optim.clip_grad,
            moments=torch_dtype(config.precision.moments),
            overlap_grad_reduce=config.parallel.overlap_grad_reduce,
            overlap_param_gather=config.parallel.overlap_param_gather,
        )
        policy_kind = MegatronRewardModel if scores else MegatronPolicy
        policy = policy_kind(fields, groups, model_options(config), adam, temperature=temperature)
        policy.logprob_chunk_tokens = config.memory.logprob_chunk_tokens
        policy.trains_trunk_further = config.stage.loop is Loop.sft
        if config.run.resume_from is None:
            _load(policy, fields, config)
        memory = PhaseMemory(memory_figures(config, groups))
        timer = PhaseTimer(lambda phase: (log.console.phase(phase), memory(phase)), _synchronize(groups))
        checkpoints = Checkpoints(config, groups, policy)
        yield kind(config, layout, groups, fields, policy, load_tokenizer(config), log, timer, memory, checkpoints)
        checkpoints.finish()
    finally:
        log.close()
    process_groups.shutdown()


def _load(policy: MegatronPolicy, fields: HfFields, config: Config) -> None:
    """Fill the weights from what model.init and model.hf say. Collective."""
    from r1mega.models.hf_io import CheckpointReader, RandomWeights
    from r1mega.train.reward_model import WithNewHead

    path, fresh = Path(config.model.hf), RandomWeights(fields, config.run.seed)
    if config.model.init is Init.random:
        policy.load(fresh)
    elif is_megatron(path):
        policy.load_distributed(path / "model")
    else:
        policy.load(WithNewHead(CheckpointReader(path), fresh) if fields.has_score else CheckpointReader(path))


def _stored_dtypes(config: Config) -> dict[str, torch.dtype]:
    """Tensor by tensor the dtype it came in: trained from a bf16 checkpoint in fp32, it goes back to bf16."""
    from r1mega.conversion.megatron_source import MegatronSource
    from r1mega.models.hf_io import CheckpointReader

    path = Path(config.model.hf)
    if config.model.init is Init.random:
        return {}
    return MegatronSource(path).dtypes() if is_megatron(path) else CheckpointReader(path).dtypes()


def _synchronize(groups: Groups):
    import torch

    return torch.cuda.synchronize if groups.device.type == "cuda" else None
