"""slurm/health_check.sh and env.sh, with programs of ours in the place of the machine's."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from r1mega.launch.slurm import templates

H100 = "{index}, 81559, 4, 0"


@pytest.fixture
def look(tmp_path: Path):
    """`look(*options, gpus=[rows of nvidia-smi])` -> the check on the node n7; None: there is no nvidia-smi."""

    def run(*options: object, gpus: list[str] | None = None) -> subprocess.CompletedProcess[str]:
        programs = tmp_path / "bin"
        programs.mkdir(exist_ok=True)
        if gpus is not None:
            (programs / "nvidia-smi").write_text("#!/bin/sh\ncat <<'END'\n" + "\n".join(gpus) + "\nEND\n")
            (programs / "nvidia-smi").chmod(0o755)
        env = {**os.environ, "PATH": f"{programs}:/usr/bin:/bin", "SLURMD_NODENAME": "n7"}
        command = ["bash", str(templates() / "health_check.sh"), *map(str, options)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)

    return run


def test_a_machine_that_is_fit(look, tmp_path: Path) -> None:
    done = look(
        "--gpus", 8, "--gpu-memory", 80, "--disk", tmp_path, "--min-disk", 0.001, "--epoch", int(time.time()),
        gpus=[H100.format(index=i) for i in range(8)],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("r1mega health check: n7: fit")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"], "nothing of the probe is left"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["0, 81559, 4, 0"], "1 GPUs are visible, 2 are wanted"),
        (["0, 81559, 4, 0", "1, 40000, 4, 0"], "GPU 1 has 40000 MiB of memory"),
        (["0, 81559, 70000, 0", "1, 81559, 4, 0"], "GPU 0: 70000 MiB are in use before the run begins"),
        (["0, 81559, 4, 0", "1, 81559, 4, 3"], "GPU 1 has 3 uncorrected ECC errors"),
    ],
)
def test_gpus_that_are_not_fit(look, rows: list[str], said: str) -> None:
    done = look("--gpus", 2, "--gpu-memory", 80, gpus=rows)
    assert done.returncode == 1
    assert done.stderr.startswith(f"r1mega health check: n7: {said}")
    assert len(done.stderr.splitlines()) == 1


def test_gpus_without_ecc_are_no_fault(look) -> None:
    assert look("--gpus", 1, "--gpu-memory", 80, gpus=["0, 81559, 4, [N/A]"]).returncode == 0


def test_all_faults_are_told_together(look, tmp_path: Path) -> None:
    done = look("--gpus", 1, "--disk", tmp_path / "none", "--epoch", int(time.time()) - 3600)
    assert done.returncode == 1
    told = done.stderr.splitlines()
    assert len(told) == 3 and all(line.startswith("r1mega health check: n7: ") for line in told)
    assert "nvidia-smi is not there; 1 GPUs are wanted" in told[0]
    assert "cannot be written to" in told[1] and re.search(r"its clock is 36\d\d s beside", told[2])


def test_a_full_disk(look, tmp_path: Path) -> None:
    done = look("--disk", tmp_path, "--min-disk", 10**9)
    assert done.returncode == 1 and "slurm.min_disk_gib=1000000000 is wanted" in done.stderr


def test_a_machine_without_gpus_is_fit_where_none_are_wanted(look) -> None:
    assert look("--gpus", 0).returncode == 0


def test_the_environment_leaves_what_is_set_and_gives_every_line_a_reason() -> None:
    path = templates() / "env.sh"
    program = f"set -eu; export NCCL_DEBUG=INFO; source {path}; echo $NCCL_DEBUG $HF_HUB_OFFLINE"
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", program], env=env, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "INFO 1\n"
    blocks = [block for block in path.read_text().split("\n\n") if "export" in block or "ulimit" in block]
    assert len(blocks) > 5 and all(block.lstrip().startswith("#") for block in blocks)
