from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from r1mega import cli

# The training process of these tests says where its configuration is, and does nothing. The checks that tokenize and
# compare tensors are left out: the checkpoint here is made of a few bytes.
WORKER = "import sys\nfrom r1mega.parallel import fork\nfork.divide()\nprint('worker', sys.argv[2], flush=True)\n"
DRIVER = """
import sys
from r1mega import cli
from r1mega.launch import local, preflight
require = preflight.require
preflight.require = lambda config: require(config, ())
local.WORKER = "fake_worker"
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def r1mega(tmp_path: Path) -> Run:
    (tmp_path / "fake_worker.py").write_text(WORKER)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-c", DRIVER + "sys.exit(cli.main())", *map(str, arguments)]
        return subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False)

    return run


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["submit", "--help"]])
def test_help_answers_at_once(arguments: list[str]) -> None:
    code = f"import sys\nfrom r1mega.cli import main\nassert main({arguments!r}) == 0\n"
    code += "heavy = {'torch', 'megatron', 'transformers', 'hydra'} & set(sys.modules)\nassert not heavy, heavy"
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        assert done.returncode == 0, done.stderr
    # CPU time: what an idle machine would show, whatever else this one is doing.
    assert min(seconds) < 0.7
    assert "usage: r1mega" in done.stdout


def test_help_lists_options_and_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "experiment=toy " in text
    assert "algo.group_size  int  [16]" in text
    assert "stage.loop  rl|sft|reject|reward_model|evaluate  [-]" in text


def test_help_into_a_reader_that_stops_reading() -> None:
    command = f"{sys.executable} -m r1mega.cli train --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("usage: r1mega train")
    assert done.stderr == ""


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    named = ", ".join(cli.COMMANDS)
    assert capsys.readouterr().err == f"r1mega: unknown command 'trian'; the commands are: {named}\n"


@pytest.mark.parametrize(
    ("override", "said", "near"),
    [
        ("algo.update=4", "Could not override 'algo.update'", "did you mean algo.updates or"),
        ("experiment=toi", "Could not find 'experiment/toi'", "did you mean experiment=toy?"),
        ("parallel.tp=two", "Value 'two' of type 'str' could not be converted to Integer", "--help"),
        ("data.template=r2", "expected one of [r1_zero, plain, chat]", "--help"),
    ],
)
def test_a_wrong_override_gets_one_answer_without_a_traceback(r1mega: Run, override: str, said: str, near: str) -> None:
    done = r1mega("train", override)
    assert done.returncode == 2
    assert said in done.stderr
    assert near in done.stderr
    assert "Traceback" not in done.stderr


def test_a_forced_key_is_refused(r1mega: Run) -> None:
    done = r1mega("train", "+algo.extra=1")
    assert done.returncode == 2
    assert "algo.extra" in done.stderr


def test_faults_are_told_together_and_nothing_is_written(r1mega: Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = r1mega("train", "rollout.top_p=2", "run.dir=out")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "r1mega: the run cannot start, 3 faults:\n  rollout.top_p: got 2.0; must be > 0 and <= 1"
    )
    assert "model.hf: got nothing" in done.stderr
    assert "data.train: got nothing" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_the_composed_configuration_is_shown_and_nothing_runs(r1mega: Run, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = r1mega("train", "experiment=toy", "algo.updates=8", "--cfg", "job")
    assert done.returncode == 0
    assert "\n  updates: 8\n" in done.stdout
    assert "hydra:" not in done.stdout
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_and_its_second_start(r1mega: Run, inputs) -> None:
    done = r1mega("train", *inputs.overrides(), "run.seed=5")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"worker {inputs.run / 'config.yaml'}\n"
    assert sorted(path.name for path in inputs.run.iterdir()) == ["config.yaml", "logs"]
    assert "seed: 5" in (inputs.run / "config.yaml").read_text()
    again = r1mega("train", *inputs.overrides())
    assert again.returncode == 2
    assert f"run.dir: got {inputs.run}; already holds a run" in again.stderr


def test_a_sweep_gives_each_job_its_own_directory(r1mega: Run, inputs, tmp_path: Path) -> None:
    data = inputs.overrides()[:2]
    done = r1mega("train", *data, "run.seed=1,2", "--multirun")
    assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "runs" / "multirun").glob("*/*/config.yaml"))
    assert [path.parent.name for path in files] == ["0", "1"]
    assert ["seed: 1" in files[0].read_text(), "seed: 2" in files[1].read_text()] == [True, True]


def test_a_sweep_over_a_directory_of_ones_own(r1mega: Run, inputs, tmp_path: Path) -> None:
    done = r1mega("train", *inputs.overrides()[:2], "run.seed=1,2", "run.dir=mine/${run.seed}", "-m")
    assert done.returncode == 0, done.stderr
    assert sorted(path.parent.name for path in (tmp_path / "mine").glob("*/config.yaml")) == ["1", "2"]


def test_a_failure_of_its_own_is_not_said_to_be_one_of_the_arguments(inputs) -> None:
    failing = "import sys\nfrom r1mega import cli\nfrom r1mega.launch import local\nlocal.run = lambda config: 1 / 0\n"
    argv = [sys.executable, "-c", failing + "sys.exit(cli.main())", "train", *inputs.overrides()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "--help" not in done.stderr
