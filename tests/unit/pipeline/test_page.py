from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import page_sample

from r1mega.pipeline.page.document import write

VOID = {"meta", "link", "br", "hr", "img", "input", "col", "wbr"}
HOSTILE = (
    "</pre></details><script>alert(1)</script><img src=x onerror=alert(2)> & \"quoted\" 'too' ]]> <!-- \x00\x1b\ud800"
)


class Reader(HTMLParser):
    """What a page holds, and whether every tag that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.source = text
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.code: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.code[self.open[-1]] = data
        else:
            self.text.append(data)

    def values(self, name: str) -> list[str | None]:
        return [value for _, key, value in self.attributes if key == name]

    def all_text(self) -> str:
        return "".join(self.text)


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., Reader]:
    def drawn(report: dict[str, Any] | None = None, lineage: dict[str, Any] | None = None) -> Reader:
        return Reader(write(page_sample.write(tmp_path / "run", report, lineage)).read_text(encoding="utf-8"))

    return drawn


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def test_the_page_is_well_formed_and_needs_nothing_else(draw: Callable[..., Reader]) -> None:
    page = draw()
    ids = page.values("id")
    assert len(ids) == len(set(ids)) and len(ids) > 20
    links = page.values("href")
    assert links and all(link and link.startswith("#") and link[1:] in ids for link in links)
    assert page.values("src") == [] and page.tags["link"] == page.tags["img"] == page.tags["iframe"] == 0
    code = page.code["style"] + page.code["script"]
    assert not re.search(r"url\(|@import|https?:|fetch\(|XMLHttp|import\(", code)
    assert not re.search(r"https?://|//\w", " ".join(value or "" for _, _, value in page.attributes))
    assert "prefers-color-scheme: dark" in code
    assert page.tags["h1"] == 1 and page.tags["svg"] > 8


def test_every_figure_of_the_report_is_on_the_page(draw: Callable[..., Reader]) -> None:
    report = page_sample.report()
    page = draw(report)
    shown = {float(value) for tag, name, value in page.attributes if tag == "data" and name == "value" and value}
    history = [
        points for stage in report["stages"] for by in stage.get("history", {}).values() for points in by.values()
    ]
    for stage in report["stages"]:
        assert stage["name"] in page.all_text()
        assert (
            set(numbers(stage["metrics"])) | set(numbers([one["reward"] for one in stage.get("samples", [])])) <= shown
        )
    assert {value for points in history for _, value in points} <= shown
    assert set(numbers(report["findings"])) <= shown
    assert float(report["seconds"]) in shown
    # The exact values are attributes; what is read is rounded, in the unit of the metric.
    assert {"87.4%", "+63.8\u00a0pts", "\u22121.1\u00a0pts", "+15.0"} <= set(page.text)


def test_findings_come_first_and_say_whether_they_hold(draw: Callable[..., Reader]) -> None:
    text = draw().all_text()
    assert text.index("Pure RL raises") < text.index("Mean response length") < text.index("What each stage scores")
    assert "Of 6 findings, 4 hold here, 1 does not show, 1 is not decided." in text
    assert text.count("does not show") == 2 and text.count("not decided") == 2


def test_what_a_model_wrote_becomes_no_markup(draw: Callable[..., Reader]) -> None:
    plain = draw()
    report, lineage = page_sample.report(), page_sample.lineage()
    report["title"] += HOSTILE
    stage, finding, node, work = report["stages"][1], report["findings"][0], lineage["nodes"][5], lineage["stages"][0]
    for thing, keys in (
        (stage, ("name", "about")), (stage["samples"][0], ("response",)), (finding, ("name", "claim", "note")),
        (node, ("path", "kind", "sha256")), (work, ("name", "about", "key")),
    ):  # fmt: skip
        thing.update({key: thing[key] + HOSTILE for key in keys})
    stage["samples"][0]["response"] += "</think>" + HOSTILE
    stage["metrics"][HOSTILE] = 0.5
    stage["history"][HOSTILE] = {HOSTILE: [[0, 1.0]]}
    work["config"][HOSTILE] = {"x": HOSTILE}
    node["counts"][HOSTILE] = HOSTILE
    page = draw(report, lineage)
    for tag in ("script", "img", "style"):
        assert page.tags[tag] == plain.tags[tag], tag
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.all_text().count("<script>alert(1)</script>") >= 12
    assert "\u2400\u241b\ufffd" in page.all_text()  # what HTML cannot hold is made visible


def test_no_script_but_its_own_may_run(draw: Callable[..., Reader]) -> None:
    page = draw()
    policy = next(value or "" for value in page.values("content") if "default-src" in (value or ""))
    digest = base64.b64encode(hashlib.sha256(page.code["script"].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    page_sample.write(tmp_path / "run")
    pages = []
    for number in range(2):
        out = tmp_path / f"{number}.html"
        code = "import sys; from r1mega import cli; sys.exit(cli.main(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, "report", str(tmp_path / "run"), "--out", str(out)],
            capture_output=True, text=True, timeout=60,
            env={"PYTHONHASHSEED": str(number), "PYTHONPATH": ":".join(sys.path)},
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (0, f"{out}\n", "")
        pages.append(out.read_bytes())
    assert pages[0] == pages[1]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "0.html", "1.html"}  # and nothing half-written


def test_what_is_missing_is_said(draw: Callable[..., Reader]) -> None:
    empty = draw({"title": "t", "seeds": [], "seconds": 1, "stages": [], "findings": []},
                 {"nodes": [], "edges": [], "stages": []})  # fmt: skip
    assert empty.all_text().count("none") >= 7
    stages = [{"name": "s", "about": "a"}, {"name": "u", "about": "a", "metrics": {"accuracy": None}}]
    finding = {"name": "f", "claim": "c", "holds": None}
    bare = {"title": "t", "seeds": [0], "seconds": None, "findings": [finding], "stages": stages}
    page = draw(bare, {"nodes": [], "edges": [], "stages": []})
    assert page.all_text().count("none") >= 8
    assert "with seed 0: s and u." in page.all_text()


def test_one_seed_needs_no_object_of_seeds(draw: Callable[..., Reader]) -> None:
    report = page_sample.report()
    for stage in report["stages"]:
        for part in ("metrics", "history"):
            values = stage.get(part, {})
            stage[part] = {name: by["0"] if isinstance(by, dict) else by for name, by in values.items()}
    report["seeds"] = [0]
    text = draw(report).all_text()
    assert "thin: each" not in text and "held-out pass@1 from" not in text
    assert "87.5%" in text


def test_the_best_of_a_row_is_bold(draw: Callable[..., Reader]) -> None:
    rows = (("a", 0.25, 0.5, 10), ("b", 0.75, 0.25, 20), ("c", 0.5, 0.125, 15))
    stages = [
        {"name": name, "about": "", "metrics": {"accuracy": right, "cut_off": cut, "response_tokens": tokens}}
        for name, right, cut, tokens in rows
    ]
    report = {"title": "t", "seeds": [0], "seconds": 1, "findings": [], "stages": stages}
    text = draw(report).source
    assert re.findall(r"<b><data[^>]*>([^<]*)</data></b>", text) == ["75.0%", "12.5%"]  # of a length none is best
    changes = re.findall(r'<span class="change ?(\w*)"><data[^>]*>([^<]*)</data>', text)
    assert changes == [
        ("better", "+50.0\u00a0pts"), ("worse", "\u221225.0\u00a0pts"), ("better", "\u221225.0\u00a0pts"),
        ("better", "\u221212.5\u00a0pts"), ("", "+10"), ("", "\u22125"),
    ]  # fmt: skip


def test_stages_that_measure_different_things_stand_in_different_tables(draw: Callable[..., Reader]) -> None:
    stages = [
        {"name": "trained_a", "about": "", "metrics": {"train/loss": 0.5, "reward/accuracy": 0.5}},
        {"name": "scored_a", "about": "", "metrics": {"pass_at_1": 0.4, "cut_off": 0.1}},
        {"name": "trained_b", "about": "", "metrics": {"train/loss": 0.25, "train/kl": 0.01}},
        {"name": "scored_b", "about": "", "metrics": {"pass_at_1": 0.6}},
        {"name": "trained_c", "about": "", "metrics": {"train/kl": 0.02}},
    ]
    text = draw({"title": "t", "seeds": [0], "seconds": 1, "findings": [], "stages": stages}).source
    heads = re.findall(r'<table class="stages"><thead><tr>(.*?)</tr>', text)
    names = [re.findall(r">([^<>]+)<wbr>([^<>]+)<", head) for head in heads]
    assert names == [
        [("scored_", "a"), ("scored_", "b")],  # what is shown first is what evaluations say
        [("trained_", "a"), ("trained_", "b"), ("trained_", "c")],  # one lot: b has a metric of a and one of c
    ]
    alone = text[text.index("Of one stage alone") :]
    assert 'value="0.1"' in alone and alone.index("trained_a") < alone.index("scored_a")


def test_curves_of_one_of_several_seeds_say_so(draw: Callable[..., Reader]) -> None:
    report = page_sample.report()
    assert "report.json gives that of one of them" not in draw(report).all_text()
    report["stages"][1]["history"] = {"eval/pass_at_1": [[0, 0.2], [10, 0.8]]}
    assert "The run has 3 seeds; where one line is drawn, report.json gives that of one" in draw(report).all_text()


def test_a_stage_without_accuracy_shows_its_loss(draw: Callable[..., Reader]) -> None:
    history = {"train/loss": [[1, 2.5], [2, 1.5]], "train/lr": [[1, 0.1], [2, 0.2]]}
    stages = [{"name": "sft", "about": "", "metrics": {}, "history": history}]
    report = {"title": "t", "seeds": [0], "seconds": 1, "findings": [], "stages": stages}
    text = draw(report).source
    assert text.index(">Loss<") < text.index("Also recorded: learning rate")
    history["eval/pass_at_1"] = [[1, 0.2], [2, 0.8]]
    text = draw(report).source
    assert ">Loss<" not in text and "Also recorded: loss, learning rate" in text


def test_keys_without_a_place_are_named(draw: Callable[..., Reader]) -> None:
    report = page_sample.report()
    report["findings"][1]["p_value"] = 0.01
    assert "report.json: findings[1].p_value" in draw(report).all_text()
    assert "not shown here" not in draw().all_text()


def test_no_heavy_import() -> None:
    code = "import sys, r1mega.pipeline.page.document\n"
    code += "heavy = {'torch', 'numpy', 'hydra', 'transformers', 'matplotlib'}\n"
    subprocess.run([sys.executable, "-c", code + "assert not heavy & set(sys.modules)"], check=True, timeout=60)


def test_the_reader_of_these_tests_sees_markup_that_got_through() -> None:
    page = Reader("<p>" + HOSTILE.replace("</pre></details>", "").replace(" <!-- \x00\x1b\ud800", "") + "</p>")
    assert page.tags["script"] == 1 and page.tags["img"] == 1
    with pytest.raises(AssertionError, match="closes nothing"):
        Reader("<p>" + HOSTILE + "</p>")
