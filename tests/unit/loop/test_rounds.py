"""Groups on disk come back as they were, but for their texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from r1mega.loop import rounds
from r1mega.loop.rounds import RoundRecord, UpdateRecord
from r1mega.types import FinishReason, Prompt, Sample, SampleGroup, Score, Span


def sample(index: int, tokens: list[int], spans: tuple[Span, ...], finish: FinishReason, score: Score | None) -> Sample:
    logprobs = [-0.1 * token for token in tokens]
    version = spans[-1].weight_version
    return Sample("p", index, tokens, [1] * len(tokens), logprobs, finish, version, score=score, spans=spans)


GROUPS = [
    SampleGroup(Prompt("p", "question", "answer", (1, 2), "code"), [
        sample(0, [4, 5, 6], (Span(2, 0, 1), Span(4, 1, 3)), FinishReason.stop, Score(1.0, {"accuracy": 1.0}, "why")),
        sample(3, [7], (Span(4, 0, 1),), FinishReason.abort, None),
    ]),
    SampleGroup(Prompt("q", "question", "answer", domain="code", other_answers=("b",), options=("x", "y"),
                       tests=({"input": "1", "output": "2"}, {"function": "f", "arguments": [[1]], "output": None}),
                       language="zh"), []),
]  # fmt: skip


def test_a_record(tmp_path: Path) -> None:
    record = RoundRecord(3, 4, 0, "tp=1", GROUPS[:1], [UpdateRecord(5, 0.5, 1.0, "digest")])
    rounds.write(tmp_path, record)
    assert rounds.read(tmp_path, 3) == record


@pytest.mark.parametrize("groups", [GROUPS, GROUPS[1:], []])
def test_groups(tmp_path: Path, groups: list[SampleGroup]) -> None:
    rounds.write_groups(tmp_path / "file", groups, {"more": 1})
    found, header = rounds.read_groups(tmp_path / "file")
    assert found == groups and header["more"] == 1


def test_a_record_without_spans(tmp_path: Path) -> None:
    """All tokens are then of the version that the sample names."""
    rounds.write(tmp_path, RoundRecord(1, 4, 0, "tp=1", GROUPS[:1], []))
    path = rounds.path_of(tmp_path, 1)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["record"])
        tensors = {name: file.get_tensor(name) for name in ("lengths", "token_ids", "rollout_logprobs")}
    for facts in header["groups"][0]["samples"]:
        del facts["spans"]
    save_file(tensors, path, metadata={"record": json.dumps(header)})
    samples = rounds.read(tmp_path, 1).groups[0].samples
    assert [found.spans for found in samples] == [(Span(4, 0, 3),), (Span(4, 0, 1),)]


def test_a_record_that_cannot_be_read(tmp_path: Path) -> None:
    rounds.write(tmp_path, RoundRecord(1, 4, 0, "tp=1", GROUPS, []))
    rounds.path_of(tmp_path, 1).write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"round-000001.safetensors: cannot be read .*; choose another round"):
        rounds.read(tmp_path, 1)
