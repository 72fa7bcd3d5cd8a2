"""What runs, what is skipped, what is put aside: stub stages that are real processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from r1mega.config.faults import ConfigError
from r1mega.pipeline import lineage, lock


def test_a_pipeline_runs_once_and_says_what_it_did(stubs) -> None:
    stubs.diamond()
    assert stubs.run() == 0
    said = stubs.manifest("join")
    assert set(said) == {
        "stage", "kind", "status", "key", "inputs", "config_digest", "code", "outputs", "counts", "seconds"
    }  # fmt: skip
    assert (said["stage"], said["kind"], said["status"]) == ("join", "tool", "done")
    left = stubs.root / "stages" / "left" / "out.json"
    sha256 = hashlib.sha256(left.read_bytes()).hexdigest()
    assert said["inputs"]["in0"] == {"path": "stages/left/out.json", "sha256": sha256, "from": "left.out"}
    assert set(said["outputs"]["out"]) == {"path", "sha256", "kind", "counts"}
    assert set(said["code"]) == {"version", "commit"}
    assert stubs.manifest("base")["inputs"]["in0"]["path"] == str(stubs.place / "questions.jsonl")

    before = stubs.starts()
    assert stubs.run() == 0
    assert stubs.ran_again(before) == set()


def test_a_changed_input_runs_what_depends_on_it_and_nothing_else(stubs) -> None:
    stubs.diamond()
    assert stubs.run() == 0
    before = stubs.starts()
    (stubs.place / "more.jsonl").write_text('{"q": 2}\n{"q": 3}\n')
    assert stubs.run() == 0
    assert stubs.ran_again(before) == {"right", "join"}
    assert sorted(path.name for path in (stubs.root / "aside").iterdir()) == ["join-1", "right-1"]
    assert (stubs.root / "aside" / "right-1" / "out.json").exists(), "what was there is kept"


def test_a_stage_that_leaves_the_same_as_before_stops_the_change(stubs) -> None:
    """Early cut-off: `base` runs again, and its output, folded, is the same to the byte."""
    stubs.source("questions", "abcd")
    stubs.stage("base", "questions", fold=2)
    stubs.stage("after", "base.out")
    assert stubs.run() == 0
    before = stubs.starts()
    (stubs.place / "questions.jsonl").write_text("abcdef")
    assert stubs.run() == 0
    assert stubs.ran_again(before) == {"base"}
    before = stubs.starts()
    (stubs.place / "questions.jsonl").write_text("abcdefg")  # the control: now it differs
    assert stubs.run() == 0
    assert stubs.ran_again(before) == {"base", "after"}


def test_what_is_touched_but_not_changed_runs_nothing(stubs) -> None:
    stubs.diamond()
    assert stubs.run() == 0
    before = stubs.starts()
    path = stubs.place / "questions.jsonl"
    path.write_text(path.read_text())
    assert stubs.run() == 0
    assert stubs.ran_again(before) == set()


def test_a_changed_argument_program_or_output_runs_again(stubs) -> None:
    stubs.diamond()
    assert stubs.run() == 0
    before = stubs.starts()
    stubs.pipeline.stages["left"].arguments[2] = "7"
    assert stubs.run() == 0
    assert stubs.ran_again(before) == {"left", "join"}
    before = stubs.starts()
    (stubs.root / "stages" / "right" / "out.json").write_text("damaged")
    assert stubs.run() == 0
    # What is made anew is what was there before the damage, so what depends on it has nothing to do.
    assert stubs.ran_again(before) == {"right"}
    before = stubs.starts()
    stubs.program.write_text(stubs.program.read_text() + "# another program\n")
    assert stubs.run() == 0
    assert stubs.ran_again(before) == {"base", "left", "right", "join"}


def test_a_failed_stage_ends_the_pipeline_and_runs_again(stubs, capfd) -> None:
    stubs.diamond()
    more = stubs.place / "more.jsonl"
    more.write_text("FAIL")
    assert stubs.run() == 1
    said = capfd.readouterr().err
    assert "stage right: exit code 1" in said and "told to fail" in said and "stage.log" in said
    assert stubs.manifest("right")["status"] == "failed"
    assert not (stubs.root / "stages" / "join").exists()
    assert {line["name"] for line in stubs.lineage()["stages"]} == {"base", "left"}
    assert [stage["name"] for stage in stubs.report()["stages"]] == ["base", "left"]
    more.write_text("well")
    assert stubs.run() == 0


def test_a_stage_that_leaves_nothing_has_failed(stubs, capfd) -> None:
    stubs.source("questions", "abcd")
    stubs.stage("base", "questions").arguments[0] = "{dir}/elsewhere.json"
    assert stubs.run() == 1
    assert "has not left its outputs: out" in capfd.readouterr().err


@pytest.mark.parametrize(("left", "word"), [("['a']", "Expecting value"), ("[1]", "got a list")])
def test_a_report_that_is_none_is_the_stages_failure(stubs, capfd, left: str, word: str) -> None:
    stubs.source("questions", "abcd")
    stubs.program.write_text(f"import sys\nopen(sys.argv[1], 'w').write({left!r})\n")
    stubs.stage("base", "questions")
    assert stubs.run() == 1
    said = capfd.readouterr().err
    assert "base" in said and "out.json: must hold a JSON object" in said and word in said
    assert stubs.manifest("base")["status"] == "failed"


def test_a_stage_that_takes_too_long_is_ended(stubs, capfd) -> None:
    stubs.source("questions", "abcd")
    stubs.stage("base", "questions").minutes = 0.02
    (stubs.place / "seconds").write_text("60")
    assert stubs.run() == 124
    assert "took longer than its limit of 0.02 minutes" in capfd.readouterr().err


@pytest.mark.parametrize(("at_once", "beside"), [(1, False), (2, True)])
def test_stages_that_do_not_wait_for_each_other_may_run_beside_each_other(stubs, at_once: int, beside: bool) -> None:
    stubs.diamond()
    stubs.stage("third", "base.out")
    stubs.pipeline.at_once = at_once
    (stubs.place / "seconds").write_text("1")
    assert stubs.run() == 0
    times = stubs.times()
    assert times[:2] == ["base begins", "base ends"]
    assert {times[2], times[3]} == ({"left begins", "right begins"} if beside else {"left begins", "left ends"})
    running: set[str] = set()
    for line in times:
        name, what = line.split()
        (running.add if what == "begins" else running.remove)(name)
        assert len(running) <= at_once
    assert times.index("join begins") > max(times.index("left ends"), times.index("right ends"))
    assert {name: stubs.manifest(name)["status"] for name in stubs.pipeline.stages} == dict.fromkeys(
        stubs.pipeline.stages, "done"
    )


def test_no_stage_at_a_time_is_refused(stubs) -> None:
    stubs.diamond()
    stubs.pipeline.at_once = 0
    with pytest.raises(ConfigError, match=r"pipeline.at_once: got 0; must be >= 1"):
        stubs.run()


def test_what_runs_beside_a_stage_that_fails_comes_to_its_end_and_nothing_else_begins(stubs, capfd) -> None:
    stubs.diamond()
    stubs.stage("last", "left.out")
    stubs.pipeline.at_once = 2
    (stubs.place / "seconds").write_text("2")
    (stubs.place / "more.jsonl").write_text("FAIL")
    assert stubs.run() == 1
    assert "stage right: exit code 1" in capfd.readouterr().err
    assert stubs.manifest("left")["status"] == "done" and stubs.manifest("right")["status"] == "failed"
    assert not (stubs.root / "stages" / "last").exists() and not (stubs.root / "stages" / "join").exists()
    (stubs.place / "more.jsonl").write_text("mended")
    before = stubs.starts("base", "left")
    assert stubs.run() == 0
    assert stubs.starts("base", "left") == before


def test_a_signal_ends_all_that_run(stubs) -> None:
    stubs.diamond()
    stubs.pipeline.at_once = 2
    (stubs.place / "seconds").write_text("3")
    (stubs.place / "times").touch()

    def signal_when_two_run() -> None:
        until = time.monotonic() + 60
        while not {"left begins", "right begins"} <= set(stubs.times()) and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=signal_when_two_run)
    sender.start()
    assert stubs.run() == 143
    sender.join()
    assert [stubs.manifest(name)["status"] for name in ("base", "left", "right")] == ["done", "failed", "failed"]
    assert "left ends" not in stubs.times() and "right ends" not in stubs.times()
    (stubs.place / "seconds").write_text("0")
    assert stubs.run() == 0


def test_one_stage_alone(stubs, capfd) -> None:
    stubs.diamond()
    stubs.pipeline.only = "left"
    assert stubs.run() == 2
    assert "stage left waits for base" in capfd.readouterr().err
    for stubs.pipeline.only in ("base", "left"):
        assert stubs.run() == 0
    assert sorted(path.name for path in (stubs.root / "stages").iterdir()) == ["base", "left"]


def test_status_runs_nothing_and_says_why(stubs, capsys) -> None:
    stubs.diamond()
    stubs.pipeline.status = True
    assert stubs.run() == 0
    assert not stubs.root.exists() or not (stubs.root / "stages").exists()
    said = capsys.readouterr().out
    assert "to run" in said and "for base" in said
    stubs.pipeline.status = False
    assert stubs.run() == 0
    (stubs.place / "more.jsonl").write_text("other")
    stubs.pipeline.status = True
    capsys.readouterr()
    assert stubs.run() == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")}
    assert "done" in lines["left"] and "to run again" in lines["right"] and "for right" in lines["join"]


def test_each_seed_has_its_own_stages_and_figures(stubs) -> None:
    from r1mega.config.schema_pipeline import PipelineFinding

    stubs.source("questions", "abcd")
    stubs.stage("base", "questions")
    stubs.stage("after", "base.out", "base.out")
    stubs.pipeline.findings["grows"] = PipelineFinding("after is more", "after", "score", "base")
    stubs.pipeline.seeds = [3, 14, 5]
    assert stubs.run() == 0
    homes = [stubs.root, stubs.root / "seeds" / "14", stubs.root / "seeds" / "5"]
    said = [json.loads((home / "stages" / "after" / "out.json").read_text())["metrics"]["score"] for home in homes]
    seeds = [json.loads((home / "stages" / "after" / "out.json").read_text())["metrics"]["seed"] for home in homes]
    assert seeds == [3, 14, 5]
    assert all(lineage.problems(json.loads((home / "lineage.json").read_text())) == [] for home in homes)
    report = stubs.report()
    assert report["seeds"] == [3, 14, 5]
    mean = sum(said) / 3
    assert report["stages"][1]["metrics"]["score"] == dict(zip(("3", "14", "5"), said, strict=True))
    (found,) = report["findings"]
    assert found["difference"] == pytest.approx(mean - 4) and found["holds"]
    low, high = found["interval"]
    assert low < min(said) - 4 and max(said) - 4 < high and low + high == pytest.approx(2 * (mean - 4))

    before = stubs.starts()
    stubs.pipeline.seeds = [3]
    assert stubs.run() == 0
    assert stubs.ran_again(before) == set()


def test_two_pipelines_do_not_share_a_directory(stubs, monkeypatch) -> None:
    stubs.diamond()
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.2)
    with lock.held(stubs.root), pytest.raises(ConfigError, match="a pipeline runs in it"):
        stubs.run()
    assert stubs.run() == 0


def test_sources_that_are_not_there_are_named_together(stubs) -> None:
    stubs.diamond()
    stubs.pipeline.sources["questions"].path = None
    stubs.pipeline.sources["more"].path = str(stubs.place / "nowhere.jsonl")
    with pytest.raises(ConfigError) as error:
        stubs.run()
    assert [fault.field for fault in error.value.faults] == [
        "pipeline.sources.questions.path", "pipeline.sources.more.path"
    ]  # fmt: skip
    assert not stubs.root.exists()


def test_the_digests_do_not_depend_on_the_directory(stubs, tmp_path: Path) -> None:
    stubs.diamond()
    assert stubs.run() == 0 and stubs.run(tmp_path / "other") == 0
    for name in stubs.pipeline.stages:
        one, other = stubs.manifest(name), stubs.manifest(name, tmp_path / "other")
        assert (one["key"], one["outputs"]["out"]["sha256"]) == (other["key"], other["outputs"]["out"]["sha256"])
