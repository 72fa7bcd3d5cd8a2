"""The report on machines that are not this one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1mega.launch import doctor
from r1mega.launch.machine import Machine
from r1mega.launch.pins import APEX_COMMIT, PINNED


class Fake(Machine):
    """A machine with everything; tests take things away."""

    def __init__(self, place: Path) -> None:
        self.versions = {name: PINNED.get(name, "1.0") for name in ("torch", *doctor.LIBRARIES)}
        self.versions |= {"transformer-engine": PINNED["transformer-engine"], "apex": "0.1", "deep_ep": "1.2.1"}
        self.versions["flash-attn"] = "2.8.3"
        apex = place / "apex"
        (apex / "multi_tensor_apply").mkdir(parents=True)
        self.modules = {"apex": apex, "fused_weight_gradient_mlp_cuda": place / "kernel.so"}
        self.programs = {*doctor._COMMANDS, "g++", "nvcc"}
        self.outputs = {"nvidia-smi": "580.65", "sbatch": "slurm 25.05", "bwrap": "bubblewrap 0.8.0"}
        self.gpu = {"cuda": "13.0", "gpus": [["NVIDIA H100 80GB HBM3", 79.6]] * 8, "nccl": "2.27.7"}
        self.engines = {
            "sglang": PINNED["sglang"],
            "sglang-router": PINNED["sglang-router"],
            "torch-memory-saver": "0.0.10",
        }

    def python(self):
        return (3, 12, 3)

    def version(self, package):
        return self.versions.get(package)

    def module(self, name):
        return self.modules.get(name)

    def program(self, name):
        return name if name in self.programs else None

    def output(self, *command):
        return self.outputs.get(command[0])

    def torch(self):
        return self.gpu

    def versions_of(self, python, packages):
        return self.engines


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake(tmp_path)
    monkeypatch.setattr(doctor, "Machine", lambda: fake)
    return fake


def piece(machine: Fake, name: str) -> doctor.Piece:
    return next(one for one in doctor.examine(machine, "venv/bin/python") if one.name == name)


def test_a_machine_with_everything(machine: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert {one.name: one.status for one in doctor.examine(machine, "python")}.keys() >= {
        "torch",
        "apex",
        "slurm",
        "nccl",
    }
    assert all(one.status == doctor.OK for one in doctor.examine(machine, "python"))
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "CUDA 13.0, 8 GPUs, 8 x NVIDIA H100 80GB HBM3 of 80 GiB" in text
    assert "to get it" not in text


def test_a_laptop_runs_what_needs_no_gpu(machine: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("transformer-engine", "apex", "deep_ep", "flash-attn"):
        machine.versions.pop(name)
    machine.versions["torch"] += "+cpu"
    machine.modules, machine.programs, machine.outputs = {}, set(), {}
    machine.gpu = {"cuda": None, "gpus": [], "nccl": None}
    machine.engines = {"error": "no such Python"}
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "without it: parallel.dispatcher=flex" in text
    assert f"git+https://github.com/NVIDIA/apex@{APEX_COMMIT}" in text
    assert "device.layer_spec=te, precision=fp8" in text
    assert doctor.main(["--require", "cuda,transformer-engine"]) == 1
    assert capsys.readouterr().out.endswith("\ncuda, transformer-engine: to be mended before a run\n")


@pytest.mark.parametrize(("package", "version", "status"), [("torch", "2.12.1", "wrong"), ("pebble", None, "missing")])
def test_what_every_run_needs_decides_the_exit_code(machine: Fake, capsys, package, version, status) -> None:
    machine.versions[package] = version
    assert doctor.main(["--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is False
    (faulty,) = [one for one in told["pieces"] if one["status"] != "ok"]
    assert (faulty["name"], faulty["found"], faulty["status"], faulty["needed"]) == (package, version, status, True)


def test_a_build_of_the_pinned_torch_is_the_pinned_torch(machine: Fake) -> None:
    machine.versions["torch"] = f"{PINNED['torch']}+cu130"
    assert piece(machine, "torch").status == doctor.OK


def test_the_other_apex_is_told_from_nvidias(machine: Fake, tmp_path: Path) -> None:
    """PyPI's package of that name has a module apex as well, and no multi_tensor_apply."""
    (tmp_path / "other").mkdir()
    machine.modules["apex"], machine.versions["apex"] = tmp_path / "other", "0.9.10.dev0"
    found = piece(machine, "apex")
    assert found.status == doctor.WRONG and found.found == "another project of that name (0.9.10.dev0)"
    assert found.install.startswith("pip uninstall apex; ") and "git+https://github.com/NVIDIA/apex@" in found.install


def test_an_apex_without_its_kernels_is_not_enough(machine: Fake) -> None:
    del machine.modules["fused_weight_gradient_mlp_cuda"]
    found = piece(machine, "apex")
    assert found.status == doctor.WRONG and found.found == "NVIDIA's 0.1, without CUDA extensions"


def test_a_cuda_build_that_sees_no_gpu_and_a_torch_that_cannot_be_asked(machine: Fake) -> None:
    machine.gpu = {"cuda": "13.0", "gpus": [], "nccl": None}
    found = piece(machine, "cuda")
    assert (found.status, found.found) == (doctor.WRONG, "CUDA 13.0, 0 GPUs")
    machine.gpu = {"error": "python is not there, fails, or takes longer than 60 s"}
    assert piece(machine, "cuda").status == doctor.WRONG


def test_another_sglang_and_a_slurm_without_a_configuration(machine: Fake) -> None:
    machine.engines["sglang"] = "0.5.20"
    found = piece(machine, "sglang")
    assert found.status == doctor.WRONG and found.found == "0.5.20 in venv/bin/python"
    del machine.outputs["sbatch"]
    assert piece(machine, "slurm").status == doctor.WRONG
    machine.programs.clear()
    assert piece(machine, "slurm").status == doctor.MISSING


def test_an_unknown_piece_is_refused(machine: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--require", "warp"])
    assert ended.value.code == 2
    assert "warp; must be among python, torch" in capsys.readouterr().err


def test_this_machine_answers_and_nothing_raises() -> None:
    pieces = {one.name: one for one in doctor.examine(Machine(), "no/such/python")}
    assert pieces["python"].status == doctor.OK
    assert pieces["torch"].status == doctor.OK
    assert pieces["sglang"].status == doctor.MISSING


REPO = Path(__file__).resolve().parents[3]


def test_the_pins_are_those_of_setup_and_of_the_container() -> None:
    setup, recipe = (REPO / "setup.cfg").read_text(), (REPO / "slurm" / "Dockerfile").read_text()
    for name, version in PINNED.items():
        asked = f"{name}[core_cu13,pytorch]=={version}" if name == "transformer-engine" else f"{name}=={version}"
        assert asked in recipe, f"slurm/Dockerfile has not {asked}"
        if not name.startswith("sglang"):  # in an environment of its own
            assert asked in setup, f"setup.cfg has not {asked}"
    assert f"git+https://github.com/NVIDIA/apex@{APEX_COMMIT}" in recipe
    lines = [line for line in recipe.splitlines() if not line.startswith("#")]
    assert not [line for line in lines if "pip install apex" in line]
