"""`r1mega doctor`: what this machine can run, what each missing piece costs, and the command that installs it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from r1mega.config.check_versions import DEEP_EP_INSTALL
from r1mega.config.schema_rollout import SglangConfig
from r1mega.launch.machine import Machine
from r1mega.launch.pins import APEX_INSTALL, PINNED

OK, MISSING, WRONG = "ok", "missing", "wrong"
# What every run imports besides torch.
LIBRARIES = (
    "hydra-core", "omegaconf", "pyyaml", "megatron-core", "transformers", "safetensors", "xxhash", "math-verify",
    "pebble", "rich", "tensorboard", "matplotlib", "scipy", "psutil", "httpx",
)  # fmt: skip
_COMMANDS = ("sbatch", "srun", "scontrol", "squeue")
_CPU = "make venv   # or: pip install -e '.[cpu]'"
_CUDA = (
    "pip install torch==" + PINNED["torch"] + "   # PyPI's build for Linux is the one for CUDA; then a driver for it"
)
_SLURM = "the cluster's packages; to try it here, as root: make slurm-test-env"


@dataclass(frozen=True)
class Piece:
    """One thing that a machine may have.

    Args:
        found: its version or place; None where it is not there.
        wanted: what there should be.
        status: ok, missing, or wrong (there, but not what is wanted).
        needed: every run needs it; else some options do.
        costs: what does not go without it.
        install: the command that brings it.
    """

    name: str
    found: str | None
    wanted: str
    status: str
    needed: bool
    costs: str
    install: str


def main(arguments: Sequence[str]) -> int:
    """Print the report; 0 where all that is needed is there and as wanted, 1 where not, 2 for an unknown piece."""
    parser = argparse.ArgumentParser(prog="r1mega doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--sglang-python", default=SglangConfig().python, help="Python of SGLang's environment")
    parser.add_argument(
        "--require", default="", metavar="NAME,...", help="pieces without which the exit code is 1 as well"
    )
    options = parser.parse_args(list(arguments))
    pieces = examine(Machine(), options.sglang_python)
    required = {name for name in options.require.split(",") if name}
    unknown = required - {piece.name for piece in pieces}
    if unknown:
        parser.error(f"--require: {', '.join(sorted(unknown))}; must be among {', '.join(p.name for p in pieces)}")
    faulty = [piece for piece in pieces if piece.status != OK and (piece.needed or piece.name in required)]
    if options.json:
        print(json.dumps({"ok": not faulty, "pieces": [asdict(piece) for piece in pieces]}, indent=1))
    else:
        print(report(pieces))
        names = ", ".join(piece.name for piece in faulty)
        print(f"\n{names}: to be mended before a run" if faulty else "\nall that is needed is here")
    return 1 if faulty else 0


def examine(machine: Machine, sglang_python: str) -> list[Piece]:
    """Every piece, those that every run needs first."""
    return [*_needed(machine), *_gpu(machine), *_sglang(machine, sglang_python), *_system(machine)]


def report(pieces: Sequence[Piece]) -> str:
    """For people: a line for each piece, and under those that are not well what that means."""
    width = max(len(piece.name) for piece in pieces)
    marks = {OK: "ok     ", MISSING: "MISSING", WRONG: "WRONG  "}
    lines = []
    for piece in pieces:
        mark = marks[piece.status] if piece.needed or piece.status != MISSING else "-      "
        lines.append(f"{mark} {piece.name:<{width}}  {piece.found or 'not here'}")
        if piece.status != OK:
            told = [f"wanted: {piece.wanted}", f"without it: {piece.costs}", f"to get it: {piece.install}"]
            lines += [f"          {line}" for line in told]
    return "\n".join(lines)


def _piece(name: str, found: str | None, wanted: str, well: bool, needed: bool, costs: str, install: str) -> Piece:
    status = MISSING if found is None else OK if well else WRONG
    return Piece(name, found, wanted, status, needed, costs, install)


def _needed(machine: Machine) -> Iterator[Piece]:
    version = machine.python()
    found = ".".join(map(str, version))
    yield _piece(
        "python", found, "3.11 or newer", version >= (3, 11), True, "nothing runs", "make PYTHON=python3.11 venv"
    )
    for name in ("torch", *LIBRARIES):
        found, pin = machine.version(name), PINNED.get(name)
        is_well = pin is None or _bare(found) == pin
        costs = "nothing runs" if pin is None else "nothing runs; other versions than the pinned one are untested"
        yield _piece(name, found, pin or "as setup.cfg bounds it", is_well, True, costs, _CPU)


def _gpu(machine: Machine) -> Iterator[Piece]:
    driver = machine.output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    costs = "device=cuda, and all that needs it; device=cpu is what is left"
    yield _piece("driver", driver, "an NVIDIA driver", True, False, costs, "NVIDIA's driver, by the system's packages")
    torch = machine.torch() if machine.version("torch") else {"error": "torch is not installed"}
    cuda, gpus = torch.get("cuda"), torch.get("gpus") or []
    shown = torch.get("error") or f"CUDA {cuda}, {len(gpus)} GPUs" + (f", {_names(gpus)}" if gpus else "")
    yield _piece("cuda", shown if cuda or torch.get("error") else None, "a CUDA build of torch that sees a GPU",
                 bool(gpus), False, costs, _CUDA)  # fmt: skip
    yield _piece("nccl", torch.get("nccl"), "torch's own", True, False, "device=cuda with more than one process", _CUDA)
    engine, pin = machine.version("transformer-engine"), PINNED["transformer-engine"]
    costs = "device.layer_spec=te, precision=fp8, precision.moments=bf16, parallel.cp > 1 on te"
    install = f"pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]=={pin}'  # wants nvcc, cuDNN"
    yield _piece("transformer-engine", engine, pin, _bare(engine) == pin, False, costs, install)
    yield _apex(machine)
    flash = machine.version("flash-attn")
    costs = (
        "nothing by name: Transformer Engine then attends by cuDNN's kernels; without TE torch's own attention is used"
    )
    install = "pip install --no-build-isolation flash-attn"
    yield _piece("flash-attn", flash, "any that Transformer Engine takes", True, False, costs, install)
    deep_ep = machine.version("deep_ep") or (str(machine.module("deep_ep")) if machine.module("deep_ep") else None)
    install, is_well = f"{DEEP_EP_INSTALL}   # wants NVSHMEM and nvcc", not (deep_ep or "").startswith("2")
    yield _piece("deep_ep", deep_ep, "1.2, not 2", is_well, False, "parallel.dispatcher=flex", install)


def _apex(machine: Machine) -> Piece:
    """NVIDIA's, with its kernels. PyPI's package of that name is a toolkit for web applications."""
    place = machine.module("apex")
    costs = "device.fuse_weight_gradients=true; Megatron-Core then uses torch's layer norm and Adam"
    wanted = "NVIDIA's apex with its CUDA extensions"
    if place is None:
        return _piece("apex", None, wanted, False, False, costs, APEX_INSTALL)
    if not (place / "multi_tensor_apply").is_dir():
        found = f"another project of that name ({machine.version('apex') or place})"
        return _piece("apex", found, wanted, False, False, costs, f"pip uninstall apex; {APEX_INSTALL}")
    has_kernels = machine.module("fused_weight_gradient_mlp_cuda") is not None
    found = f"NVIDIA's {machine.version('apex') or ''}".strip() + ("" if has_kernels else ", without CUDA extensions")
    return _piece("apex", found, wanted, has_kernels, False, costs, APEX_INSTALL)


def _sglang(machine: Machine, python: str) -> Iterator[Piece]:
    found = machine.versions_of(python, ["sglang", "sglang-router", "torch-memory-saver"])
    install = (
        "make sglang-cpu   # without a GPU; with one: pip install sglang==" + PINNED["sglang"] + " in a venv of its own"
    )
    for name, costs in (
        ("sglang", "rollout=sglang; rollout=embedded is what is left"),
        ("sglang-router", "sglang.router=true"),
    ):
        pin, version = PINNED[name], found.get(name)
        here = f"{version} in {python}" if version else None
        get = install if name == "sglang" else f"{python} -m pip install sglang-router=={pin}"
        yield _piece(name, here, f"{pin} in {python}", version == pin, False, costs, get)
    saver = found.get("torch-memory-saver")
    yield _piece("torch-memory-saver", saver, f"any in {python}", True, False, "sglang.release=true on a GPU",
                 f"{python} -m pip install torch-memory-saver")  # fmt: skip


def _system(machine: Machine) -> Iterator[Piece]:
    version = machine.output("sbatch", "--version") if machine.program("sbatch") else None
    here = [name for name in _COMMANDS if machine.program(name)]
    shown = version or (f"{', '.join(here)}, without a configuration" if here else None)
    costs = "r1mega submit, but for --dry-run; r1mega train uses this machine alone"
    is_well = version is not None and len(here) == len(_COMMANDS)
    yield _piece("slurm", shown, "its commands, and a configured cluster", is_well, False, costs, _SLURM)
    costs = "rewards that run programs in a sandbox"
    yield _piece(
        "bubblewrap", machine.output("bwrap", "--version"), "any", True, False, costs, "apt-get install bubblewrap"
    )
    compiler = machine.program("g++") or machine.program("c++")
    costs = "building Transformer Engine, apex and DeepEP; Megatron-Core's and Triton's helpers on GPUs"
    yield _piece("c++", compiler, "any of C++17", True, False, costs, "apt-get install g++")
    costs = "building Transformer Engine, apex and DeepEP"
    nvcc = machine.program("nvcc")
    yield _piece(
        "nvcc",
        nvcc,
        "CUDA's compiler, of torch's CUDA version",
        True,
        False,
        costs,
        "the CUDA toolkit, by NVIDIA's packages",
    )


def _bare(version: str | None) -> str | None:
    """Without what names a build, such as +cpu."""
    return None if version is None else version.partition("+")[0]


def _names(gpus: Sequence[tuple[str, float]]) -> str:
    found: dict[str, int] = {}
    for name, gib in gpus:
        text = f"{name} of {gib:.0f} GiB"
        found[text] = found.get(text, 0) + 1
    return ", ".join(f"{count} x {text}" for text, count in found.items())
