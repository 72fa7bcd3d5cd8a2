"""The rows of a file without holding it: where they stand, what they hold, when the index is built anew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega.data import sft_index
from r1mega.data.sft import iter_sft, tokenize_sft
from r1mega.data.sft_index import Reading, is_indexed, open_file
from r1mega.data.toy_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
READING = Reading(TOKENIZER, "plain")


def write(path: Path, count: int = 9, extra: str = "") -> Path:
    rows = [{"prompt": f"{n}+1", "response": f"<answer> {'9' * (n % 5)}{n} </answer>"} for n in range(count)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n" + extra, encoding="utf-8")
    return path


def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that an index is built of, from here on."""
    built, build = [], sft_index._build
    monkeypatch.setattr(sft_index, "_build", lambda path, *rest: built.append(path) or build(path, *rest))
    return built


def test_rows_are_those_of_the_file_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sft_index, "_BATCH_ROWS", 4)
    extra = json.dumps({"prompt": "\u00fc", "response": "\u00e9 2"}, ensure_ascii=False)  # no line feed at the end
    path = write(tmp_path / "a.jsonl", extra=extra)
    whole = tokenize_sft(list(iter_sft(path)), TOKENIZER, "plain", None)
    found = open_file(path, tmp_path / "index", READING)
    assert len(found) == len(whole) == 10
    assert found.tokens.tolist() == [len(example.token_ids) for example in whole]
    assert found.learned.tolist() == [sum(example.loss_mask) for example in whole]
    assert found.max_token_id == max(max(example.token_ids) for example in whole)
    assert found.examples([9, 0, 5, 0]) == [whole[9], whole[0], whole[5], whole[0]]
    most = max(found.tokens)
    found.require(most)
    longest = found.tokens.tolist().index(most)
    with pytest.raises(ValueError, match=rf"a.jsonl:{longest + 1}: .* the limit is {most - 1}; raise sft.max_length"):
        found.require(most - 1)


def test_it_is_built_once_and_again_when_something_changed(tmp_path, monkeypatch):
    built = builds(monkeypatch)
    path, index = write(tmp_path / "a.jsonl"), tmp_path / "index"
    assert not is_indexed(path, index)
    first = open_file(path, index, READING)
    assert open_file(path, index, READING).content == first.content
    assert is_indexed(path, index) and len(built) == 1
    os.utime(path, (1, 1))  # of another time, but the same: the digest says so
    assert not is_indexed(path, index)
    assert open_file(path, index, READING).content == first.content
    assert is_indexed(path, index) and len(built) == 1
    path.write_text(path.read_text().replace("8+1", "7+1"))  # of the same size, but another
    other = open_file(path, index, READING)
    assert other.content != first.content and len(built) == 2
    assert open_file(path, index, Reading(TOKENIZER, "r1_zero")).content != other.content and len(built) == 3
    assert open_file(path, index, READING).content == other.content and len(built) == 3
    with pytest.raises(ValueError, match="no index of .* is there; sft.index_dir"):
        open_file(path, tmp_path / "elsewhere", READING, builds=False)


@pytest.mark.parametrize(
    ("extra", "message"),
    [("{", "a.jsonl:11: not valid JSON"), ('{"prompt": "1"}', "a.jsonl:11: key 'response' is missing")],
)
def test_a_malformed_row_leaves_no_index(tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        open_file(write(tmp_path / "a.jsonl", extra=extra), tmp_path / "index", READING)
    assert list((tmp_path / "index").iterdir()) == []
    with pytest.raises(ValueError, match="b.jsonl: no such file"):
        open_file(tmp_path / "b.jsonl", tmp_path / "index", READING)


def test_a_row_that_changes_under_a_run_is_noticed(tmp_path):
    path = write(tmp_path / "a.jsonl")
    found = open_file(path, tmp_path / "index", READING)
    path.write_text(path.read_text().replace('"4+1"', '"4 +"').replace('"8+1"', '"8"  '))
    assert found.examples([0, 4])  # as many tokens: not noticed before the next start, when the digest is compared
    with pytest.raises(ValueError, match=r"a.jsonl:9: this row has changed since the run began"):
        found.examples([8])


# Peak memory of a process of its own: what reading the rows adds to what is there before.
_MEASURE = """
import sys
from pathlib import Path
from r1mega.algo.window_packing import pack_window
from r1mega.data.order import EpochOrder
from r1mega.data.sft import iter_sft, tokenize_sft
from r1mega.data.sft_index import Reading, open_file
from r1mega.data.sft_source import WindowSource
from r1mega.data.toy_tokenizer import build_tokenizer
way, path, index = sys.argv[1:]
reading = Reading(build_tokenizer(), "plain")
def status(name):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))
list(iter_sft(Path(path).with_name("warm.jsonl")))
open_file(Path(path).with_name("warm.jsonl"), index, reading).examples([0, 1])
Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
before = status("VmRSS")
if way == "whole":
    held = tokenize_sft(list(iter_sft(path)), reading.tokenizer, "plain", None)
else:
    rows = open_file(path, index, reading)
    order = EpochOrder(len(rows), 0, True, rows.content)
    source = WindowSource(order, rows.tokens, window=1024, max_tokens=512, chunks_per_update=8)
    for _ in range(200):
        rows.examples(source.next().rows)
print(status("VmHWM") - before)
"""


def grown(way: str, path: Path, index: Path) -> float:
    """MiB that a process grows by."""
    argv = [sys.executable, "-c", _MEASURE, way, str(path), str(index)]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=280, env={**os.environ, "RAYON_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


@pytest.mark.extended
def test_memory_does_not_grow_with_the_file(tmp_path):
    write(tmp_path / "warm.jsonl", 600)
    small, large = write(tmp_path / "small.jsonl", 20_000), write(tmp_path / "large.jsonl", 200_000)
    streamed = [grown("stream", path, tmp_path / "index") for path in (small, large)]
    whole = grown("whole", small, tmp_path / "index")
    print(f"MiB: streamed {streamed}, a tenth of the rows held {whole}")
    # 180,000 more rows cost 24 bytes each in the mapped index and 4 in the order of the epoch: 4.8 MiB
    assert streamed[1] - streamed[0] < 10
    assert whole > 2 * streamed[1], "the control: a tenth of the rows, held"
