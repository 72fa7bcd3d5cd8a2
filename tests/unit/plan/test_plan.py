"""`r1mega plan` on the command line: its answers, exit codes and the one JSON document."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega.config.faults import ConfigError
from r1mega.models import hf_fields
from r1mega.parallel.layout import Layout
from r1mega.plan import held

REPO = Path(__file__).resolve().parents[3]
V3_512 = [
    "model.card=deepseek_v3_671b", "cluster=h100_64x8", "device=cuda", "precision=bf16", "memory=lean",
    "parallel.tp=8", "parallel.pp=16", "parallel.ep=32", "parallel.dp=4", "rollout=sglang", "sglang.tp=64",
    "parallel.stages=[3,4,4,4,4,4,4,4,4,4,4,4,4,4,4,2]", "sglang.ep=64", "sglang.nodes_per_engine=8",
    "sglang.attn_dp=8", "rollout.engines=8", "sglang.release=true", "algo=r1_zero", "rollout.max_tokens=32768",
    "algo.max_tokens_per_micro_batch=34000", "checkpoint.every=160", "plan.format=json",
]  # fmt: skip


def test_a_run_that_fits(planned):
    code, out, _ = planned(*V3_512)
    document = json.loads(out)
    assert code == 0 and document["fits"] and document["misfits"] == []
    assert document["world_size"] == document["num_gpus"] == 512
    assert document["updates"] == 10_400
    assert document["tokens_per_update"] == 512 * (128 + round(0.3 * 32_768)) + 205  # a quarter of 512, 9,830.4
    assert [rank["coordinate"]["pp"] for rank in document["ranks"]] == list(range(16))
    assert sum(rank["num_ranks"] for rank in document["ranks"]) == 512
    for rank in document["ranks"]:
        assert rank["parameter_bytes"] == 2 * rank["parameters"]
        assert set(rank["bytes"]) == {"train", "logprobs", "reference", "publish", "rollout", "checkpoint"}
        assert max(rank["device_peak"].values()) <= 80 * 2**30
    assert document["total_seconds"] == pytest.approx(10_400 * document["seconds_per_update"])
    assert document["model_elements"] == 671_026_419_200 + 11_610_068_224


def test_a_run_that_does_not_fit_and_what_would_help(planned):
    code, out, _ = planned(*V3_512, "parallel.tp=1", "parallel.dp=32", "memory.recompute=none")
    document = json.loads(out)
    assert code == 1 and not document["fits"]
    assert any(line.startswith("train: pipeline stage") for line in document["misfits"])
    assert any("memory.recompute=full" in line for line in document["suggestions"])


def test_the_suggestions_are_true(planned):
    """What is said to fit does."""
    arguments = [*V3_512, "memory.recompute=none"]
    code, out, _ = planned(*arguments)
    assert code == 1
    override, _, verdict = json.loads(out)["suggestions"][0].partition(":")
    assert verdict.startswith(" fits")
    assert planned(*arguments, *override.split())[0] == 0


def test_everything_that_is_wrong_is_said_at_once(planned):
    code, out, err = planned(
        *V3_512, "parallel.tp=3", "parallel.stages=null", "algo.updates=7", "sglang.ep=5", "memory.offload=false"
    )
    assert (code, out) == (2, "")
    for field in ("parallel.tp: got 3", "parallel.pp: got pp=16", "algo.updates: got 7", "sglang.ep: got 5"):
        assert field in err


def test_no_model_is_named(planned):
    code, out, err = planned("cluster=h100_1")
    assert (code, out) == (2, "")
    assert "model.hf: got nothing" in err and "deepseek_v3_671b" in err


def test_a_table_for_people(planned):
    code, out, _ = planned(*V3_512[:-1])
    assert code == 0
    assert "fits: at most" in out and "pipeline bubble" in out and "engines: 8 of 64 ranks" in out


@pytest.mark.parametrize("cluster", ["h100_1", "h100_1x8"])
def test_a_search_ranks_what_fits_first(planned, tmp_path, cluster):
    shape = {
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    arguments = [f"model.hf={tmp_path}", f"cluster={cluster}", "device=cuda", "precision=bf16", "plan.format=json"]
    code, out, _ = planned("search", *arguments)
    found = json.loads(out)
    assert code == 0
    rows = found["layouts"]
    assert all(row["fits"] for row in rows)
    times = [row["seconds_per_update"] for row in rows]
    assert times == sorted(times)
    assert (found["searched"] == 1) is (cluster == "h100_1")
    # A plan of the first says the same of it.
    sizes = [f"parallel.{part}" for part in rows[0]["layout"].split(",") if "=" in part and "stages" not in part]
    code, out, _ = planned(*arguments, *sizes, f"memory.recompute={rows[0]['recompute']}")
    assert code == 0
    assert json.loads(out)["seconds_per_update"] == pytest.approx(rows[0]["seconds_per_update"])
    assert json.loads(out)["headroom_bytes"] == rows[0]["headroom_bytes"]


def test_the_command_asks_megatron_and_prints_one_document(tmp_path):
    shape = {
        "model_type": "deepseek_v3", "vocab_size": 251, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 12, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 4, "n_group": 4,
        "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    argv = [
        sys.executable, "-m", "r1mega.cli", "plan", f"model.hf={tmp_path}", "cluster.gpus_per_node=8", "parallel.tp=2",
        "parallel.pp=2", "parallel.ep=4", "parallel.dp=2", "model.mtp=freeze", "plan.format=json",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    fields, layout = hf_fields.read(tmp_path), Layout(tp=2, pp=2, ep=4, dp=2)
    expected = held.Table(fields).held(layout, freezes_mtp=True)
    assert [rank["parameters"] for rank in document["ranks"]] == [part.parameters for part in expected]
    assert [rank["parameter_bytes"] for rank in document["ranks"]] == [4 * part.parameters for part in expected]
    assert [rank["gate_biases"] for rank in document["ranks"]] == [part.gate_biases for part in expected] == [8, 24]
    assert document["model_elements"] == sum(part.distinct for part in expected)
    assert expected[1].frozen > 0 and expected[0].frozen == 0


def test_a_table_for_people_of_engines_alone(planned):
    code, out, _ = planned("experiment=evaluate_r1")
    assert code == 0 and "engines of 32 ranks" in out and "in phase generation on every rank" in out
    code, out, err = planned("search", "experiment=evaluate_r1")
    assert code == 2 and "trains nothing" in err


def test_an_update_of_full_chunks(plan_of):
    """R1's set once more than once: two epochs of 4.31 billion tokens (Table 5), in chunks of 32,768."""
    document = plan_of("experiment=sft_800k")[1]
    assert document["samples_per_update"] == 122  # 20 x 32,768 / 5,355
    assert document["tokens_per_update"] == 122 * 5355
    assert document["micro_batches"] == 10  # of 20 on two data-parallel parts
    assert document["updates"] * document["tokens_per_update"] == pytest.approx(2 * 804_745 * 5355.3, rel=0.005)
    assert plan_of("experiment=distill_qwen_7b")[1]["micro_batches"] == 10


