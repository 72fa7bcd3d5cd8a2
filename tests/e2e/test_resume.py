"""A resumed run is the same run: killed with SIGKILL, also while it saves; damaged checkpoints refused; replay."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from r1mega.loop.stop import STOPPED
from r1mega.train.checkpoint_store import CheckpointStore

COMMON = ["logger.console=false", "logger.tensorboard=false", "checkpoint.keep_newest=9"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Questions for RL and rows for SFT."""
    folder = tmp_path_factory.mktemp("data")
    pairs = [(f"What is {a} plus {b}?", str(a + b)) for a in range(1, 7) for b in range(1, 9)]
    rows = {
        "rl": [{"question": question, "answer": f"#### {answer}"} for question, answer in pairs],
        "sft": [{"prompt": question, "response": f"It is {answer}."} for question, answer in pairs],
    }
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def rl(checkpoint: Path, files: Path, run_dir: Path) -> list[str]:
    """Three rounds of two updates. Nothing is rewarded: the pull to the reference, away from which weight decay moves
    the policy, gives the gradient."""
    return [
        "experiment=r1_zero_gsm8k", f"model.hf={checkpoint}", f"data.train={files}/rl.jsonl", f"run.dir={run_dir}",
        "algo.updates=6", "algo.questions_per_round=2", "algo.group_size=4", "algo.updates_per_round=2",
        "algo.kl_coef=1.0", "algo.reference_refresh=4", "rollout.max_tokens=24", "optim.lr=1e-3",
        "rollout.max_tokens_from=[[3,32]]",  # of the third round alone, which begins at update 4
        # In update 5 the reference is the policy, and the gradient is rounding alone: Adam shall not make steps of it.
        "optim.eps=1e-4", "optim.weight_decay=10", "model.moe_router_bias_update_rate=0.01", "checkpoint.every=2",
        "data.template=plain", "reward.workers=0", *COMMON,
    ]  # fmt: skip


def sft(checkpoint: Path, files: Path, run_dir: Path) -> list[str]:
    return [
        "stage=sft", "data=sft", "optim=cosine", f"model.hf={checkpoint}", f"data.train={files}/sft.jsonl",
        f"run.dir={run_dir}", "sft.updates=6", "sft.batch_size=8", "sft.max_length=512", "data.template=plain",
        "optim.lr=1e-3", "optim.weight_decay=0.1", "checkpoint.every=3", *COMMON,
    ]  # fmt: skip


def command(*overrides: object) -> list[str]:
    return [sys.executable, "-m", "r1mega.cli", "train", *map(str, overrides)]


def train(*overrides: object, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*overrides), capture_output=True, text=True, timeout=timeout)


def train_and_kill(*overrides: object, after: Path | None = None, seconds: float = 0.0) -> bool:
    """Start a run, wait for a file and then so many seconds, SIGKILL all its processes. False: it had ended itself."""
    process = subprocess.Popen(
        command(*overrides), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    limit = time.monotonic() + 120
    while after is not None and not after.exists() and process.poll() is None:
        assert time.monotonic() < limit, f"{after} did not come"
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=max(seconds, 0.001))
    ran = process.poll() is None
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] if ran else []
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    return ran


def metrics_of(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl less what a clock says."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(("time", "perf/", "memory/"))}
        for line in lines
    ]


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "hf" / "model.safetensors")


def assert_same_run(run_dir: Path, expected: Path) -> None:
    assert metrics_of(run_dir) == metrics_of(expected)
    if (expected / "samples.jsonl").exists():
        assert (run_dir / "samples.jsonl").read_text() == (expected / "samples.jsonl").read_text()
    ours, theirs = weights_of(run_dir), weights_of(expected)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def killed_and_resumed(overrides: list[str], run_dir: Path, stopped: Path) -> subprocess.CompletedProcess[str]:
    """Kill a run soon after its first checkpoint, keep a copy of what is left, and go on to the end."""
    assert train_and_kill(*overrides, after=run_dir / "checkpoints" / "latest", seconds=0.1)
    shutil.copytree(run_dir, stopped)
    return train(*overrides, "run.resume=true")


@pytest.fixture(scope="module")
def rl_runs(checkpoint, files, tmp_path_factory):
    """Folder of the RL runs, and by name how each ended, to come: a run is of one process, so two go side by side."""
    folder = tmp_path_factory.mktemp("rl")
    overrides = {
        name: [*rl(checkpoint("deepseek_v3"), files, folder / name), *options]
        for name, options in {
            "whole": (),
            "killed": (),
            "killed-asynchronous": ("checkpoint.asynchronous=true",),
            "offloading": ("memory.offload=true", "checkpoint.every=0"),
        }.items()
    }
    pool = ThreadPoolExecutor(2)
    yield (
        folder,
        {
            name: pool.submit(killed_and_resumed, options, folder / name, folder / f"{name}-stopped")
            if name.startswith("killed")
            else pool.submit(train, *options)
            for name, options in overrides.items()
        },
    )
    pool.shutdown(cancel_futures=True)


