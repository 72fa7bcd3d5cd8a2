"""What `r1mega report` says of files that are missing or not as they must be."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import page_sample

from r1mega import cli
from r1mega.pipeline.page.document import write
from r1mega.pipeline.page.fields import PageError

NUMBER = "a number, null, or an object from seed to number"
POINT = "[update, value], an integer of at least 0 and a number or null"
CUT = ("stages", 2, "metrics", "cut_off")
KL = ("stages", 1, "history", "train/kl", "1", 2)
AT = "stages[1].history.train/kl.1[2]"
CYCLE = {"from": "all_scenario_eval.report", "to": "base", "stage": "s"}
REPORT: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("title",), 3, "title: got 3; expected a text"),
    (("findings",), KeyError, "findings: not there; expected a list of objects"),
    (("stages",), {"a": 1}, 'stages: got {"a": 1}; expected a list of objects'),
    (("seeds",), [0, "1"], 'seeds: got [0, "1"]; expected a list of integers'),
    (("stages", 1, "name"), KeyError, "stages[1].name: not there; expected a text"),
    (("stages", 1, "name"), "base_eval", 'stages[1].name: got "base_eval"; expected a name that no other has'),
    (CUT, "low", f'stages[2].metrics.cut_off: got "low"; expected {NUMBER}'),
    (CUT, True, f"stages[2].metrics.cut_off: got true; expected {NUMBER}"),
    ((*CUT, "0"), [], f"stages[2].metrics.cut_off.0: got []; expected {NUMBER}"),
    (KL, [1], f"{AT}: got [1]; expected {POINT}"),
    (KL, [-1, 2.0], f"{AT}: got [-1, 2.0]; expected {POINT}"),
    (KL, [1.5, 2.0], f"{AT}: got [1.5, 2.0]; expected {POINT}"),
    (KL, [1, 1e200], f"{AT}[1]: got 1e+200; expected a number or null, at most 1e+100 in size"),
    (("stages", 1, "samples", 0, "response"), None, "stages[1].samples[0].response: got null; expected a text"),
    (("findings", 0, "holds"), "yes", 'findings[0].holds: got "yes"; expected true, false, or null'),
    (("findings", 0, "interval"), [2, 1], "findings[0].interval: got [2, 1]; expected null, or [low, high]"),
    (("findings", 0, "interval"), [1], "findings[0].interval: got [1]; expected null, or [low, high]"),
    (("findings", 0, "value"), "0.5", 'findings[0].value: got "0.5"; expected a number or null'),
    (("findings", 0, "unit"), "%", 'findings[0].unit: got "%"; expected "share" or "number"'),
]
LINEAGE: list[tuple[tuple[str | int, ...], Any, str]] = [
    (("nodes", 3, "sha256"), KeyError, "nodes[3].sha256: not there; expected a text"),
    (("nodes", 3, "id"), "base", 'nodes[3].id: got "base"; expected a name that no other has'),
    (("nodes", 0, "counts"), [1], "nodes[0].counts: got [1]; expected an object or null"),
    (("edges", 4, "from"), "nobody", 'edges[4].from: got "nobody"; expected the id of one of the nodes'),
    (("edges", 1), CYCLE, "expected no artifact made of itself"),
    (("stages", 0, "key"), None, "stages[0].key: got null; expected a text"),
]
FAULTS = [("report", *each) for each in REPORT] + [("lineage", *each) for each in LINEAGE]


@pytest.mark.parametrize(("file", "keys", "value", "said"), FAULTS)
def test_a_fault_names_file_and_key(
    tmp_path: Path, file: str, keys: tuple[str | int, ...], value: Any, said: str
) -> None:
    contents = {"report": page_sample.report(), "lineage": page_sample.lineage()}
    *steps, last = keys
    place: Any = contents[file]
    for step in steps:
        place = place[step]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    run_dir = page_sample.write(tmp_path, contents["report"], contents["lineage"])
    with pytest.raises(PageError, match=re.escape(said)) as caught:
        write(run_dir)
    assert str(caught.value).startswith(f"{tmp_path / file}.json: ")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("file", ["report.json", "lineage.json"])
def test_a_missing_file_names_the_command_that_writes_it(
    tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (page_sample.write(tmp_path) / file).unlink()
    assert cli.main(["report", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(
        f"r1mega: {tmp_path / file} is not there; `r1mega pipeline ... run.dir={tmp_path}` writes it"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "got [1]; expected an object"),
        ("\udcff", "is not UTF-8"),
        ("[" * 99999, "is not JSON"),
        ('{"nodes": ' + "9" * 9999 + "}", "is not JSON"),
    ],
    ids=["cut off", "a list", "bytes", "deep", "a huge number"],
)
def test_a_file_that_is_no_object(tmp_path: Path, content: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    (page_sample.write(tmp_path) / "lineage.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert cli.main(["report", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page_sample.write(tmp_path)
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert cli.main(["report", str(tmp_path / "elsewhere")]) == 2
    assert "is not a directory; give the run.dir of an `r1mega pipeline`" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path), "--out", str(tmp_path / "no" / "page.html")]) == 2
    assert "page.html cannot be written: No such file or directory" in capsys.readouterr().err
    for arguments, code in ((["--help"], 0), ([], 2), ([str(tmp_path), "more"], 2)):
        with pytest.raises(SystemExit) as end:
            cli.main(["report", *arguments])
        assert end.value.code == code
    assert "RUN_DIR" in capsys.readouterr().out
