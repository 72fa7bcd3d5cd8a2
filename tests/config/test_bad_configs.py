"""Forty and more faulty configurations: each is answered with all its faults at once, and nothing is started."""

from __future__ import annotations

import copy
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from r1mega.config.faults import ConfigError
from r1mega.config.schema import Config
from r1mega.launch import local, preflight
from r1mega.models import cards

LIMIT_SECONDS = 10.0
CUDA = "device.type=cuda"
SERVERS = ["rollout.engine=sglang", "sglang.python={python}"]
SLURM = ["cluster.scheduler=slurm", "cluster.nodes=2", "cluster.gpus_per_node=8"]
SFT = ["stage.loop=sft", "data.format=sft", "data.train={sft}"]

# Overrides (with {model}, {qa}, {sft}, {run}, {python} for sound input) -> the field of each fault, in order.
BAD: list[tuple[list[str], list[str]]] = [
    (["parallel.tp=3"], ["parallel.tp"] * 3 + ["parallel.tp"]),
    (["parallel.pp=3", "rollout.top_p=0"], ["rollout.top_p", "parallel.pp"]),
    (["parallel.ep=2"], ["parallel.ep"]),
    (["parallel.ep=3", "parallel.dp=3"], ["parallel.ep"]),
    (["parallel.pp=2", "parallel.stages=[3,2]", "algo.kl_coef=-1"], ["algo.kl_coef", "parallel.stages"]),
    (["parallel.pp=2", "parallel.stages=[4]"], ["parallel.stages"]),
    (["parallel.vpp=2"], ["parallel.vpp"]),
    (["parallel.tp=0", "parallel.dp=-1"], ["parallel.tp", "parallel.dp"]),
    (["parallel.overlap_param_gather=true"], ["parallel.overlap_param_gather"]),
    (["parallel.dispatcher=flex", "precision.moments=bf16"], ["parallel.dispatcher", "precision.moments"]),
    (["model.hf=''", "data.train=''", "run.dir=''"], ["run.dir", "model.hf", "data.train"]),
    (["model.hf={run}/none", "data.train={run}/none.jsonl"], ["model.hf", "data.train"]),
    (["model.tokenizer={run}", "data.eval={run}/none.jsonl"], ["model.tokenizer", "data.eval"]),
    (["model.card=deepseek_v4", "algo.group_size=1"], ["algo.group_size", "model.card"]),
    (["model.card=qwen2_5_32b"], ["model.hf"]),
    (["data.train={sft}"], ["data.train"]),
    (["data.format=sft", "data.train={sft}"], ["data.format"]),
    ([*SFT, "data.eval={qa}", "sft.batch_size=1", "parallel.dp=2"], ["data.eval", "sft.batch_size"]),
    ([*SFT, "sft.max_length=9000", "sft.max_tokens_per_micro_batch=4000"], ["sft.max_length", "sft.max_length"]),
    ([*SFT, "optim.min_lr=1", "optim.warmup_updates=101"], ["optim.min_lr", "optim.warmup_updates"]),
    (["algo.updates_per_round=5", "algo.questions_per_round=3"], ["algo.updates_per_round"]),
    (["algo.updates_per_round=16", "algo.updates=100"], ["algo.updates"]),
    (
        ["algo.updates_per_round=16", "algo.updates=96", "algo.reference_refresh=100", "checkpoint.every=20"],
        ["checkpoint.every", "algo.reference_refresh"],
    ),
    (["algo.questions_per_round=1", "parallel.dp=32"], ["algo.updates_per_round"]),
    (["rollout.max_tokens=9000"], ["rollout.max_tokens"]),
    (["rollout.max_tokens_from=[[50,9000]]"], ["rollout.max_tokens_from"]),
    (["rollout.max_tokens_from=[[100,2000],[0,7]]"], ["rollout.max_tokens_from"] * 2),
    (
        ["rollout.max_tokens_from=[[50,3500]]", "algo.max_tokens_per_micro_batch=3600"],
        ["rollout.max_tokens_from"],
    ),
    (["data.general={qa}", "data.general_share=1"], ["data.general_share", "data.general"]),
    (
        ["data.general={run}/none.jsonl", "reward.helpful=1", "reward.preference_from=100"],
        ["reward.preference_from", "data.general", "reward.helpful_model"],
    ),
    (["reward.accuracy=0", "reward.format=0"], ["reward"]),
    (["rollout.engine=sglang", "sglang.python={run}/python"], ["sglang.python"]),
    ([*SERVERS, "sglang.ep=2", "sglang.max_cached_tokens=100"], ["sglang.ep", "sglang.max_cached_tokens"]),
    ([*SERVERS, "sglang.dtype=fp8", "sglang.deterministic=true"], ["sglang.dtype", "sglang.deterministic"]),
    (
        [*SERVERS, "sglang.redundant_experts=8", "sglang.speculative_steps=1", "model.mtp=drop"],
        ["sglang.speculative_steps"] * 2 + ["sglang.redundant_experts"] * 2,
    ),
    (
        [*SERVERS, "sglang.hosts=[a,b]", "sglang.transport=ipc"],
        ["sglang.transport", "sglang.hosts", "sglang.remote", "sglang.weights_dir"],
    ),
    (["rollout.over_sampling=2", "rollout.max_staleness=1"], ["rollout.over_sampling", "rollout.max_staleness"]),
    (["rollout.router_replay=true", "rollout.engines=2"], ["rollout.engines", "rollout.router_replay"]),
    (["memory.recompute=selective", "memory.recompute_modules=[moe_act]"], ["memory.recompute_modules"]),
    (["memory.recompute=full", "memory.recompute_num_layers=3"], ["memory.recompute_num_layers"]),
    ([*SLURM], ["cluster.scheduler"]),
    ([*SLURM, "parallel.dp=16", "parallel.ep=16"], ["cluster.scheduler", "parallel.ep"]),
    ([*SLURM, *SFT, "parallel.dp=32", "sft.batch_size=4"], ["cluster.scheduler", "parallel.dp", "sft.batch_size"]),
    ([*SLURM, CUDA, "parallel.dp=4"], ["cluster.scheduler", "parallel.dp", "device.type"]),
    ([CUDA, "cluster.exact=true", "cluster.gpus_per_node=8"], ["parallel.dp", "device.type"]),
    (
        ["device.layer_spec=te", "precision.fp8=true"],
        ["device.layer_spec", "precision.fp8", "precision.fp8", "precision.params"],
    ),
    (["cluster.nodes=0", "cluster.disk_gb_per_s=0"], ["cluster.nodes", "cluster.disk_gb_per_s"]),
    (["checkpoint.keep_best=2", "checkpoint.keep_newest=0"], ["checkpoint.keep_newest", "checkpoint.keep_best"]),
    (
        ["stage.loop=reject", "rollout.top_p=2", "curate.samples=0", "curate.min_language=2"],
        ["rollout.top_p", "curate.samples", "curate.min_language"],
    ),
    (
        ["stage.loop=reject", "curate.prompt=Why?", "curate.special_tokens=[a]", "curate.form=any"],
        ["curate.prompt", "curate.special_tokens", "curate.form"],
    ),
    (
        ["stage.loop=reject", "curate.examples=none.jsonl", "curate.benchmarks=[none.jsonl]"],
        ["curate.examples", "curate.examples", "curate.benchmarks"],
    ),
    (["stage.loop=reject", "curate.prompt='{examples}{question}'"], ["curate.examples"]),
    (
        ["stage.loop=reject", "model.init=random", "reward.helpful=1", "reward.length=1", "rollout.max_staleness=1"],
        ["model.init", "reward.helpful", "reward.length", "rollout.max_staleness"],
    ),
    (
        ["stage.loop=reject", "curate.check_responses=true", "reward.judge=1"],
        ["curate.check_responses", "reward.judge_url", "reward.judge_model"],
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def sound(section: Callable) -> Config:
    """What composes with no option chosen, as in conf/config.yaml."""
    config = Config()
    for group, name in {
        "stage": "rl", "model": "load", "precision": "fp32", "device": "cpu", "data": "qa", "rollout": "embedded",
    }.items():  # fmt: skip
        setattr(config, group, section(group, name))
    return config


def overridden(config: Config, given: list[str]) -> Config:
    """A copy with overrides, read as Hydra reads them; much faster than a whole composition."""
    config, sections = copy.deepcopy(config), {}
    for text in given:
        section, _, rest = text.partition(".")
        sections.setdefault(section, []).append(rest)
    for section, fields in sections.items():
        schema = OmegaConf.structured(getattr(config, section))
        setattr(config, section, OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.from_dotlist(fields))))
    return config