def ended(rl_runs: tuple[Path, dict[str, Future]], name: str) -> Path:
    """The directory of the run when it has ended well."""
    folder, runs = rl_runs
    done = runs[name].result()
    assert done.returncode == 0, done.stderr
    return folder / name


@pytest.fixture
def whole_rl(rl_runs) -> Path:
    """An RL run that nobody stopped."""
    return ended(rl_runs, "whole")


@pytest.mark.parametrize("name", ["killed", "killed-asynchronous"])
def test_rl_goes_on_as_if_never_stopped(rl_runs, whole_rl, name):
    run_dir = ended(rl_runs, name)
    assert_same_run(run_dir, whole_rl)
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "latest", "update-000002", "update-000004", "update-000006",
    ]  # fmt: skip


def test_longer_responses_come_with_their_update(whole_rl):
    """In the run that the others are compared with, which are resumed and replayed on both sides of the change."""
    rounds = sorted((whole_rl / "rounds").iterdir())
    longest = [max(load_file(path)["lengths"].tolist()) for path in rounds]
    assert longest == [24, 24, 32]


@pytest.mark.extended
def test_rl_that_is_asked_to_stop_saves_and_goes_on(checkpoint, files, whole_rl, tmp_path):
    """SIGUSR1 to the launcher: a checkpoint at the end of the round, though none is due, and its own exit code."""
    run_dir = tmp_path / "run"
    overrides = [*rl(checkpoint("deepseek_v3"), files, run_dir), "checkpoint.every=6"]
    process = subprocess.Popen(command(*overrides), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or not (run_dir / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < limit, "no first update"
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=100)
    assert process.returncode == STOPPED, said
    assert "stopped as asked, after a checkpoint" in said
    done = metrics_of(run_dir)[-1]["update"]
    assert done < 6 and (run_dir / "checkpoints" / f"update-{done:06d}" / "manifest.json").exists()
    resumed = train(*overrides, "run.resume=true")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(run_dir, whole_rl)


def test_offloading_changes_nothing(rl_runs, whole_rl):
    assert_same_run(ended(rl_runs, "offloading"), whole_rl)


def test_rl_goes_on_at_another_layout(rl_runs, checkpoint, files, whole_rl, tmp_path):
    """fp32 sums in another order: gradient norms within 1e-5, weights after four more updates within 1e-5."""
    run_dir = tmp_path / "run"
    shutil.copytree(ended(rl_runs, "killed").with_name("killed-stopped"), run_dir)
    overrides = rl(checkpoint("deepseek_v3"), files, run_dir)
    resumed = train(*overrides, "run.resume=true", "parallel.tp=2")
    assert resumed.returncode == 0, resumed.stderr
    for mine, expected in zip(metrics_of(run_dir), metrics_of(whole_rl), strict=True):
        assert mine["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-5, abs=1e-5)
    ours, theirs = weights_of(run_dir), weights_of(whole_rl)
    assert max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs) < 1e-5
    assert any(not torch.equal(ours[n], theirs[n]) for n in theirs), "another layout that rounds alike proves little"


def test_sft_goes_on_as_if_never_stopped(checkpoint, files, tmp_path):
    """On four processes, with the multi-token-prediction layer trained along, packed in windows: the third update ends
    in the middle of one."""
    source = checkpoint("deepseek_v3", mtp=True)
    options = ["parallel=tp2_pp2_ep2", "model.mtp=train", "sft.packing=window", "sft.window=32"]
    options += ["sft.chunks_per_update=2", "sft.max_length=128", "sft.max_tokens_per_micro_batch=128"]
    run_dir = tmp_path / "run"
    overrides = [*sft(source, files, run_dir), *options]
    with ThreadPoolExecutor(1) as beside:
        whole = beside.submit(train, *sft(source, files, tmp_path / "whole"), *options)
        assert train_and_kill(*overrides, after=run_dir / "checkpoints" / "latest")
        resumed, expected = train(*overrides, "run.resume=true"), whole.result()
    assert expected.returncode == 0, expected.stderr
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(run_dir, tmp_path / "whole")
    assert all(row["train/fill"] > 0.8 for row in metrics_of(run_dir))
    started = load_file(source / "model.safetensors")
    assert not torch.equal(
        weights_of(run_dir)["model.layers.4.eh_proj.weight"], started["model.layers.4.eh_proj.weight"]
    )


def killed_again_and_again(overrides: list[str], run_dir: Path, kills: int, seed: int) -> list[int]:
    """Kill a run that saves after every update so many times, at random moments; the update of each latest one."""
    rng = random.Random(seed)
    store = CheckpointStore(run_dir / "checkpoints", 2, 0)
    reached = [0]
    for _ in range(kills):
        # The start's first new checkpoint has come; then anywhere in the next few updates and savings.
        wanted = run_dir / "checkpoints" / f"update-{reached[-1] + 1:06d}"
        assert train_and_kill(*overrides, after=wanted, seconds=rng.uniform(0, 0.8)), "the run ended by itself"
        latest = store.latest()
        assert latest is not None
        store.verify(latest)
        reached.append(store.list()[-1].update)
        assert reached[-1] > reached[-2], "a checkpoint was lost"
    return reached


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("names", "kills"), [(["one"], 2), pytest.param(["one", "two"], 10, marks=pytest.mark.extended)]
)
def test_no_kill_loses_a_checkpoint(checkpoint, files, tmp_path, names, kills):
    """So many kills at random moments, in each of some runs side by side; then each goes on to its end."""
    source = checkpoint("llama")
    runs = [tmp_path / name for name in names]
    endless = ["checkpoint.every=1", "sft.updates=1000", "optim.schedule=constant", "run.resume=true"]
    overrides = [[*sft(source, files, run_dir), *endless, "checkpoint.keep_newest=2"] for run_dir in runs]
    with ThreadPoolExecutor(2) as pool:
        reached = list(pool.map(killed_again_and_again, overrides, runs, [kills] * len(runs), (8, 9)))
    for run_dir, options, updates in zip(runs, overrides, reached, strict=True):
        last = updates[-1] + 1
        done = train(*options, f"sft.updates={last}")
        assert done.returncode == 0, done.stderr
        assert [row["update"] for row in metrics_of(run_dir)] == list(range(1, last + 1))


