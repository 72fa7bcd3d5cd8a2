"""Monte Carlo tree search over the steps of a response, guided by a value model: an inference tool.

DeepSeek-R1 tried it and gave it up (arXiv 2501.12948v1, section 4.2): the space of texts is far larger than a board
game's, a cap on the expansions of a node leads to local optima, and the value model bounds what can be found. With a
good one it helps at inference time. Steps are delimited by a tag, as there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from r1mega.parallel.seed import derive
from r1mega.types import Engine, FinishReason, Request, SamplingParams

Value = Callable[[Sequence[str]], float]
"""How promising the steps so far are, from 0 to 1."""


@dataclass(frozen=True)
class SearchSettings:
    """How a search goes.

    Args:
        step_end: the tag that ends a step.
        answer_end: what ends the whole response, besides the model's own end.
        simulations: walks from the root to a leaf.
        width: most children of a node: what is sampled there once, and never again.
        exploration: weight of the prior against the mean value (c of PUCT).
        max_steps: steps of a response at most.
        max_step_tokens: tokens of a step at most.
    """

    step_end: str = "</step>"
    answer_end: str = "</answer>"
    simulations: int = 32
    width: int = 4
    exploration: float = 1.0
    max_steps: int = 32
    max_step_tokens: int = 512
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("simulations", "width", "max_steps", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, must be at least 1")
        if not self.step_end or not self.answer_end:
            raise ValueError("step_end and answer_end must not be empty")


@dataclass
class Node:
    """A response so far. `prior` is the share of samples, taken at its parent, that came out as its last step."""

    steps: tuple[str, ...]
    token_ids: tuple[int, ...]
    prior: float
    is_end: bool
    value: float = 0.0
    visits: int = 0
    total: float = 0.0
    children: list[Node] = field(default_factory=list)
    is_closed: bool = False
    """Whether all there is below it has been seen."""

    @property
    def mean(self) -> float:
        """Mean value of the walks through it; its own value before the first."""
        return self.total / self.visits if self.visits else self.value


@dataclass(frozen=True)
class Found:
    """What a search came to: the best whole response, or the best unfinished one where none was finished."""

    text: str
    value: float
    is_finished: bool
    num_samples: int
    """Steps that the engine generated."""
    num_walks: int


def search(
    engine: Engine,
    prompt_ids: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    value: Value,
    settings: SearchSettings,
) -> Found:
    """Look for the response of the highest value.

    Each walk goes down by PUCT (Silver et al. 2017, AlphaGo Zero): mean value + c x prior x sqrt(visits of the parent)
    / (1 + own visits). At a leaf `width` steps are sampled, alike ones being one child, and each is valued; the best of
    them is what goes back up.
    """
    root = Node((), (), 1.0, False)
    best, num_samples, walks = root, 0, 0
    for walk in range(settings.simulations):
        if root.is_closed:
            break
        path = [root]
        while path[-1].children:
            path.append(_select(path[-1], settings.exploration))
        leaf = path[-1]
        _expand(leaf, engine, prompt_ids, decode, value, settings, seed=derive(settings.seed, "walk", walk))
        num_samples += settings.width
        walks += 1
        reached = max((child.value for child in leaf.children), default=leaf.value)
        for node in reversed(path):
            node.visits += 1
            node.total += reached
            node.is_closed = all(child.is_closed for child in node.children)
        best = max([best, *leaf.children], key=lambda node: (node.is_end, node.value))
    return Found("".join(best.steps), best.value, best.is_end, num_samples, walks)


def _select(node: Node, exploration: float) -> Node:
    scale = exploration * math.sqrt(node.visits)
    return max(
        (child for child in node.children if not child.is_closed),
        key=lambda child: child.mean + scale * child.prior / (1 + child.visits),
    )


def _expand(
    node: Node,
    engine: Engine,
    prompt_ids: Sequence[int],
    decode: Callable[[Sequence[int]], str],
    value: Value,
    settings: SearchSettings,
    *,
    seed: int,
) -> None:
    """Give a leaf its children."""
    params = SamplingParams(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_tokens=settings.max_step_tokens,
        stop=(settings.step_end, settings.answer_end),
        seed=seed,
    )
    request = Request(key=0, token_ids=(*prompt_ids, *node.token_ids), num_samples=settings.width)
    completions = engine.generate([request], params)
    texts = [decode(completion.token_ids) for completion in completions]
    counts = Counter(texts)
    for text, completion in {text: found for text, found in zip(texts, completions, strict=True)}.items():
        steps = (*node.steps, text)
        stopped_itself = completion.finish_reason is FinishReason.stop and not text.endswith(settings.step_end)
        is_end = text.endswith(settings.answer_end) or stopped_itself
        child = Node(steps, (*node.token_ids, *completion.token_ids), counts[text] / len(texts), is_end)
        child.value = value(steps)
        # A step that was cut off, and a response of the most steps, are not carried on.
        child.is_closed = is_end or completion.finish_reason is FinishReason.length or len(steps) >= settings.max_steps
        node.children.append(child)
