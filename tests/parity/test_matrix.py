"""`tools/parity_matrix.py`: every family at every kind of layout, and what it says of known mistakes."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import parity_matrix
from parity import cells
from parity.nursery import Nursery
from r1mega.launch import supervise

TOOL = Path(parity_matrix.__file__).resolve()
LEVERS = {
    "recompute", "overlap_grad_reduce", "overlap_param_gather", "logprob_chunk_tokens", "params_dtype", "dispatcher",
    "fuse_weight_gradients",
}  # fmt: skip


def matrix(*options: object, timeout: float = 290) -> subprocess.CompletedProcess[str]:
    """The program with worlds of its own."""
    argv = [sys.executable, str(TOOL), *map(str, options)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout)


def measured(nursery: Nursery, out: Path, *options: str) -> tuple[int, list[dict]]:
    """Exit code and cells of the program in this process; its worlds come from the nursery."""
    told = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(told):
        patch.setattr(sys, "argv", [str(TOOL), "--json", str(out), *options])
        patch.setattr(supervise, "run_world", nursery.run_world)
        exit_code = parity_matrix.main()
    assert out.exists(), told.getvalue()
    return exit_code, json.loads(out.read_text())


@pytest.fixture(scope="module")
def core(nursery, tmp_path_factory):
    """The cells of every commit, levers and all."""
    return measured(nursery, tmp_path_factory.mktemp("core") / "cells.json", "--core")


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory):
    """All cells, levers and all."""
    return measured(nursery, tmp_path_factory.mktemp("whole") / "cells.json")


def assert_same_numbers(found: list[dict], family: str, num_cells: int, num_refused: int) -> None:
    mine = [cell for cell in found if cell["family"] == family and not cell["options"]]
    compared = [cell for cell in mine if "refused" not in cell]
    assert (len(compared), len(mine) - len(compared)) == (num_cells, num_refused)
    assert len({cell["layout"] for cell in mine}) == len(mine)
    assert [cells.line(cell) for cell in compared if not cells.is_green(cell)] == []


# Two key and value heads cannot be cut over four ranks: the refused ones.
@pytest.mark.timeout(900)  # the first of them runs all cells
@pytest.mark.parametrize(
    ("family", "num_cells", "num_refused"),
    [("deepseek_v3", 3, 0), ("deepseek_v3_mtp", 9, 0), ("deepseek_v3_replay", 2, 0), ("qwen2", 4, 1), ("llama", 5, 0)],
)
def test_layouts_give_the_same_numbers(core, family, num_cells, num_refused):
    assert_same_numbers(core[1], family, num_cells, num_refused)


@pytest.mark.timeout(900)
def test_the_levers_change_nothing(core):
    """Recomputation, overlapped communication, small chunks of logits; bf16 within its own tolerance."""
    with_levers = [cell for cell in core[1] if cell["options"]]
    assert {name for cell in with_levers for name in cell["options"]} >= LEVERS
    assert [cells.line(cell) for cell in with_levers if not cells.is_green(cell)] == []


@pytest.mark.timeout(900)
def test_all_green_is_exit_code_0(core):
    assert core[0] == 0


@pytest.mark.extended
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("family", "num_cells", "num_refused"),
    [
        ("deepseek_v3", 17, 0),
        ("deepseek_v3_mtp", 28, 0),
        ("deepseek_v3_replay", 4, 0),
        ("qwen2", 15, 1),
        ("llama", 15, 1),
    ],
)
def test_every_layout_gives_the_same_numbers(whole, family, num_cells, num_refused):
    assert_same_numbers(whole[1], family, num_cells, num_refused)


@pytest.mark.extended
@pytest.mark.timeout(3600)
def test_no_lever_changes_anything(whole):
    with_levers = [cell for cell in whole[1] if cell["options"]]
    assert len(with_levers) == len(cells.LEVERS)
    assert [cells.line(cell) for cell in with_levers if not cells.is_green(cell)] == []


@pytest.fixture(scope="module")
def broken(nursery, tmp_path_factory):
    """Family and mistake -> the cell of two tensor-parallel ranks."""
    names = ("layernorm_reduction", "expert_reduction", "down_projection", "gate_up", "counted_twice")
    options = ("--break", *names, "--families", "deepseek_v3", "llama", "--layouts", "tp=2")
    exit_code, found = measured(nursery, tmp_path_factory.mktemp("broken") / "cells.json", *options)
    assert exit_code == 1
    return {(cell["family"], cell["broken"]): cell for cell in found}


@pytest.mark.parametrize(
    ("mistake", "family", "worst"),
    [
        ("layernorm_reduction", "llama", "norm"),
        ("layernorm_reduction", "deepseek_v3", ""),
        ("expert_reduction", "deepseek_v3", ".experts."),
        ("down_projection", "deepseek_v3", ""),
        ("gate_up", "llama", ""),
        ("gate_up", "deepseek_v3", ""),
    ],
)
def test_known_mistakes_turn_cells_red(broken, mistake, family, worst):
    cell = broken[family, mistake]
    assert not cells.is_green(cell)
    assert cell["max_rel_grad_diff"] > 3e-3
    assert worst in cell["worst_tensor"]
    # These faults are of the backward pass; the table's shows in the log-probs as well.
    assert (cell["max_abs_diff"] > 1e-2) == (mistake == "gate_up")


def test_a_wrong_norm_of_the_gradient_turns_a_cell_red(broken):
    """All gradients are right, and what they are clipped by is not. Adam hides most of it: the weights pass."""
    cell = broken["deepseek_v3", "counted_twice"]
    assert not cells.is_green(cell)
    assert cell["max_rel_grad_diff"] < 1e-5 and cell["max_rel_norm_diff"] > 10 * cells.MAX_NORM_DIFF
    assert cell["max_rel_weight_diff"] < cells.MAX_WEIGHT_DIFF


def test_slices_of_sequences_cut_otherwise_turn_a_cell_red(nursery, tmp_path):
    options = ("--break", "plain_slices", "--families", "deepseek_v3", "llama", "--layouts", "cp=2")
    exit_code, found = measured(nursery, tmp_path / "cells.json", *options)
    assert exit_code == 1 and len(found) == 2
    assert all(cell["max_abs_diff"] > 0.1 and cell["max_rel_grad_diff"] > 0.3 for cell in found)


def test_what_stands_in_for_kernels_is_called(nursery, tmp_path, monkeypatch):
    """A mistake in it turns the cell red that needs it."""
    needing = tuple(lever for lever in cells.CORE_LEVERS if "dispatcher" in lever[2])
    monkeypatch.setattr(cells, "LEVERS_OF", {"core": needing})
    names, family = ("lost_weights", "added_twice"), "deepseek_v3_mtp"
    options = ("--core", "--levers", "only", "--families", family, "--break", *names)
    exit_code, found = measured(nursery, tmp_path / "cells.json", *options)
    assert exit_code == 1 and len(found) == 2
    worst = {cell["broken"]: cell for cell in found}
    assert all(cell["max_rel_grad_diff"] > 0.1 for cell in worst.values())
    assert ".mlp.gate." in worst["lost_weights"]["worst_tensor"]


def test_experts_replayed_a_token_late_turn_a_cell_red(tmp_path):
    """From the program as people start it."""
    out = tmp_path / "cells.json"
    result = matrix("--break", "late_choice", "--families", "deepseek_v3_replay", "--layouts", "1", "--json", out)
    assert result.returncode == 1, result.stdout + result.stderr
    (cell,) = json.loads(out.read_text())
    assert cell["max_abs_diff"] > 1e-2 and cell["max_rel_grad_diff"] > 0.1


@pytest.mark.parametrize("mistake", ["expert_reduction", "down_projection", "counted_twice"])
def test_a_family_without_the_part_stays_green(broken, mistake):
    assert cells.is_green(broken["llama", mistake])


def test_an_unreadable_layout_is_refused():
    result = matrix("--layouts", "xp=2")
    assert result.returncode == 2
    assert "AXIS=N" in result.stderr