@pytest.fixture
def answered(sound: Config, inputs, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], list[str]]:
    """`answered(overrides)` -> every fault that `r1mega train` answers with, having started and written nothing."""

    def started(*_arguments: object, **_options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr("r1mega.launch.supervise.run_world", started)
    monkeypatch.setattr("subprocess.Popen", started)
    places = {
        "model": str(inputs.model), "qa": str(inputs.qa), "sft": str(inputs.sft), "run": str(inputs.run),
        "python": sys.executable,
    }  # fmt: skip

    def run(overrides: list[str], answer: Callable[[Config], object] = local.run) -> list[str]:
        given = ["model.hf={model}", "data.train={qa}", "run.dir={run}", *overrides]
        for name, path in places.items():
            given = [text.replace(f"{{{name}}}", path) for text in given]
        config = overridden(sound, given)
        before = time.process_time()
        with pytest.raises(ConfigError) as refused:
            answer(config)
        assert time.process_time() - before < LIMIT_SECONDS
        assert not inputs.run.exists()
        return [str(fault) for fault in refused.value.faults]

    return run


def test_there_are_forty() -> None:
    assert len(BAD) >= 40


@pytest.mark.parametrize(("overrides", "fields"), BAD, ids=[" ".join(overrides) for overrides, _ in BAD])
def test_each_is_answered_with_all_its_faults(answered: Callable, overrides: list[str], fields: list[str]) -> None:
    found = answered(overrides)
    assert sorted(text.partition(":")[0] for text in found) == sorted(fields), found
    for text in found:
        assert text.count("; ") >= 1, f"without a rule and a remedy: {text}"


def test_sound_input_is_not_answered_with_a_fault(answered: Callable) -> None:
    """The negative control; without the checks of whole files, of which the tiny checkpoint has none."""
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        answered([], lambda config: preflight.require(config, ()))


def student(inputs, **changes: object) -> None:
    raw = json.loads((cards.folder("r1_distill_qwen_1_5b") / "config.json").read_text())
    (inputs.model / "config.json").write_text(json.dumps(raw | changes))


def test_a_base_that_was_not_prepared_for_distillation(answered: Callable, inputs) -> None:
    student(inputs, max_position_embeddings=4096, tie_word_embeddings=True)
    found = answered([*SFT, "model.card=r1_distill_qwen_1_5b", "sft.batch_size=0"])
    assert [text.partition(";")[0] for text in found] == [
        "sft.batch_size: got 0",
        "model.hf: got max_position_embeddings=4096",
        "model.hf: got tie_word_embeddings=true",
    ]
    convert = f"python tools/convert_checkpoint.py hf-to-hf --hf {inputs.model} --out DIR --dtype bf16 --set"
    assert f"{convert} max_position_embeddings=131072, or" in found[1]
    assert f"{convert} tie_word_embeddings=false, or" in found[2]


def test_every_field_that_differs_from_the_card_is_named(answered: Callable, inputs) -> None:
    wrong = {"hidden_size": 1024, "num_hidden_layers": 24, "rope_theta": 5000, "rms_norm_eps": 1e-5, "vocab_size": 9}
    student(inputs, **wrong)
    found = answered(["model.card=r1_distill_qwen_1_5b"])
    # The width of a head follows from two of them: 1024 / 12.
    named = {text.partition("got ")[2].partition("=")[0] for text in found}
    assert named == {*wrong, "head_dim"}
    assert all("name a checkpoint of r1_distill_qwen_1_5b" in text for text in found if "hidden_size" in text)


def test_another_spelling_of_the_same_model_is_the_card(answered: Callable, inputs) -> None:
    student(inputs, rope_theta=None, rope_parameters={"rope_type": "default", "rope_theta": 10000}, use_mrope=False)
    (found,) = answered(["model.card=r1_distill_qwen_1_5b", "rollout.top_p=2"])
    assert found.startswith("rollout.top_p")


def test_no_room_on_the_disk(answered: Callable, inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    student(inputs)
    free = 20_000_000_000
    monkeypatch.setattr("r1mega.launch.check_disk.shutil.disk_usage", lambda _path: type("", (), {"free": free}))
    overrides = ["checkpoint.every=1", "algo.max_tokens_per_micro_batch=99999", "precision.params=bf16"]
    found = answered(overrides)
    # 1,777,088,000 parameters x (bf16 weights 2 + reference 2 + fp32 master 4 + moments 8) = 28.4 GB; export 3.6 GB.
    assert found == [
        f"run.dir: got 20.0 GB free at {inputs.run}; needs about 88.9 GB: 3 checkpoints of 28.4 GB + 1 exports of 3.6 "
        "GB; choose a place with more room, or lower checkpoint.keep_newest or checkpoint.keep_best, or raise "
        "export.every or set export.hf=false"
    ]
    free = 90_000_000_000
    (found,) = answered([*overrides, "rollout.top_p=2"])
    assert found.startswith("rollout.top_p")


def cpu_seconds() -> float:
    """Of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(
    ("overrides", "fields"),
    [
        (["parallel.tp=3", "algo.updates_per_round=7", "rollout.top_p=2"], ["parallel.tp", "algo.updates", "rollout"]),
        (["experiment=all_scenario_rl", "parallel.pp=7", "data.general=none.jsonl"], ["parallel.dp", "data.general"]),
        (["experiment=rejection_sampling", "curate.samples=0"], ["curate.samples", "cluster.scheduler"]),
    ],
)  # fmt: skip
def test_on_the_command_line(inputs, tmp_path: Path, overrides: list[str], fields: list[str]) -> None:
    before = sorted(tmp_path.iterdir())
    began, used = time.monotonic(), cpu_seconds()
    argv = [sys.executable, "-m", "r1mega.cli", "train", *inputs.overrides(), *overrides]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    seconds, used = time.monotonic() - began, cpu_seconds() - used
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert all(f"\n  {field}" in done.stderr for field in fields), done.stderr
    assert sorted(tmp_path.iterdir()) == before
    print(f"answered in {seconds:.1f} s, of which {used:.1f} s computing")
    assert used < LIMIT_SECONDS  # what an idle machine would show, whatever else this one is doing
