from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from r1mega.config import choices, schema
from r1mega.config.check import BOUNDS, check, longest_response, value_at
from r1mega.config.registry import fields
from r1mega.config.schema import Config


@pytest.fixture
def good(tmp_path: Path) -> Config:
    """A configuration without a fault; the check looks at the checkpoint's files, not into the data."""
    checkpoint = tmp_path / "hf"
    checkpoint.mkdir()
    (checkpoint / "tokenizer.json").write_text("{}")
    save_file({"x": np.zeros(3, dtype=np.float32)}, checkpoint / "model.safetensors")
    return Config(
        run=schema.RunConfig(dir=str(tmp_path / "run")),
        stage=schema.StageConfig(loop=choices.Loop.rl),
        model=schema.ModelConfig(hf=str(checkpoint), init=choices.Init.load),
        precision=schema.PrecisionConfig(params=choices.ParamDtype.fp32),
        device=schema.DeviceConfig(type=choices.DeviceType.cpu),
        data=schema.DataConfig(train="train.jsonl", format=choices.DataFormat.qa),
        rollout=schema.RolloutConfig(engine=choices.EngineKind.embedded),
    )


def with_values(config: Config, **values: object) -> Config:
    """A copy with `section__field=value` replaced."""
    for key, value in values.items():
        section, name = key.split("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


def messages(config: Config, **values: object) -> list[str]:
    return [str(fault) for fault in check(with_values(config, **values))]


SERVERS = {
    "rollout__engine": choices.EngineKind.sglang,
    "rollout__engines": 3,  # more than there are training processes
    "sglang__python": sys.executable,
}
FAR = SERVERS | {"sglang__hosts": ["a", "b", "c"], "sglang__remote": "env X={host}", "sglang__weights_dir": "/dev/shm"}
SFT = {"stage__loop": choices.Loop.sft, "data__format": choices.DataFormat.sft}
EMULATED = {
    "precision__params": choices.ParamDtype.bf16, "precision__fp8": True, "precision__emulate_fp8": True,
}  # fmt: skip


def test_a_good_configuration_has_no_fault(good: Config) -> None:
    assert check(good) == []
    assert messages(good, **SFT) == []
    assert messages(good, **SERVERS) == []
    assert messages(good, **SERVERS, sglang__router=True) == []
    assert messages(good, **EMULATED) == []  # on a CPU, without Transformer Engine
    assert messages(good, **FAR) == []
    assert messages(good, **SFT, **SERVERS | {"sglang__python": "/none/python"}) == []  # nothing is generated


def test_every_number_of_the_schema_is_bounded() -> None:
    numbers = {entry.path for entry in fields() if entry.type.rstrip("?") in ("int", "float")}
    assert {path for path, _ in BOUNDS} == numbers


@pytest.mark.parametrize(("path", "bounds"), BOUNDS, ids=[path for path, _ in BOUNDS])
def test_each_bound_refuses_what_lies_outside(good: Config, path: str, bounds: tuple[tuple[str, float], ...]) -> None:
    for sign, bound in bounds:
        outside = {">=": bound - 1, ">": bound, "<": bound, "<=": bound + 1}[sign]
        found = messages(good, **{path.replace(".", "__"): outside})
        assert any(text.startswith(f"{path}: got {outside}; must be ") for text in found), found
    assert any(
        text.startswith(f"{path}: got nan") for text in messages(good, **{path.replace(".", "__"): float("nan")})
    )


def test_all_faults_are_reported_together(good: Config) -> None:
    found = messages(good, run__dir="", model__hf="", data__train="", rollout__top_p=1.5, algo__updates_per_round=5)
    assert [text.partition(":")[0] for text in found] == [
        "rollout.top_p", "run.dir", "model.hf", "data.train", "algo.updates_per_round",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"parallel__dispatcher": choices.Dispatcher.flex},
            "parallel.dispatcher: got flex; needs a GPU (device=cuda); take parallel.dispatcher back to its default",
        ),
        (
            {"precision__moments": choices.ParamDtype.bf16},
            "precision.moments: got bf16; needs a GPU (device=cuda); take precision.moments back to its default",
        ),
        (
            {"device__fuse_weight_gradients": True},
            "device.fuse_weight_gradients: got true; needs a GPU (device=cuda); "
            "take device.fuse_weight_gradients back to its default",
        ),
        (
            {"precision__emulate_fp8": True},
            "precision.emulate_fp8: got true; nothing is in FP8 with precision.fp8=false; use precision=fp8_emulated",
        ),
        (
            EMULATED | {"precision__params": choices.ParamDtype.fp32},
            "precision.params: got fp32; FP8 training keeps its other numbers in bf16; use precision=fp8_emulated",
        ),
        (
            {"parallel__overlap_param_gather": True},
            "parallel.overlap_param_gather: got true; parameters are gathered by the buckets gradients are reduced in; "
            "set parallel.overlap_grad_reduce=true",
        ),
        (
            {"memory__recompute": choices.Recompute.selective, "memory__recompute_modules": ["layernorm"]},
            "memory.recompute_modules: got layernorm; must be among core_attn, mlp, moe, shared_experts with "
            "device.layer_spec=torch; take it out of the list",
        ),
        (
            {
                "memory__recompute": choices.Recompute.selective,
                "memory__recompute_modules": ["moe"],
                "model__router_balance_coef": 0.1,
            },
            "memory.recompute_modules: got moe; the router counts tokens by sequence, which it cannot while its module "
            "is recomputed alone; recompute whole layers (memory.recompute=full), or freeze the router's balance",
        ),
        (
            {
                **SERVERS,
                "memory__recompute": choices.Recompute.selective,
                "memory__recompute_modules": ["moe"],
                "rollout__router_replay": True,
            },
            "memory.recompute_modules: got moe; the router replays by token, which it cannot while its module is "
            "recomputed alone; recompute whole layers (memory.recompute=full), or set rollout.router_replay=false",
        ),
        (
            {"rollout__router_replay": True},
            "rollout.router_replay: got true; the embedded engine does not tell which experts it chose; "
            "use rollout=sglang, or set it to false",
        ),
        (
            {
                "memory__recompute": choices.Recompute.full,
                "memory__recompute_num_layers": 2,
                "model__mtp": choices.Mtp.train,
            },
            "memory.recompute_num_layers: got 2; the multi-token-prediction layer is one layer, and is trained here; "
            "set it to 1",
        ),
        (
            {"checkpoint__keep_best": 1, "data__eval": None},
            "checkpoint.keep_best: got 1; eval/pass_at_1 needs an evaluation; set data.eval or keep_best=0",
        ),
        (
            SERVERS | {"sglang__python": "/none/python"},
            "sglang.python: got /none/python; must be the Python of an environment with SGLang; make it (without a GPU:"
            " make sglang-cpu) or set sglang.python; or use rollout=embedded",
        ),
        (SERVERS | {"sglang__tp": 2, "sglang__ep": 4}, "sglang.ep: got 4; must divide sglang.tp=2; change one of them"),
        (
            SERVERS | {"sglang__tp": 2, "sglang__attn_dp": 3},
            "sglang.attn_dp: got 3; must divide sglang.tp=2; change one of them",
        ),
        (
            SERVERS | {"sglang__transport": choices.Transport.ipc, "device__type": choices.DeviceType.cuda},
            "sglang.transport: got ipc; servers of 3 processes in all cannot be paired with 1 training ones; "
            "change rollout.engines or sglang.tp, or use disk",
        ),
        (
            SERVERS | {"sglang__tp": 2, "sglang__nodes_per_engine": 4},
            "sglang.nodes_per_engine: got 4; must divide sglang.tp=2; change one of them",
        ),
        (
            SERVERS | {"sglang__tp": 2, "sglang__nodes_per_engine": 2, "sglang__transport": choices.Transport.ipc},
            "sglang.transport: got ipc; handles of memory go to processes of the same machine; use disk, or neither "
            "sglang.hosts nor nodes_per_engine",
        ),
        (
            FAR | {"sglang__tp": 2, "sglang__nodes_per_engine": 2},
            "sglang.hosts: got 3 of them; must be one for each of rollout.engines x sglang.nodes_per_engine = 6 "
            "processes; name as many",
        ),
        (
            FAR | {"sglang__remote": None},
            "sglang.remote: got None; must say how a command is started on one of sglang.hosts, with {host} in it; "
            "such as `ssh {host}`",
        ),
        (
            FAR | {"sglang__remote": "ssh a"},
            "sglang.remote: got ssh a; must say how a command is started on one of sglang.hosts, with {host} in it; "
            "such as `ssh {host}`",
        ),
        (
            FAR | {"sglang__remote": "no-such-program {host}"},
            "sglang.remote: got no-such-program; is no program of this machine; install it or name another",
        ),
        *(
            (
                FAR | {"sglang__weights_dir": folder},
                f"sglang.weights_dir: got {folder}; must be a folder that all sglang.hosts see, absolute and without "
                "blanks; name one on a shared file system",
            )
            for folder in (None, "here", "/dev/shm/a b")
        ),
        (
            SERVERS | {"sglang__remote": "ssh {host}"},
            "sglang.remote: got ssh {host}; starts servers on sglang.hosts, which is empty; name the hosts or leave it "
            "out",
        ),
        (
            SERVERS | {"sglang__router": True, "rollout__engines": 1},
            "sglang.router: got true; a router has nothing to choose from; raise rollout.engines or leave it",
        ),
        (
            SERVERS | {"sglang__router": True, "sglang__transport": choices.Transport.ipc},
            "sglang.router: got true; a router cannot be kept from asking a restarted server, which finds its weights "
            "on a disk alone; use sglang.transport=disk",
        ),
        (
            SERVERS | {"sglang__startup_seconds": 299.0, "device__type": choices.DeviceType.cuda},
            "sglang.startup_seconds: got 299; must be at least 300: a server that still compiles would be killed; "
            "raise it",
        ),
        (
            SERVERS | {"sglang__transport": choices.Transport.nccl},
            "sglang.transport: got nccl; needs device.type=cuda, which is cpu; use gloo, ipc or disk",
        ),
        (
            SERVERS | {"sglang__transport": choices.Transport.gloo, "device__type": choices.DeviceType.cuda},
            "sglang.transport: got gloo; needs device.type=cpu, which is cuda; use nccl, ipc or disk",
        ),
        (
            SERVERS | {"sglang__transport": choices.Transport.gloo, "sglang__extra_args": ["--pp-size=2"]},
            "sglang.extra_args: got --pp-size; stages of a server would take the same ranks of the group of gloo; "
            "leave it out, or use sglang.transport=disk",
        ),
        (
            SERVERS | {"sglang__router": True, "rollout__router_replay": True},
            "sglang.router: got true; sglang-router drops the field of a request that asks for the experts; set it to "
            "false, or rollout.router_replay=false",
        ),
        (
            SERVERS | {"sglang__router": True, "rollout__over_sampling": 1.5},
            "sglang.router: got true; sequences that may be stopped or interrupted are asked of servers themselves; "
            "set it to false, or take rounds as wholes",
        ),
        (
            SERVERS | {"sglang__release": True, "rollout__max_staleness": 2},
            "sglang.release: got true; servers generate beside the training with rollout.max_staleness=2; set one of "
            "them to its default",
        ),
        (
            SERVERS | {"sglang__dtype": choices.EngineDtype.fp8},
            "sglang.dtype: got fp8; SGLang serves FP8 on CUDA alone, and device.type is cpu; use bf16 or fp32",
        ),
        (
            SERVERS | {"sglang__recovery_copy": True},
            "sglang.recovery_copy: got true; sglang.transport=disk writes each version already; set it to false",
        ),
        (
            SERVERS | {"sglang__max_cached_tokens": 1535},
            "sglang.max_cached_tokens: got 1535; must hold the longest prompt and response, 1536 tokens; raise it",
        ),
        (
            SERVERS | {"rollout__max_tokens": 70000, "algo__max_tokens_per_micro_batch": 80000},
            "sglang.max_cached_tokens: got 65536; must hold the longest prompt and response, 70512 tokens; raise it",
        ),
        (
            {"rollout__engines": 3, "parallel__tp": 2},
            "rollout.engines: got 3; must be at most the 2 training processes that can host an engine; "
            "use at most 2, or a larger layout",
        ),
        (
            {"device__layer_spec": choices.LayerSpec.te},
            "device.layer_spec: got te; Transformer Engine needs a GPU; use device.layer_spec=torch",
        ),
        (
            {"data__format": choices.DataFormat.sft},
            "data.format: got sft; stage.loop=rl reads qa rows; use data=qa, or stage=sft",
        ),
        (
            {**SFT, "data__eval": "x.jsonl"},
            "data.eval: got x.jsonl; stage.loop=sft has no held-out evaluation; set data.eval=null",
        ),
        (
            {"reward__length": 1.0, "reward__length_buffer": 4096, "rollout__max_tokens": 1024},
            "reward.length_buffer: got 4096; must be at most rollout.max_tokens=1024, or every response is penalised; "
            "lower it or raise rollout.max_tokens",
        ),
        (
            {"reward__sandbox": choices.Sandbox.unsafe_rlimits, "reward__workers": 0},
            "reward.sandbox: got unsafe_rlimits; without a worker, what programs leave behind cannot be told from the "
            "trainer's own processes; set reward.workers or use bubblewrap",
        ),
        (
            {"reward__language_target": "tlh"},
            "reward.language_target: got tlh; must be one of en, zh, ru, ko, ar, el, he, hi, or null; "
            "choose one of them",
        ),
        (
            {"reward__accuracy": 0.0, "reward__format": 0.0},
            "reward: got accuracy=0, format=0; at least one weight must be positive; "
            "set reward.accuracy or reward.format",
        ),
        (
            {"optim__min_lr": 1e-3, "optim__lr": 1e-4},
            "optim.min_lr: got 0.001; must be at most optim.lr=0.0001; lower optim.min_lr or raise optim.lr",
        ),
        (
            {"optim__warmup_updates": 101},
            "optim.warmup_updates: got 101; must be at most algo.updates=100; shorten the warm-up",
        ),
        (
            # 3 questions x 16 samples = 48 samples, which 5 does not divide.
            {"algo__questions_per_round": 3, "algo__updates_per_round": 5},
            "algo.updates_per_round: got 5; must divide the round's questions_per_round=3 x group_size=16 = 48 "
            "samples; change it or algo.questions_per_round",
        ),
        (
            {"algo__updates": 10, "algo__updates_per_round": 4},
            "algo.updates: got 10; must be whole rounds of algo.updates_per_round=4 updates; use for example 8",
        ),
        (
            {"algo__reference_refresh": 6, "algo__updates_per_round": 4},
            "algo.reference_refresh: got 6; must be whole rounds of algo.updates_per_round=4 updates; "
            "use for example 8",
        ),
        (
            {"algo__questions_per_round": 1, "algo__group_size": 2, "algo__updates_per_round": 2, "parallel__dp": 2},
            "algo.updates_per_round: got 1 samples an update (questions_per_round=1 x group_size=2 = 2 samples, "
            "2 updates); must be at least parallel.dp=2: each replica needs a sample; "
            "lower it or raise algo.questions_per_round",
        ),
        (
            {**SFT, "sft__batch_size": 2, "parallel__dp": 4},
            "sft.batch_size: got 2; must be at least parallel.dp=4: each replica needs a sequence; "
            "raise sft.batch_size",
        ),
        (
            {**SFT, "sft__packing": choices.Packing.window, "sft__chunks_per_update": 10, "parallel__dp": 4},
            "sft.chunks_per_update: got 10; sft.packing=window needs a multiple of parallel.dp=4: each replica takes "
            "alike many; use for example 8",
        ),
        (
            {**SFT, "sft__packing": choices.Packing.window, "parallel__pp": 4, "parallel__vpp": 2, "parallel__dp": 2},
            "sft.chunks_per_update: got 0; sft.packing=window needs a multiple of parallel.dp=2 x parallel.pp=4: an "
            "interleaved pipeline takes whole rounds of it; use for example 8",
        ),
        (
            {"data__max_prompt_tokens": 100, "rollout__max_tokens": 50, "algo__max_tokens_per_micro_batch": 149},
            "rollout.max_tokens: got 50 after prompts of up to data.max_prompt_tokens=100; the longest sequence, 150 "
            "tokens, must fit algo.max_tokens_per_micro_batch=149; lower it or raise algo.max_tokens_per_micro_batch",
        ),
    ],
)
def test_rules_between_fields(good: Config, values: dict[str, object], message: str) -> None:
    assert messages(good, **values) == [message]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"device__layer_spec": choices.LayerSpec.te},
            "precision.emulate_fp8: got true; emulated products are those of plain torch, and device.layer_spec=te; "
            "set device.layer_spec=torch, or use precision=fp8",
        ),
        (
            {"device__fuse_weight_gradients": True},
            "device.fuse_weight_gradients: got true; apex's kernel knows no emulated FP8; "
            "set device.fuse_weight_gradients=false",
        ),
    ],
)
def test_emulated_fp8_is_of_plain_torch(good: Config, values: dict[str, object], message: str) -> None:
    """Beside what else speaks against it on this machine."""
    assert message in messages(good, **EMULATED | values)