def test_the_rows_of_a_reward_model(plan_of, tmp_path):
    """A pair is two sequences; the file goes before plan.rows, and the last update takes what is left."""
    arguments = ["experiment=reward_model_helpful"]
    document = plan_of(*arguments)[1]
    assert (document["updates"], document["samples_per_update"]) == (258, 512)  # 66,000 / 256 = 257.8
    assert document["tokens_per_update"] == pytest.approx(512 * 0.2 * 8192, abs=1)
    safety = plan_of("experiment=reward_model_safety")[1]
    assert (safety["updates"], safety["samples_per_update"]) == (415, 256)  # 106,000 / 256 = 414.1
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 513 + "\n")
    document = plan_of(*arguments, f"data.train={tmp_path}/pairs.jsonl", "reward_model.epochs=2")[1]
    assert document["updates"] == 5  # 1,026 rows
    with pytest.raises(ConfigError, match=re.escape("plan.rows: got nothing")):
        plan_of(*arguments, "plan.rows=null")


def test_a_reward_model_has_a_score_for_its_logits(plan_of):
    """The last stage holds V3's last layer, a norm and a row, and no table of 129,280 rows."""
    last = plan_of("experiment=reward_model_safety")[1]["ranks"][-1]
    trained = plan_of("experiment=sft_800k", "model.mtp=drop")[1]["ranks"][-1]
    assert trained["parameters"] - last["parameters"] == 129_280 // 8 * 7168 - 7168
    assert last["gate_biases"] == trained["gate_biases"] == 256
    assert last["device_peak"]["train"] < trained["device_peak"]["train"]


