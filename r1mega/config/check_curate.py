"""Rules of rejection sampling: what is asked, what judges it, and what has no place in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from r1mega.config.choices import Init, Loop, ResponseForm
from r1mega.config.faults import Fault
from r1mega.config.schema import Config

CURATE_BOUNDS: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = (
    ("curate.samples", ((">=", 1),)),
    ("curate.num_examples", ((">=", 0),)),
    ("curate.trivial_words", ((">=", 0),)),
    ("curate.min_language", ((">=", 0), ("<=", 1))),
    ("curate.max_paragraph_words", ((">=", 0),)),
    ("curate.max_repetition", ((">=", 0), ("<=", 1))),
    ("curate.min_thinking_words", ((">=", 0),)),
    ("curate.per_prompt", ((">=", 0),)),
    ("curate.ngram", ((">=", 1),)),
)


def check_curate(config: Config, *, here: bool = True) -> Iterator[Fault]:
    """All that this file knows; with `here` false nothing is asked of this machine's files."""
    if config.stage.loop is not Loop.reject:
        return
    yield from _check_prompt(config, here)
    yield from _check_pattern(config)
    yield from _check_elsewhere(config)
    for path in config.curate.benchmarks if here else ():
        if not Path(path).is_file():
            yield Fault("curate.benchmarks", path, "must be JSONL files of problems", "correct the path")
    if config.curate.benchmarks and not config.curate.benchmark_keys:
        yield Fault("curate.benchmark_keys", "[]", "no text of the benchmarks would count", "name their columns")
    if config.curate.check_responses and not config.curate.benchmarks:
        constraint = "there is no benchmark to hold responses against"
        yield Fault("curate.check_responses", "true", constraint, "set curate.benchmarks, or take it back to false")


def _check_prompt(config: Config, here: bool) -> Iterator[Fault]:
    """The template asks the question, and has the examples that it shows."""
    curate = config.curate
    if "{question}" not in curate.prompt:
        constraint = "the question must be asked: it lacks {question}"
        yield Fault("curate.prompt", repr(curate.prompt[:80]), constraint, "put {question} where it belongs")
    shows = "{examples}" in curate.prompt
    if shows and curate.examples is None:
        constraint = "curate.prompt shows examples"
        yield Fault("curate.examples", "nothing", constraint, "set curate.examples=FILE.jsonl of {prompt, response}")
    if shows and not curate.num_examples:
        constraint = "curate.prompt shows examples"
        yield Fault("curate.num_examples", "0", constraint, "raise it, or take {examples} out of curate.prompt")
    if curate.examples is not None and not shows:
        constraint = "curate.prompt shows none: it lacks {examples}"
        yield Fault("curate.examples", curate.examples, constraint, "put {examples} into curate.prompt, or set it null")
    if here and curate.examples is not None and not Path(curate.examples).is_file():
        constraint = "must be a JSONL file of {prompt, response}"
        yield Fault("curate.examples", curate.examples, constraint, "correct the path")


def _check_pattern(config: Config) -> Iterator[Fault]:
    curate = config.curate
    tokens = list(curate.special_tokens)
    if not tokens:
        return
    if len(tokens) != 2 or not all(token.strip() for token in tokens):
        constraint = "must be two texts that are not blank, before the reasoning and before the summary"
        yield Fault("curate.special_tokens", str(tokens), constraint, "give both, or none")
    if curate.form is ResponseForm.any:
        constraint = "reasoning and summary are told apart by their form"
        yield Fault("curate.form", "any", constraint, "set curate.form=think or r1_zero, or curate.special_tokens=[]")


def _check_elsewhere(config: Config) -> Iterator[Fault]:
    """What other loops know and this one would pass over in silence is refused."""
    reward, rollout = config.reward, config.rollout
    if config.model.init is not Init.load:
        yield Fault("model.init", str(config.model.init), "samples are of a trained model", "use model=load")
    if config.data.eval is not None:
        constraint = "stage.loop=reject has no held-out evaluation"
        yield Fault("data.eval", config.data.eval, constraint, "set data.eval=null, or use r1mega evaluate")
    for name in ("helpful", "safety"):
        if getattr(reward, name):
            constraint = "reward models live on training processes, which rejection sampling has none of"
            yield Fault(f"reward.{name}", f"{getattr(reward, name):g}", constraint, f"set reward.{name}=0")
    if reward.length:
        constraint = "a response that is cut off is dropped, and no other is too long"
        yield Fault("reward.length", f"{reward.length:g}", constraint, "set reward.length=0")
    asked = {
        "router_replay": rollout.router_replay,
        "over_sampling": rollout.over_sampling != 1,
        "carry_partial": rollout.carry_partial,
        "max_staleness": rollout.max_staleness != 0,
        "probe": rollout.probe,
    }
    for name, is_on in asked.items():
        if is_on:
            value = str(getattr(rollout, name)).lower()
            constraint = "belongs to rounds that are trained on"
            yield Fault(f"rollout.{name}", value, constraint, f"take rollout.{name} back to its default")
