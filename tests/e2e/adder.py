"""A tiny model that knows some sums of two digits, and a run that is killed when it has drawn some samples from it."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import make_toy
from r1mega.data.order import EpochOrder
from r1mega.data.sft import iter_sft, tokenize_sft
from r1mega.data.toy_tokenizer import save_tokenizer

SUMS = [(a, b) for a in range(10) for b in range(10)]


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def response(a: int, b: int) -> str:
    return f"<think>{a}+{b}</think> <answer>{a + b}</answer>"


def train_adder(folder: Path, sums: Sequence[tuple[int, int]]) -> Path:
    """The checkpoint after a few updates of SFT: it knows what an answer looks like, and some of the sums."""
    make_toy.write_base_config(folder / "base_config", "qwen2")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base_config")
    rows = [{"prompt": f"{a}+{b}", "response": response(a, b)} for a, b in sums]
    examples = tokenize_sft(list(iter_sft(write_rows(folder / "sums.jsonl", rows))), tokenizer, "r1_zero", 64)
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "base_config"))
    optimizer = torch.optim.AdamW(made.parameters(), lr=5e-3, weight_decay=0.0)
    order = EpochOrder(len(examples), 0, True, "sums")
    for _ in range(60):
        batch = [examples[index] for index in order.next(32)]
        longest = max(len(example.token_ids) for example in batch)
        ids = torch.tensor([(*e.token_ids, *(0,) * (longest - len(e.token_ids))) for e in batch])
        mask = torch.tensor([(*e.loss_mask, *(0,) * (longest - len(e.loss_mask))) for e in batch])
        made(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    made.save_pretrained(folder / "hf")
    save_tokenizer(tokenizer, folder / "hf")
    return folder / "hf"


def kill_after_samples(command: Sequence[str], path: Path, count: int) -> int:
    """Start a run, SIGKILL all its processes when `path` has so many lines, and leave half a line there as a kill
    within a write does; returns the whole lines."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    limit = time.monotonic() + 500
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < limit and process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    process.wait(timeout=20)
    lines = path.read_bytes().count(b"\n")
    with path.open("ab") as file:
        file.write(b'{"problem": 3, "samp')
    return lines
