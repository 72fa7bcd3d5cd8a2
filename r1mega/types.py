"""Records that cross folders, and the seams between them as Protocols. Imports nothing but the standard library.

Counts of the two clocks of a run are never mixed: a *round* is one rollout, an *update* is one optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from r1mega.models.param_map import Slot


NamedTensors = Iterator[tuple[str, "torch.Tensor"]]


# What a question is about decides which rewards judge its answers. `choice` and `stem` have options to choose from;
# `logic` has them or not; those without a known answer are `general`, or belong to one of two reward models.
WITHOUT_ANSWER = ("general", "helpful", "harmless")
DOMAINS = ("math", "code", "stem", "choice", "logic", *WITHOUT_ANSWER)
# General questions belong each to one reward model, by its domain (DeepSeek-R1, section 3.1): model -> domain.
DOMAIN_OF = {"helpful": "helpful", "safety": "harmless"}


class FinishReason(StrEnum):
    """Why an engine stopped a sequence."""

    stop = "stop"  # an end-of-sequence token, a stop token or a stop string
    length = "length"  # max_tokens reached: the sample is cut off
    abort = "abort"  # the engine was told to stop


@dataclass(frozen=True)
class Prompt:
    """One question, tokenized once with the run's template.

    `question` and `answer` are the raw text of the data file; `token_ids` is what the engine is given. `other_answers`
    are as right as `answer`; `options` are what it is chosen from; `tests` judge a program (r1mega.reward.code);
    `language` is the one to think in, where it is not that of the question.
    """

    id: str
    question: str
    answer: str
    token_ids: tuple[int, ...] = ()
    domain: str = "math"
    other_answers: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    tests: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    language: str | None = None


@dataclass(frozen=True)
class Score:
    """What a reward says of one text. `value` is the sum of weighted `parts`; `error` marks a reward that failed."""

    value: float
    parts: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    error: str | None = None


def is_right(parts: Mapping[str, float]) -> bool | None:
    """Whether an answer of these parts counts as right: by the judge where it has spoken, by the accuracy rule
    elsewhere; None where neither has."""
    value = parts.get("judge", parts.get("accuracy"))
    return None if value is None else value >= 1.0


@dataclass(frozen=True)
class Span:
    """Tokens start .. end - 1 of a response, generated under one version of the weights."""

    weight_version: int
    start: int
    end: int


def _covering(spans: tuple[Span, ...], num_tokens: int, version: int) -> tuple[Span, ...]:
    """`spans`, which must cover so many tokens without gap or overlap; one of all tokens where none is given."""
    if not spans:
        return (Span(version, 0, num_tokens),) if num_tokens else ()
    ends = [0, *(span.end for span in spans)]
    starts = [*(span.start for span in spans), num_tokens]
    assert starts == ends and all(span.start < span.end for span in spans), f"spans {spans} of {num_tokens} tokens"
    assert spans[-1].weight_version == version, "the version of a sequence is that of its last token"
    return spans


@dataclass
class Sample:
    """One generated sequence.

    `token_ids` is the response only (the prompt's ids stand in the group's Prompt) and includes the stop token where
    one was generated. `loss_mask` and `rollout_logprobs` have one entry per response token; `rollout_logprobs` are
    log softmax(logits / temperature) of the engine at the sampled token. `routed_experts` [prompt + response - 1, MoE
    layers, top_k] are the experts that the engine sent each token to, the last one left out, which it never read; they
    stay on the rank that collected the sample, None elsewhere and where they were not asked for.

    `spans` say under which weights each token was generated; left out, all under `weight_version`, which is the
    version of the last token.
    """

    prompt_id: str
    index: int
    token_ids: list[int]
    loss_mask: list[int]
    rollout_logprobs: list[float]
    finish_reason: FinishReason
    weight_version: int
    text: str = ""
    score: Score | None = None
    spans: tuple[Span, ...] = ()
    routed_experts: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        self.spans = _covering(self.spans, len(self.token_ids), self.weight_version)

    @property
    def reward(self) -> float:
        """The reward of the sample. Raises ValueError while it has none."""
        if self.score is None:
            raise ValueError(f"sample {self.prompt_id}#{self.index} has not been scored")
        return self.score.value


@dataclass
class SampleGroup:
    """The samples of one prompt."""

    prompt: Prompt
    samples: list[Sample]


@dataclass(frozen=True)
class SamplingParams:
    """How an engine samples. `temperature` 0 is greedy; `stop` are strings, kept in the output where one ends it.

    With `routed_experts` each completion says which experts its tokens went to (SGLang only).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    routed_experts: bool = False


