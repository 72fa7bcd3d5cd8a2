"""The real SGLang generates what transformers does, from weights read at its start and from weights read later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from r1mega.models.hf_fields import read
from r1mega.rollout.embedded import EmbeddedEngine
from r1mega.weights.checksums import ExpectedChecksums, compare, reported_by_rank
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.engine_params import EngineBuild, engine_params

pytestmark = pytest.mark.timeout(600)  # more than a server's start may take

# Both compute in fp32 and sum in other orders: measured up to 3e-6. A wrong weight shows as 0.1 and more.
TOLERANCE = 1e-4
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2"},
    "llama": {"family": "llama"},
    "deepseek_v3": {"family": "deepseek_v3"},
    "deepseek_v3-plain_rope-tp2-ep2": {
        "family": "deepseek_v3",
        "rope_parameters": PLAIN_ROPE,
        "server": {"tp": 2, "ep": 2},
    },
}
# Of several lengths, two of them with a common beginning, which the engine keeps from one for the other.
PROMPTS = [
    [256, *range(30, 42)],
    [256, *range(30, 60)],
    [256, 7],
    [256, *(17 * i % 250 for i in range(90))],
]
NUM_TOKENS = 40


class Case:
    """A server, the checkpoint that it started from, and another of the same shape."""

    def __init__(self, server: Any, start: Path, later: Path, layout: EngineLayout) -> None:
        self.server, self.start, self.later, self.layout = server, start, later, layout

    def generate(self, temperature: float) -> list[dict[str, Any]]:
        params = {"temperature": temperature, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
        return self.server.post("/generate", input_ids=PROMPTS, sampling_params=params, return_logprob=True)

    def load(self, directory: Path, version: str) -> None:
        answer = self.server.post("/update_weights_from_disk", model_path=str(directory), weight_version=version)
        assert answer["success"], answer


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, model_dir: Callable[..., Path], serve: Callable[..., Any]) -> Iterator[Case]:
    options = dict(CASES[request.param])
    flags = options.pop("server", {})
    start, later = (model_dir(**options, seed=seed) for seed in (0, 1))
    with serve(start, weight_version="first", **flags) as server:
        yield Case(server, start, later, EngineLayout(**flags))


def greedy(directory: Path) -> list[list[int]]:
    """What transformers itself generates."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    tokens = []
    for prompt in PROMPTS:
        output = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=NUM_TOKENS)
        tokens.append(output[0, len(prompt) :].tolist())
    return tokens


def largest_difference(directory: Path, answers: list[dict[str, Any]]) -> float:
    """Between the log-probs that the server gave with its samples and those of a forward over them."""
    engine = EmbeddedEngine(directory)
    engine.load(load_file(directory / "model.safetensors").items(), 0)
    expected = engine.logprobs(
        [[*prompt, *answer["output_ids"]] for prompt, answer in zip(PROMPTS, answers, strict=True)]
    )
    largest = 0.0
    for prompt, answer, values in zip(PROMPTS, answers, expected, strict=True):
        given = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
        assert len(given) == NUM_TOKENS
        for value, other in zip(given, values[len(prompt) - 1 :], strict=True):
            largest = max(largest, abs(value - other))
    return largest


def check(case: Case, directory: Path, version: str, record: Callable[[str, object], None]) -> None:
    answers = case.generate(temperature=0)
    assert [answer["output_ids"] for answer in answers] == greedy(directory)
    samples = case.generate(temperature=1)
    assert {answer["meta_info"]["weight_version"] for answer in answers + samples} == {version}
    difference = largest_difference(directory, samples)
    record("largest difference of log-probs", difference)
    assert difference < TOLERANCE


def test_weights_read_at_the_start(case: Case, record_property: Callable[[str, object], None]) -> None:
    check(case, case.start, "first", record_property)


def test_weights_read_later(case: Case, record_property: Callable[[str, object], None]) -> None:
    case.load(case.later, "second")
    check(case, case.later, "second", record_property)


def test_the_comparison_sees_other_weights(case: Case) -> None:
    case.load(case.later, "other")
    assert largest_difference(case.start, case.generate(temperature=1)) > 0.1


def test_checksums_are_those_expected(case: Case, record_property: Callable[[str, object], None]) -> None:
    """Of every parameter on every rank; and other weights differ in all that is not padding alone."""
    agreed = 0
    reported, expected = {}, {}
    for directory in (case.start, case.later):
        case.load(directory, directory.name)
        reported[directory] = reported_by_rank(case.server.post("/weights_checker", action="checksum"))
    for rank in range(case.layout.num_ranks):
        params = engine_params(read(case.start), case.layout, rank, EngineBuild(device="cpu"))
        for directory in (case.start, case.later):
            checksums = ExpectedChecksums(params, dtype=torch.float32, device="cpu")
            for name, tensor in load_file(directory / "model.safetensors").items():
                checksums.add(name, tensor)
            expected[directory] = checksums.result()
            assert list(map(str, compare(params, expected[directory], reported[directory][rank]))) == []
        stale = {mismatch.param for mismatch in compare(params, expected[case.later], reported[case.start][rank])}
        assert stale == {param.name for param in params if param.parts}
        agreed += len(params)
    record_property("parameters that agreed", agreed)