def test_emulated_fp8_wants_no_transformer_engine(good: Config) -> None:
    cuda = {"device__type": choices.DeviceType.cuda}
    told = {text.partition(":")[0] for text in messages(good, **EMULATED | cuda)}
    assert told == {text.partition(":")[0] for text in messages(good, **cuda)}
    assert messages(good, **EMULATED | {"precision__emulate_fp8": False})[0].startswith(
        "precision.fp8: got true; needs"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            SERVERS | {"sglang__deterministic": True},
            "sglang.deterministic: got true; needs a GPU (device=cuda); take sglang.deterministic back to its default",
        ),
        (
            SERVERS | {"sglang__kv_cache_dtype": choices.KvCacheDtype.fp8_e4m3},
            "sglang.kv_cache_dtype: got fp8_e4m3; needs a GPU",
        ),
        (
            SERVERS | {"sglang__moe_a2a_backend": choices.MoeA2aBackend.deepep},
            "sglang.moe_a2a_backend: got deepep; needs a GPU",
        ),
        (
            SERVERS | {"sglang__moe_a2a_backend": choices.MoeA2aBackend.deepep, "sglang__tp": 4, "sglang__ep": 2},
            "sglang.moe_a2a_backend: got deepep; spreads the experts over all ranks of a server, and sglang.ep=2 of 4; "
            "set sglang.ep=4",
        ),
        (
            SERVERS | {"sglang__speculative_steps": 2, "model__mtp": choices.Mtp.drop},
            "sglang.speculative_steps: got 2; drafts with the multi-token-prediction layer, which model.mtp=drop",
        ),
        (
            SERVERS | {"sglang__speculative_steps": 2, "sglang__transport": choices.Transport.ipc},
            "sglang.speculative_steps: got 2; the layer's checkpoint tensors do not travel with sglang.transport=ipc",
        ),
        (
            SERVERS | {"sglang__redundant_experts": 16, "sglang__verify_share": 0.0},
            "sglang.redundant_experts: got 16; copies are spread over expert parallel ranks, of which sglang.ep=1 has",
        ),
        (
            SERVERS | {"sglang__redundant_experts": 16, "sglang__tp": 2, "sglang__ep": 2},
            "sglang.redundant_experts: got 16; the checksums of parameters with copies cannot be worked out; "
            "set sglang.verify_share=0 and keep rollout.probe_sequences",
        ),
        (
            SERVERS
            | {
                "sglang__redundant_experts": 16,
                "sglang__tp": 2,
                "sglang__ep": 2,
                "sglang__transport": choices.Transport.ipc,
            },
            "sglang.redundant_experts: got 16; only SGLang knows which rank holds which copy",
        ),
    ],
)
def test_what_servers_cannot_give_here_or_not_together(good: Config, values: dict[str, object], message: str) -> None:
    assert any(text.startswith(message) for text in messages(good, **values)), messages(good, **values)


