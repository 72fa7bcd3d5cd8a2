"""The stand-ins of tools/sglang_cpu, without SGLang. tests/engine has the whole."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is not None, reason="triton is installed here, and is found before its stand-in"
)
PACKAGE = Path(__file__).resolve().parents[3] / "tools" / "sglang_cpu"


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code with the import hooks, in a process of its own: they stay for its lifetime."""
    hidden = "import sys; sys.modules.pop('triton', None)\nimport r1mega_sglang_cpu.hook\n"
    env = os.environ | {"PYTHONPATH": str(PACKAGE)}
    return subprocess.run([sys.executable, "-c", hidden + code], env=env, capture_output=True, text=True, timeout=60)


KERNELS = """
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.jit import KernelInterface

class Own(KernelInterface): ...

@triton.jit
def plain(x, SIZE: tl.constexpr): ...

@triton.autotune(configs=[triton.Config({"SIZE": 1}, num_warps=4)], key=["n"])
@triton.heuristics({"EVEN": lambda arguments: True})
@triton.jit(do_not_specialize=["n"])
def tuned(x: tl.tensor | None, n, SIZE: tl.constexpr): ...

assert tl.constexpr(5).value == 5
assert plain.__name__ == "plain" and tuned.fn.__name__ == "tuned"
assert not isinstance(1, tl.dtype) and libdevice.exp is libdevice.exp and tl.math.exp
assert (triton.cdiv(7, 3), triton.cdiv(6, 3)) == (3, 2)
assert [triton.next_power_of_2(n) for n in (1, 2, 3, 8, 9)] == [1, 2, 4, 8, 16]
"""


def test_kernels_can_be_defined() -> None:
    result = run(KERNELS)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("call", ["plain[(1,)](0, 1)", "tuned(0, 1)", "tl.load(0)()", "triton.compile(src=0)(1)"])
def test_a_kernel_that_runs_says_so(call: str) -> None:
    result = run(KERNELS + call)
    assert result.returncode != 0
    assert "triton is not installed" in result.stderr


def test_names_of_sgl_kernel_say_so() -> None:
    result = run("import sgl_kernel; sgl_kernel.verify_tree_greedy_cpu(1)")
    assert "sgl_kernel.verify_tree_greedy_cpu stands for a compiled kernel" in result.stderr
    assert "ImportError" in run("from sgl_kernel import silu_and_mul").stderr


def test_a_patch_without_its_place_ends_the_process() -> None:
    result = run("from r1mega_sglang_cpu import plugin; plugin._get('nowhere', 'thing')")
    assert result.returncode != 0 and "cannot patch sglang.srt.nowhere" in result.stderr
    result = run("from r1mega_sglang_cpu import plugin; plugin._get_attribute(sys, 'thing')")
    assert "sys has no thing to patch; is this SGLang 0.5.21?" in result.stderr
