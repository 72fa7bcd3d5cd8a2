"""The real SGLang generates what transformers does, from weights read at its start and from weights read later."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from r1mega.models.expert_choices import ExpertChoices
from r1mega.models.hf_fields import read
from r1mega.rollout.client import answer_of
from r1mega.rollout.embedded import EmbeddedEngine
from r1mega.rollout.server import ServerOptions
from r1mega.weights.checksums import ExpectedChecksums, compare, reported_by_rank
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.engine_params import EngineBuild, engine_params

sys.path.insert(0, str(Path(__file__).parent))
from where import DEVICE, only_on_cpu

pytestmark = pytest.mark.timeout(600)  # more than a server's start may take

# Both compute in fp32 and sum in other orders: measured up to 3e-6. A wrong weight shows as 0.1 and more.
TOLERANCE = 1e-4
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TELLING = ServerOptions(routed_experts=True)
CASES: dict[str, dict[str, Any]] = {
    "deepseek_v3-plain_rope-tp2-ep2": {
        "family": "deepseek_v3",
        "rope_parameters": PLAIN_ROPE,
        "server": {"tp": 2, "ep": 2, "options": TELLING},
    },
}
EXTENDED = {
    "llama": {"family": "llama"},
    "deepseek_v3": {"family": "deepseek_v3", "server": {"options": TELLING}},  # with YaRN
    "qwen2": {"family": "qwen2"},
    # Data-parallel attention, whose ranks note their experts in one buffer, each in rows of its own.
    "deepseek_v3-plain_rope-tp2-attn_dp2": {
        "family": "deepseek_v3",
        "rope_parameters": PLAIN_ROPE,
        "server": {"tp": 2, "attn_dp": 2, "options": TELLING},
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

    def generate(self, temperature: float, **options: Any) -> list[dict[str, Any]]:
        params = {"temperature": temperature, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
        return self.server.post("/generate", input_ids=PROMPTS, sampling_params=params, return_logprob=True, **options)

    def load(self, directory: Path, version: str) -> None:
        answer = self.server.post("/update_weights_from_disk", model_path=str(directory), weight_version=version)
        assert answer["success"], answer


@pytest.fixture(scope="module", params=[*CASES, *(pytest.param(name, marks=pytest.mark.extended) for name in EXTENDED)])
def case(request: pytest.FixtureRequest, model_dir: Callable[..., Path], serve: Callable[..., Any]) -> Iterator[Case]:
    options = dict((CASES | EXTENDED)[request.param])
    flags = options.pop("server", {})
    start, later = (model_dir(**options, seed=seed) for seed in (0, 1))
    with serve(start, weight_version="first", **flags) as server:
        sizes = {axis: size for axis, size in flags.items() if axis != "options"}
        yield Case(server, start, later, EngineLayout(**sizes))


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


def chosen_by_transformers(directory: Path, tokens: list[int]) -> torch.Tensor:
    """[tokens - 1, MoE layers, top_k] experts of each token but the last."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    chosen: list[torch.Tensor] = []
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.register_forward_hook(lambda _module, _inputs, outputs: chosen.append(outputs[2]))
    with torch.no_grad():
        model(torch.tensor([tokens[:-1]]))
    return torch.stack(chosen, 1)


def test_with_nothing_to_do_it_leaves_the_cores_alone(case: Case) -> None:
    """Its ranks are forks of its first process, and sleep. Those of data-parallel attention are, and do, neither."""
    only_on_cpu("processes that use CUDA are no forks, and idle ones do not sleep")
    alone = case.layout.attn_dp == 1
    first = psutil.Process(case.server.process.pid)
    ranks = [one for one in first.children(recursive=True) if one.cmdline()[0].startswith("sglang::scheduler")]
    assert len(ranks) == case.layout.tp
    assert {place_of(one) == place_of(first) for one in ranks} == {alone}
    time.sleep(1)
    before, started = [one.cpu_times() for one in ranks], time.monotonic()
    time.sleep(4)
    after, seconds = [one.cpu_times() for one in ranks], time.monotonic() - started
    spent = sum(b.user + b.system - a.user - a.system for a, b in zip(before, after, strict=True))
    assert (spent < 0.25 * seconds) == alone  # measured 0.03 cores asleep, 1.6 of two awake


def place_of(process: psutil.Process) -> str:
    """Where the kernel has put its own page: chosen anew for every program, kept by forks."""
    lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
    return next(line.split()[0] for line in lines if line.endswith("[vdso]"))


def test_the_experts_told_are_those_of_transformers(case: Case, record_property: Callable[[str, object], None]) -> None:
    """Of every token, those included that the server had in its cache."""
    fields = read(case.start)
    if not fields.is_moe:
        pytest.skip("a model without experts")
    case.load(case.start, "first")
    case.generate(temperature=1)  # not asked for, and yet to be known of what stays in the cache
    answers = case.generate(temperature=1, return_routed_experts=True)
    assert max(answer["meta_info"]["cached_tokens"] for answer in answers) > 50
    total = differs = late = 0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        told = answer_of(answer, len(prompt), ExpertChoices.of(fields)).routed_experts.sort(-1).values
        own = chosen_by_transformers(case.start, [*prompt, *answer["output_ids"]]).sort(-1).values
        total += told.shape[0] * told.shape[1]
        differs += int((told != own).any(-1).sum())
        late += int((told[1:] != own[:-1]).any(-1).sum())
    record_property("experts chosen otherwise, of", f"{differs}, {total}")
    assert total > 800 and differs <= 0.005 * total  # where two score alike, rounding picks either
    assert late > 0.5 * total  # negative control: of the token before


def test_checksums_are_those_expected(case: Case, record_property: Callable[[str, object], None]) -> None:
    """Of every parameter on every rank; and other weights differ in all that is not padding alone."""
    agreed = 0
    reported, expected = {}, {}
    for directory in (case.start, case.later):
        case.load(directory, directory.name)
        reported[directory] = reported_by_rank(case.server.post("/weights_checker", action="checksum"))
    for rank in range(case.layout.num_ranks):
        params = engine_params(read(case.start), case.layout, rank, EngineBuild(device=DEVICE))
        for directory in (case.start, case.later):
            checksums = ExpectedChecksums(params, dtype=torch.float32, device=DEVICE)
            for name, tensor in load_file(directory / "model.safetensors").items():
                checksums.add(name, tensor)
            expected[directory] = checksums.result()
            assert list(map(str, compare(params, expected[directory], reported[directory][rank]))) == []
        stale = {mismatch.param for mismatch in compare(params, expected[case.later], reported[case.start][rank])}
        assert stale == {param.name for param in params if param.parts}
        agreed += len(params)
    record_property("parameters that agreed", agreed)