@pytest.mark.parametrize("damage", ["flipped", "missing", "truncated"])
def test_a_damaged_checkpoint_is_refused_by_name(checkpoint, files, whole_rl, tmp_path, damage):
    run_dir = tmp_path / "run"
    shutil.copytree(whole_rl, run_dir)
    shard = run_dir / "checkpoints" / "update-000006" / "model" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "flipped": lambda: shard.write_bytes(content),
        "missing": shard.unlink,
        "truncated": lambda: os.truncate(shard, 99),
    }[damage]()
    before = (run_dir / "metrics.jsonl").read_bytes()
    refused = train(*rl(checkpoint("deepseek_v3"), files, run_dir), "algo.updates=8", "run.resume=true")
    assert refused.returncode == 2
    assert "model/__0_0.distcp" in refused.stderr
    assert "update-000004" in refused.stderr, "the remedy names another checkpoint"
    assert "Traceback" not in refused.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == before, "nothing was touched"
    if damage != "flipped":
        return
    earlier = run_dir / "checkpoints" / "update-000004"
    resumed = train(*rl(checkpoint("deepseek_v3"), files, run_dir), f"run.resume_from={earlier}")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(run_dir, whole_rl)


def test_a_changed_run_is_refused_by_field(checkpoint, files, whole_rl, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole_rl, run_dir)
    overrides = [*rl(checkpoint("deepseek_v3"), files, run_dir), "run.resume=true", "algo.updates=8"]
    refused = train(*overrides, "optim.lr=0.01", "run.seed=3")
    assert refused.returncode == 2
    assert "optim.lr: got 0.01; the run was started with 0.001" in refused.stderr
    assert "run.seed: got 3; the run was started with 0" in refused.stderr
    other = train(*overrides[:-2], "run.resume=true", "model.hf=" + str(checkpoint("llama")), "run.allow_changes=true")
    assert other.returncode != 0
    assert "must hold every tensor of this model" in other.stderr


def replay(run_dir: Path, place: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "r1mega.cli", "replay", str(run_dir), *place.split()]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120)


def test_replay_gives_what_was_recorded(whole_rl, tmp_path):
    from r1mega.loop import rounds

    # negative control: one sample's reward changed in the record
    run_dir = tmp_path / "run"
    shutil.copytree(whole_rl, run_dir)
    record = rounds.read(run_dir, 3)
    sample = record.groups[0].samples[0]
    sample.score = type(sample.score)(1.0, sample.score.parts)
    rounds.write(run_dir, record)
    asked = [(whole_rl, "round=1 update=2"), (whole_rl, "round=3 update=5"), (run_dir, "round=3 update=6")]
    with ThreadPoolExecutor(2) as pool:
        first, later, changed = pool.map(replay, *zip(*asked, strict=True))
    for done in (first, later):
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert answer["identical"] and answer["recorded"] == answer["replayed"]
    assert changed.returncode == 1
    assert "DIFFERS" in changed.stderr
    absent = replay(run_dir, "round=7 update=14")
    assert absent.returncode == 2
    assert "there are: 1 to 3" in absent.stderr
