"""A problem made by hand, on which the search beats sampling: a lock of four digits that are all drawn alike."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from r1mega.rollout.tree_search import SearchSettings, search
from r1mega.types import Completion, FinishReason, Request, SamplingParams

LOCK = "3141"
SETTINGS = SearchSettings(step_end=";", answer_end=".", simulations=60, width=12, max_step_tokens=2, seed=1)


def decode(token_ids: Sequence[int]) -> str:
    return bytes(token_ids).decode()


class ScriptedEngine:
    """Writes digits, each with a `;`, the fourth with a `.`; all digits are as likely."""

    weight_version = 0

    def __init__(self) -> None:
        self.num_samples = 0
        self.asked: list[str] = []

    def generate(self, requests: Sequence[Request], params: SamplingParams, on_finished=None) -> list[Completion]:
        found = []
        for request in requests:
            text = decode(request.token_ids)
            self.asked.append(text)
            draw = random.Random(params.seed)
            end = "." if text.count(";") == len(LOCK) - 1 else ";"
            for index in range(request.num_samples):
                ids = list(f"{draw.randrange(10)}{end}".encode())
                found.append(Completion(request.key, index, ids, [0.0, 0.0], FinishReason.stop, 0))
                self.num_samples += 1
        return found


def value(steps: Sequence[str]) -> float:
    """The share of the lock that is right from the left on."""
    digits = "".join(step[0] for step in steps)
    right = next((i for i, (a, b) in enumerate(zip(digits, LOCK, strict=False)) if a != b), len(digits))
    return right / len(LOCK)


def sampled(engine: ScriptedEngine, budget: int, seed: int) -> float:
    """The best of as many whole responses as the budget of steps allows."""
    draw, best = random.Random(seed), 0.0
    for _ in range(budget // len(LOCK)):
        best = max(best, value([f"{draw.randrange(10)};" for _ in LOCK]))
    return best


def opened(width: int, simulations: int) -> tuple[int, int]:
    """Of ten seeds: how often the search opens the lock, and how often as many sampled steps do."""
    by_search = by_sampling = 0
    for seed in range(10):
        engine = ScriptedEngine()
        settings = SearchSettings(**{**vars(SETTINGS), "seed": seed, "width": width, "simulations": simulations})
        found = search(engine, list(b"?"), decode, value, settings)
        assert found.num_samples == engine.num_samples
        by_search += found.is_finished and found.text == "3;1;4;1."
        by_sampling += sampled(engine, found.num_samples, seed) == 1.0
    return by_search, by_sampling


def test_the_search_opens_the_lock_and_sampling_as_much_does_not() -> None:
    by_search, by_sampling = opened(width=40, simulations=12)
    assert by_search >= 9
    assert by_sampling <= 1  # 120 tries at one chance in 10,000 each


def test_too_low_a_cap_on_expansions_leaves_it_in_a_local_optimum() -> None:
    """What the paper says of the cap: a step that was not among those sampled at a node is never found."""
    assert opened(width=4, simulations=120)[0] <= 5


def test_a_value_that_misleads_is_what_the_search_follows() -> None:
    """What the paper says of it: the value model bounds what is found."""
    found = search(ScriptedEngine(), list(b"?"), decode, lambda steps: 1 - value(steps) - 0.01 * len(steps), SETTINGS)
    assert value(found.text.rstrip(".").split(";")) == 0.0


def test_a_node_is_expanded_once_and_never_wider_than_the_cap() -> None:
    engine = ScriptedEngine()
    found = search(engine, list(b"?"), decode, value, SETTINGS)
    assert len(engine.asked) == len(set(engine.asked)) == found.num_walks
    again = search(ScriptedEngine(), list(b"?"), decode, value, SETTINGS)
    assert again == found  # the seed decides it all


def test_a_tree_that_has_been_seen_whole_ends_the_search() -> None:
    settings = SearchSettings(**{**vars(SETTINGS), "max_steps": 1})
    found = search(ScriptedEngine(), list(b"?"), decode, value, settings)
    assert (found.num_walks, found.is_finished, found.num_samples) == (1, False, 12)


def test_settings_out_of_range() -> None:
    with pytest.raises(ValueError, match="width: got 0, must be at least 1"):
        SearchSettings(width=0)
    with pytest.raises(ValueError, match="must not be empty"):
        SearchSettings(step_end="")