def test_what_servers_can_give_together(good: Config) -> None:
    """On GPUs: nothing is found but that this machine has none of what they need."""
    values = SERVERS | {
        "device__type": choices.DeviceType.cuda, "sglang__tp": 4, "sglang__ep": 4, "sglang__redundant_experts": 16,
        "sglang__moe_a2a_backend": choices.MoeA2aBackend.deepep, "sglang__speculative_steps": 1,
        "sglang__kv_cache_dtype": choices.KvCacheDtype.fp8_e4m3, "sglang__verify_share": 0.0, "sglang__release": True,
    }  # fmt: skip
    assert [text for text in messages(good, **values) if text.startswith("sglang.")] == []


def test_the_longest_sequence_may_just_fit(good: Config) -> None:
    values = {"data__max_prompt_tokens": 100, "rollout__max_tokens": 50, "algo__max_tokens_per_micro_batch": 150}
    assert messages(good, **values) == []


def test_clip_may_exceed_one(good: Config) -> None:
    assert messages(good, algo__clip_low=10.0, algo__clip_high=10.0) == []


def test_a_directory_that_holds_a_run_is_refused(good: Config) -> None:
    place = Path(good.run.dir)
    place.mkdir()
    assert check(good) == []
    (place / "config.yaml").write_text("")
    (message,) = messages(good)
    assert message == (
        f"run.dir: got {place}; already holds a run (config.yaml); "
        "go on with it (run.resume=true), choose another run.dir, or remove or rename the old one"
    )
    good.run.resume = True
    assert check(good) == []


