"""A configuration -> what scores beyond rules: reward models on the trainer's ranks, a judge over HTTP."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from r1mega.config.check_reward_model import MODELS
from r1mega.config.choices import Mtp
from r1mega.config.schema import Config
from r1mega.loop.wire_publish import torch_dtype
from r1mega.models import hf_fields
from r1mega.parallel.groups import Groups
from r1mega.reward.code import CodeLimits
from r1mega.reward.compose import NAMES, RuleSettings
from r1mega.types import DOMAIN_OF

if TYPE_CHECKING:
    from r1mega.models.hf_config import ModelOptions
    from r1mega.reward.judge import Judge, Scorer
    from r1mega.train.reward_model import FrozenRewardModel


def reward_models_of(config: Config, groups: Groups) -> dict[str, FrozenRewardModel]:
    """The reward models that have a weight, in the policy's layout. Collective."""
    from r1mega.models.hf_io import CheckpointReader
    from r1mega.train.reward_model import FrozenRewardModel

    found = {}
    for name in MODELS:
        if getattr(config.reward, name):
            fields = hf_fields.read(getattr(config.reward, f"{name}_model"))
            # What steers the router while it trains has no place in a model that is only asked.
            options = replace(model_options(config), router_bias_update_rate=0.0, router_balance_coef=0.0)
            found[name] = FrozenRewardModel(fields, groups, replace(options, recompute="none", freezes_mtp=False))
            found[name].load(CheckpointReader(fields.path.parent))
    return found


def rule_of(config: Config) -> tuple[dict[str, float], RuleSettings]:
    """Weights and settings of the rewards that see a response's text."""
    reward = config.reward
    code = CodeLimits(reward.code_test_seconds, reward.code_total_seconds, reward.code_memory_mib, str(reward.sandbox))
    # Evaluations show accuracy and format, whatever they weigh.
    weights = {name: getattr(reward, name) for name in NAMES}
    weights = {name: weight for name, weight in weights.items() if weight != 0 or name in ("accuracy", "format")}
    elsewhere = {domain for name, domain in DOMAIN_OF.items() if getattr(reward, name)}
    elsewhere |= set(reward.judge_domains) if reward.judge else set()
    return weights, RuleSettings(code, reward.language_target, frozenset(elsewhere))


def judge_of(config: Config, scorer: Scorer) -> tuple[Judge | None, Scorer]:
    """The judge where it has a weight, and the scorer with its verdicts."""
    reward = config.reward
    if not reward.judge:
        return None, scorer
    from r1mega.reward.judge import Endpoint, Judge, with_judge

    assert reward.judge_url is not None and reward.judge_model is not None
    judge = Judge(
        Endpoint(
            reward.judge_url, reward.judge_model, reward.judge_seconds, reward.judge_attempts, reward.judge_in_flight
        )
    )
    return judge, with_judge(scorer, judge, reward.judge, frozenset(reward.judge_domains))


def model_options(config: Config) -> ModelOptions:
    """What the run chooses about its model."""
    from r1mega.models.hf_config import ModelOptions

    model, memory = config.model, config.memory
    return ModelOptions(
        params_dtype=torch_dtype(config.precision.params),
        fp8=config.precision.fp8,
        emulate_fp8=config.precision.emulate_fp8,
        dispatcher=str(config.parallel.dispatcher),
        fuse_weight_gradients=config.device.fuse_weight_gradients,
        layer_spec=str(config.device.layer_spec),
        router_bias_update_rate=model.moe_router_bias_update_rate,
        router_balance_coef=model.router_balance_coef,
        freezes_mtp=model.mtp is Mtp.freeze,
        recompute=str(memory.recompute),
        recompute_modules=tuple(memory.recompute_modules),
        recompute_num_layers=memory.recompute_num_layers,
    )