def test_engines_alone(plan_of):
    """Nothing is trained: no ranks, the devices are the servers', and the responses are the benchmark's."""
    document = plan_of("experiment=evaluate_r1")[1]
    assert (document["ranks"], document["num_gpus"], document["world_size"]) == ([], 32, 0)
    assert document["samples_per_update"] == 30 * 64 and document["updates"] == 1
    assert document["tokens_per_update"] == pytest.approx(1920 * (2048 + 0.3 * 32_768), abs=1)
    engines = document["engines"]
    assert engines["weight_bytes"] + engines["cache_bytes"] == pytest.approx(0.8 * 80 * 2**30, abs=2)
    assert document["headroom_bytes"] == pytest.approx(0.2 * 80 * 2**30 - 3 * 2**30, abs=4)
    assert set(document["round_seconds"]) == {"generation"} and document["flops_per_update"] == 0
    few = plan_of("experiment=evaluate_r1", "benchmark.limit=3")[1]
    assert few["samples_per_update"] == 3 * 64
    with pytest.raises(ConfigError, match=re.escape("plan.rows: got nothing")):
        plan_of("experiment=evaluate_r1", "benchmark=mmlu")
    sampling = ["experiment=rejection_sampling"]
    assert plan_of(*sampling)[1]["updates"] == 1
    assert plan_of(*sampling, "plan.rows=1025")[1]["updates"] == 3  # rounds of 512 questions


def test_scheduled_lengths(plan_of):
    """Memory by the longest response of any round, times by the mean of the rounds' limits."""
    document = plan_of("experiment=r1_zero")[1]
    rounds = [65_536 if start >= 8200 else 32_768 for start in range(0, 10_400, 16)]
    mean = sum(rounds) / len(rounds)
    assert document["tokens_per_update"] == pytest.approx(512 * (512 + 0.3 * mean), abs=1)
    unchanged = plan_of("experiment=r1_zero", "rollout.max_tokens_from=[]")[1]
    assert document["ranks"][0]["device_peak"]["train"] == unchanged["ranks"][0]["device_peak"]["train"]  # one pack
    assert document["seconds_per_update"] > unchanged["seconds_per_update"]
    with pytest.raises(ConfigError, match=re.escape("rollout.max_tokens_from: got 200000")):
        plan_of("experiment=r1_zero", "rollout.max_tokens_from=[[16,200000]]")


def test_frozen_reward_models(plan_of):
    """On the host two models beside the reference; on the device one of them in its phase, and in no other."""
    document = plan_of("experiment=all_scenario_rl")[1]
    without = plan_of("experiment=all_scenario_rl", "reward.helpful=0", "reward.safety=0")[1]
    for rank, plain in zip(document["ranks"], without["ranks"], strict=True):
        own = rank["bytes"].pop("reward models")
        assert rank["bytes"] == plain["bytes"]
        held = 2 * rank["parameters"] + 4 * rank["gate_biases"]
        if rank["coordinate"]["pp"] < 15:  # the last has no table and no layer that predicts further
            assert own["reward model"] == held == rank["host_bytes"]["reference"]
        else:
            assert own["reward model"] < held
        assert rank["host_bytes"]["reward models"] == pytest.approx(2 * 1.44 * own["reward model"], rel=1e-6)
    # 25 of 107 rollouts have general questions, data.general_share of all.
    assert 0 < document["round_seconds"]["reward models"] < document["round_seconds"]["logprobs"] / 2