def test_random_initialisation_needs_no_weights(good: Config) -> None:
    (Path(good.model.hf) / "model.safetensors").unlink()
    assert len(check(good)) == 1
    assert messages(good, model__init=choices.Init.random) == []


def test_a_tokenizer_of_ones_own(good: Config, tmp_path: Path) -> None:
    (message,) = messages(good, model__tokenizer=str(tmp_path / "absent"))
    assert message.startswith(f"model.tokenizer: got {tmp_path / 'absent'}; must hold a tokenizer")


def test_the_longest_response_looks_at_evaluation_only_where_there_is_one(good: Config) -> None:
    longer = with_values(good, evaluate__max_tokens=5000)
    assert longest_response(longer) == ("rollout.max_tokens", 1024)
    assert longest_response(with_values(longer, data__eval="e.jsonl")) == ("evaluate.max_tokens", 5000)
    assert longest_response(with_values(longer, **SFT)) == ("sft.max_length", 2048)
    assert value_at(longer, "evaluate.max_tokens") == 5000


STREAMED = ({"rollout__over_sampling": 1.25}, {"rollout__max_staleness": 1}, {"rollout__max_staleness": 2})


@pytest.mark.parametrize("values", STREAMED)
def test_rollouts_beyond_a_round_need_servers(good: Config, values: dict[str, object]) -> None:
    assert messages(good, **SERVERS, **values) == []
    (path,) = [name.replace("__", ".") for name in values]
    (message,) = messages(good, **values)
    assert message.startswith(f"{path}: got {values[path.replace('.', '__')]}") and "use rollout=sglang" in message


def test_what_runs_beside_the_training_cannot_take_turns_with_it(good: Config) -> None:
    (message,) = messages(good, **SERVERS, rollout__max_staleness=1, memory__offload=True)
    assert message.startswith("rollout.max_staleness: got 1") and "memory.offload" in message


def test_nothing_to_carry(good: Config) -> None:
    (message,) = messages(good, **SERVERS, rollout__carry_partial=True)
    assert message.startswith("rollout.carry_partial: got true") and "rollout.over_sampling=1" in message
    for values in STREAMED:
        assert messages(good, **SERVERS, **values, rollout__carry_partial=True) == []
    assert messages(good, **SFT, rollout__max_staleness=1) == []
