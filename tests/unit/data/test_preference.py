"""Rows of reward models, summaries, lengths that tell nothing, and the window of general questions."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from r1mega.data.preference import (
    PreferenceRow,
    PreferenceSource,
    balance_lengths,
    read_labels,
    read_pairs,
    tokenize_preferences,
)
from r1mega.data.summary import final_summary
from r1mega.data.toy_tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
TOOL = Path(__file__).resolve().parents[3] / "tools" / "balance_pairs.py"


@pytest.mark.parametrize(
    ("text", "is_thinking", "summary"),
    [
        ("plain words", False, "plain words"),
        ("<think> a </think> <answer> b </answer>", False, "b"),
        ("<think> a </think>\n\nb and c", False, "b and c"),
        ("a </think> b", True, "b"),
        ("still thinking", True, ""),
        ("<think> cut off", False, ""),
        ("<think> a </think> b </think> c", False, "c"),
        ("<think> <answer> a </answer> </think> b", False, "b"),
        ("<think> a </think> <answer> cut", False, "cut"),
        ("<think> a </think>  ", False, ""),
    ],
)
def test_the_final_summary(text, is_thinking, summary):
    assert final_summary(text, is_thinking=is_thinking) == summary


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_are_read_without_their_thinking(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "q", "chosen": "<think>x</think> yes", "rejected": "no"})
    assert read_pairs(path) == [PreferenceRow(f"{path}:1", "q", ("yes", "no"))]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "p.jsonl:1: key 'rejected' is missing"),
        ({"prompt": "q", "chosen": "<think> a", "rejected": "b"}, "p.jsonl:1: 'chosen' has nothing after its thinking"),
        ({"prompt": "q", "chosen": "<think> x </think> b", "rejected": "b"}, "have the same summary"),
    ],
)
def test_pairs_that_say_nothing_are_refused(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(write(tmp_path / "p.jsonl", row))


def test_labels(tmp_path):
    row = {"prompt": "q", "response": "<think> a </think> b"}
    path = write(tmp_path / "l.jsonl", *({**row, "label": label} for label in (1, 0, True, False, "safe", "unsafe")))
    found = read_labels(path)
    assert [one.label for one in found] == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
    assert found[0].responses == ("<think> a </think> b",)
    for label in (2, "yes", None, 0.5, [1]):
        with pytest.raises(ValueError, match=r"l.jsonl:1: 'label': got "):
            read_labels(write(tmp_path / "l.jsonl", {**row, "label": label}))


def test_both_of_a_pair_are_tokenized_behind_the_prompt():
    (example,) = tokenize_preferences([PreferenceRow("f:1", "ab", ("cd", "e"))], TOKENIZER, "plain", 16)
    chosen, rejected = example.sequences
    prompt, end = TOKENIZER.encode("ab"), TOKENIZER.eos_token_id
    assert chosen.token_ids == (*prompt, *TOKENIZER.encode("cd"), end)
    assert rejected.token_ids == (*prompt, *TOKENIZER.encode("e"), end) and sum(rejected.loss_mask) == 2
    assert example.num_tokens == len(chosen.token_ids) + len(rejected.token_ids)
    with pytest.raises(ValueError, match=r"f:1: .*raise reward_model.max_length"):
        tokenize_preferences([PreferenceRow("f:1", "ab", ("cd", "e"))], TOKENIZER, "plain", 4)


def test_the_order_goes_on_and_notices_other_labels():
    rows = [PreferenceRow(f"f:{i}", "q", (str(i),), float(i % 2)) for i in range(10)]
    examples = tokenize_preferences(rows, TOKENIZER, "plain", 16)
    whole, source = PreferenceSource(examples, 1).next(25), PreferenceSource(examples, 1)
    assert source.next(7) == whole[:7]
    again = PreferenceSource(examples, 1)
    again.load_state_dict(json.loads(json.dumps(source.state_dict())))
    assert again.next(18) == whole[7:]
    flipped = [PreferenceRow(row.id, row.prompt, row.responses, 1 - row.label) for row in rows]
    with pytest.raises(ValueError, match="data source"):
        PreferenceSource(tokenize_preferences(flipped, TOKENIZER, "plain", 16), 1).load_state_dict(source.state_dict())


def test_balanced_lengths_say_nothing_of_what_was_chosen():
    rng = random.Random(0)
    lengths = []
    for _ in range(4000):  # whoever judged these likes length
        long, short = sorted((rng.randint(20, 400), rng.randint(20, 400)), reverse=True)
        lengths.append((long, short) if rng.random() < 0.8 else (short, long))
    kept = balance_lengths(lengths, seed=3)
    assert kept == sorted(set(kept)) and kept == balance_lengths(lengths, seed=3) != balance_lengths(lengths, seed=4)
    unequal = [lengths[i] for i in kept if lengths[i][0] != lengths[i][1]]
    assert 2 * sum(chosen > rejected for chosen, rejected in unequal) == len(unequal) > 1000
    chosen, rejected = (sum(pair[side] for pair in unequal) for side in (0, 1))
    assert abs(chosen / rejected - 1) < 0.05
    before = [sum(pair[side] for pair in lengths) for side in (0, 1)]
    assert before[0] / before[1] > 1.3, "the control: unbalanced they tell"


def test_lengths_balanced_by_hand():
    """Ratio 3: two where the chosen one is longer, one where the rejected is; ratio 1.2: one alone; equal: stays."""
    lengths = [(30, 10), (10, 30), (60, 20), (12, 10), (5, 5)]
    kept = balance_lengths(lengths, seed=0)
    assert {1, 4} < set(kept) and len(kept) == 3 and 3 not in kept


def test_the_tool_keeps_clear_pairs(tmp_path):
    row = {"prompt": "q", "chosen": "abcd", "rejected": "ab"}
    turned = {"prompt": "q", "chosen": "ab", "rejected": "abcd"}
    rows = [{**row, "margin": 1.5}, {**row, "margin": 1.0}, {**turned, "margin": 2}]
    path, out = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    argv = [sys.executable, str(TOOL), "--input", str(path), "--out", str(out)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert (summary["read"], summary["over_margin"], summary["kept"]) == (3, 2, 2)
    assert summary["after"] == {"chosen": 3.0, "rejected": 3.0, "chosen_longer": 0.5}
    assert [json.loads(line) for line in out.read_text().splitlines()] == [rows[0], rows[2]]
    write(path, row)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "in.jsonl:1: 'margin': got None; must be a number" in done.stderr