@dataclass(frozen=True)
class Request:
    """`num_samples` sequences wanted for one prompt. `key` comes back with each Completion.

    With a `seed` of its own, what a request draws depends on neither its place among others nor SamplingParams.seed.
    """

    key: int
    token_ids: tuple[int, ...]
    num_samples: int = 1
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """One sequence: the response's token ids and the log-prob of each (see Sample.rollout_logprobs).

    It is finished but where `finish_reason` is abort. `weight_version` and `spans` are those of Sample, and
    `routed_experts`, where SamplingParams asked for them.
    """

    key: int
    index: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    weight_version: int
    spans: tuple[Span, ...] = ()
    routed_experts: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", _covering(self.spans, len(self.token_ids), self.weight_version))


class Engine(Protocol):
    """What generates. Embedded (transformers) and SGLang engines stand behind it alike."""

    @property
    def weight_version(self) -> int:
        """The version of the weights last loaded; -1 before the first load."""

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_finished: Callable[[Completion], None] | None = None,
    ) -> list[Completion]:
        """All completions of all requests, ordered by (position of the request, index).

        `on_finished` is called with each completion as soon as it ends, so rewards can run beside generation.
        """

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], weight_version: int) -> None:
        """Replace the weights by Hugging Face named tensors.

        Raises ValueError on an unknown name, a wrong shape, or a parameter that was not delivered.
        """

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced log-probs at temperature 1: for each sequence, the log-prob of token t+1 given tokens 0..t."""


class EngineFault(Exception):
    """A server did not do what it was asked."""


class EngineUnavailable(EngineFault):
    """The server cannot be reached, broke off, or failed inside: ask again, here or elsewhere."""


class EngineRefused(EngineFault):
    """The server understood and said no: asking again does not help."""


TensorShape = tuple[str, str, Sequence[int]]  # name, dtype as torch calls it, shape


@dataclass(frozen=True)
class GroupAddress:
    """A process group that rank 0 waits in for others: where, what it is called, and how many ranks it has in all."""

    name: str
    host: str
    port: int
    size: int
    backend: str


class Servers(Protocol):
    """Engines in processes of their own, as who publishes to them sees them. All raise EngineFault."""

    @property
    def urls(self) -> Sequence[str]:
        """One of each server."""

    def load_from_disk(self, directory: str, version: int) -> None:
        """Make every server load a checkpoint directory."""

    def begin_update(self) -> None:
        """Wait until every server answers, and make it ready for weights in several calls."""

    def update_from_tensors(self, payloads: Sequence[Sequence[str]]) -> None:
        """Hand over tensors: payloads[server][rank]."""

    def weight_versions(self) -> list[str]:
        """What each server calls the weights that it serves."""

    def join_group(self, address: GroupAddress, first_ranks: Sequence[int]) -> None:
        """Make every server join a process group, from its own first rank on; returns when all are there."""

    def leave_groups(self, names: Sequence[str]) -> None:
        """Make every server leave groups, where it answers and is in them. Raises nothing."""

    def update_from_group(self, name: str, tensors: Sequence[TensorShape]) -> None:
        """Load tensors that rank 0 of the group broadcasts one by one; returns when they are loaded."""

    def end_update(self, version: int) -> None:
        """All weights have been handed over: serve them, under this version."""

    def checksums(self) -> list[dict[str, Any]]:
        """What each server says of the hashes of its parameters, as it says it."""


class TrainerWeights(Protocol):
    """The weights of one trainer rank, as who publishes them sees them."""

    def export_hf(self, *, wanted: bool = True) -> NamedTensors:
        """(name, tensor) of the whole model where they are `wanted`, nothing where not. Collective: every rank walks
        it, in one order."""

    def shards(self) -> Sequence[tuple[Slot, int, torch.Tensor]]:
        """(slot of the table, which shard of it, parameter) of all that this rank holds."""


class Reward(Protocol):
    """A pure function of a prompt and the response's text."""

    def __call__(self, prompt: Prompt, text: str) -> Score: ...


class Sink(Protocol):
    """Where metrics go. `step` is the update count; `metrics` maps slash/separated names to numbers."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...
