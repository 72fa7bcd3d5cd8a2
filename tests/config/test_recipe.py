"""The numbers of conf/ against those that were published (arXiv 2501.12948v2, 2412.19437), and their arithmetic."""

from __future__ import annotations

import pytest

from r1mega.config import io
from r1mega.config.schedule import has_preferences, max_tokens_at
from r1mega.config.schema_sft import SftConfig
from r1mega.models import cards, hf_fields
from r1mega.models.size import num_parameters
from r1mega.parallel.layout import Layout

SAMPLES, MEAN_TOKENS = 804_745, 5355.3  # of the SFT set, Table 5
STAGES = (
    "cold_start_sft", "r1_zero", "reasoning_rl", "rejection_sampling", "sft_800k", "reward_model_helpful",
    "reward_model_safety", "all_scenario_rl",
)  # fmt: skip
# Learning rates of Table 6, and the parameters of each student as its tensors add up to.
STUDENTS = {
    "qwen_1_5b": (1e-4, 1_777_088_000),
    "qwen_7b": (8e-5, 7_615_616_512),
    "qwen_14b": (7e-5, 14_770_033_664),
    "qwen_32b": (6e-5, 32_763_876_352),
    "llama_8b": (5e-5, 8_030_261_248),
    "llama_70b": (2e-5, 70_553_706_496),
}


def test_every_stage_has_an_experiment_of_the_whole_model(experiment) -> None:
    for stage in STAGES:
        config = experiment(stage)
        assert (config.stage.name, config.model.card) == (stage, "deepseek_v3_671b")
    assert experiment("evaluate_r1").stage.name == "evaluate"


def is_two_epochs(sft: SftConfig, of: int) -> bool:
    """Whether the updates are two epochs in chunks at least 99.9% full, of about as many sequences as published."""
    room = sft.chunks_per_update * sft.max_tokens_per_micro_batch
    assert sft.packing == "window" and room / MEAN_TOKENS == pytest.approx(of, rel=0.05)
    return 0.999 <= 2 * SAMPLES * MEAN_TOKENS / (sft.updates * room) <= 1


def test_supervised_stages(experiment) -> None:
    for name in ("cold_start_sft", "sft_800k"):
        config = experiment(name)
        assert (config.optim.lr, config.optim.min_lr, config.optim.schedule) == (5e-5, 5e-6, "cosine")
        assert (config.sft.batch_size, config.sft.max_length) == (128, 32768)
    assert is_two_epochs(experiment("sft_800k").sft, of=128)
    assert experiment("cold_start_sft").sft.packing == "batch"  # whose lengths are not published
    for kind in ("helpful", "safety"):
        assert experiment(f"reward_model_{kind}").optim.lr == 6e-6


@pytest.mark.parametrize("name", STUDENTS)
def test_distillation(experiment, name: str) -> None:
    config, (lr, parameters) = experiment(f"distill_{name}"), STUDENTS[name]
    assert (config.optim.lr, config.optim.schedule) == (lr, "cosine")
    assert config.optim.min_lr == pytest.approx(lr / 10)
    assert (config.sft.batch_size, config.sft.max_length) == (64, 32768)
    assert is_two_epochs(config.sft, of=64)
    assert config.model.card == f"r1_distill_{name}"
    assert num_parameters(hf_fields.read(cards.folder(config.model.card))) == parameters


@pytest.mark.parametrize("name", ["r1_zero", "reasoning_rl", "all_scenario_rl", "r1_zero_qwen2_5_32b"])
def test_reinforcement_learning(experiment, name: str) -> None:
    config = experiment(name)
    algo = config.algo
    assert (algo.samples_per_round, algo.updates_per_round, algo.group_size) == (8192, 16, 16)
    assert (algo.kl_coef, algo.reference_refresh) == (0.001, 400)
    assert config.optim.lr == (2e-6 if name.endswith("32b") else 3e-6)
    assert config.rollout.max_tokens == 32768
    assert config.rollout.temperature == (0.7 if name == "all_scenario_rl" else 1.0)
    assert algo.clip_high == (0.2 if name.startswith("r1_zero") else 10.0)


def test_r1_zero_doubles_its_length_with_update_8200(experiment) -> None:
    config = experiment("r1_zero")
    begins = range(0, config.algo.updates, config.algo.updates_per_round)
    longer = [update for update in begins if max_tokens_at(config, update) == 65536]
    assert {max_tokens_at(config, update) for update in begins} == {32768, 65536}
    assert longer[0] == 8208  # the first rollout that begins at 8,200 or later
    assert max_tokens_at(config, 8199) == 32768 and max_tokens_at(config, 8200) == 65536


def test_preferences_count_in_the_last_400_updates(experiment) -> None:
    config = experiment("all_scenario_rl")
    begins = range(0, config.algo.updates, config.algo.updates_per_round)
    judged = [update for update in begins if has_preferences(config, update)]
    assert len(judged) * config.algo.updates_per_round == 400
    assert config.reward.preference_from == 1300
    assert not has_preferences(config, 1299) and has_preferences(config, 1300)


def test_the_layouts_of_the_671b_model_are_those_published(section) -> None:
    sizes = {"pp16_ep64": 2048, "pp16_ep32": 512, "tp8_pp16_ep8": 256, "tp8_pp16_ep8_dp1": 128, "tp8_pp12_ep8": 96}
    fields = hf_fields.read(cards.folder("deepseek_v3_671b"), allow_fp8=True)
    for name, world in sizes.items():
        parallel = section("parallel", name)
        layout = Layout.of(**parallel.sizes())
        assert (layout.world_size, layout.problems(fields.shape())) == (world, [])
        assert sum(layout.chunk_layers(61)) == 61
    wrong = Layout(pp=16, ep=64, dp=128)
    assert any("num_hidden_layers = 61" in text for text in wrong.problems(fields.shape()))


@pytest.mark.parametrize(
    ("override", "value"), [("[]", []), ("[[800,65536]]", [[800, 65536]]), ("[[1,2],[3,4]]", [[1, 2], [3, 4]])]
)
def test_a_schedule_can_be_replaced_on_the_command_line(composed, override: str, value: list) -> None:
    config = io.typed(composed("experiment=r1_zero", f"rollout.max_tokens_from={override}"))
    assert config.rollout.max_tokens_from == value
