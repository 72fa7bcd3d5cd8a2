"""Rounds that take what is complete first: nothing is lost, doubled or of other weights than it says."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from r1mega.loop.rounds import read_groups, write_groups
from r1mega.rollout import producer as producing
from r1mega.rollout import server_pool
from r1mega.rollout.buffer import Buffer, Group
from r1mega.rollout.producer import Demand, Producer
from r1mega.rollout.server_pool import EnginesLost, ServerPool
from r1mega.rollout.sglang import SglangEngines
from r1mega.types import FinishReason, Prompt, Sample, SampleGroup, SamplingParams, Score

sys.path.insert(0, str(Path(__file__).parent))
from stepping_servers import SteppingServers, logprob, token

SECONDS = 0.001  # of a token
SHORT, LONG = 5, 400
PARAMS = SamplingParams(max_tokens=1000)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_pool, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(producing, "_ABORT_SECONDS", 0.01)


class Source:
    """Prompts of the lengths given, and then short ones."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths, self.taken = list(lengths), 0

    def next(self, count: int) -> list[Prompt]:
        numbers = range(self.taken, self.taken + count)
        self.taken += count
        return [prompt(n, self.lengths[n] if n < len(self.lengths) else SHORT) for n in numbers]

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}


def prompt(number: int, length: int) -> Prompt:
    return Prompt(str(number), "q", "a", (number, length))


def scored(_prompt: Prompt, text: str) -> Future[Score]:
    future: Future[Score] = Future()
    future.set_result(Score(float(len(text))))
    return future


def text_of(token_ids: Sequence[int]) -> str:
    return "".join(chr(256 + t) for t in token_ids)


class Stream:
    """A producer over fake servers, version 1 published."""

    def __init__(self, lengths: Sequence[int], demand: Demand, *, num_samples: int = 2, max_age: int = 1, **options):
        self.fake = SteppingServers(options.pop("servers", 2), seconds=SECONDS)
        patience = options.pop("patience", 5.0)
        self.engines = SglangEngines(
            self.fake.urls, max_in_flight=64, patience_seconds=patience, transport=self.fake, overlaps=demand.ahead > 0
        )
        self.source, self.buffer = Source(lengths), Buffer(num_samples, max_age)
        self.producer = Producer(
            self.engines, self.buffer, self.source, demand, text_of, options.pop("scorer", scored), **options
        )
        self.publish(1)

    def publish(self, version: int) -> None:
        self.version = version
        self.engines.load_from_disk(f"/weights/{version}", version)
        self.engines.go_on()

    def round(self, count: int, **options) -> tuple[list[SampleGroup], dict[str, float]]:
        groups, counts = self.producer.round(count, options.pop("params", PARAMS), self.version, **options)
        return [group.scored() for group in groups], counts


def check(groups: Sequence[SampleGroup], num_samples: int = 2) -> None:
    """Complete groups of sequences that say the truth of themselves."""
    for group in groups:
        assert [sample.index for sample in group.samples] == list(range(num_samples))
        for sample in group.samples:
            check_sample(group.prompt, sample)


def check_sample(asked: Prompt, sample: Sample) -> None:
    number, length = asked.token_ids
    assert sample.token_ids == [token(number, i) for i in range(length)]
    assert sample.finish_reason is FinishReason.stop
    versions = [span.weight_version for span in sample.spans for _ in range(span.start, span.end)]
    assert sample.rollout_logprobs == [logprob(version, i) for i, version in enumerate(versions)]
    assert versions == sorted(versions) and len(versions) == length and sample.weight_version == versions[-1]
    assert sample.score is not None and sample.score.value == length and sample.text == text_of(sample.token_ids)


def ids(groups: Sequence[SampleGroup | Group]) -> list[str]:
    return [group.prompt.id for group in groups]


def test_the_first_that_are_complete_are_used_and_the_rest_is_asked_again() -> None:
    stream = Stream([SHORT, LONG, SHORT, SHORT, LONG], Demand(wanted=5))
    groups, counts = stream.round(3)
    assert ids(groups) == ["0", "2", "3"]
    check(groups)
    assert counts == {
        "rollout/asked": 10, "rollout/used": 6, "rollout/dropped": 4, "rollout/carried": 0,
        "rollout/carried_finished": 0,
    }  # fmt: skip
    assert all(server.aborts and not server.active for server in stream.fake.servers)
    stream.publish(2)
    groups, counts = stream.round(5)
    assert ids(groups) == ["1", "4", "5", "6", "7"] and stream.source.taken == 8
    check(groups)
    assert {span.weight_version for group in groups for s in group.samples for span in s.spans} == {2}


def test_what_was_stopped_goes_on_under_the_next_weights() -> None:
    stream = Stream([SHORT, LONG, SHORT, SHORT, LONG], Demand(wanted=5, carries=True))
    groups, counts = stream.round(3)
    assert ids(groups) == ["0", "2", "3"] and counts["rollout/carried"] == 4 and counts["rollout/dropped"] == 0
    stream.publish(2)
    groups, counts = stream.round(5)
    assert ids(groups) == ["1", "4", "5", "6", "7"]
    check(groups)
    for group in groups[:2]:
        for sample in group.samples:
            (first, second) = sample.spans
            assert (first.weight_version, second.weight_version) == (1, 2) and first.end > 1
    assert counts["rollout/asked"] == 6 and counts["rollout/used"] == 10 and counts["rollout/carried"] == 0


def test_a_token_that_the_server_did_not_check_is_generated_again() -> None:
    """The abort comes with the token that ends the sequence: its end would not be recognised."""
    stream = Stream([], Demand(wanted=2, carries=True), num_samples=1)
    stream.source.lengths = [SHORT, LONG]
    stream.round(1)
    (group,) = stream.buffer.state()[0]
    (sample,) = group.samples
    assert sample.finish_reason is FinishReason.abort and 0 < len(sample.token_ids) < LONG
    # One fewer than the server gave.
    (served,) = [count for asked, count in stream.fake.servers[0].served.items() if asked == (1, LONG)] or [1]
    assert served == 1
    stream.publish(2)
    groups, _ = stream.round(2)
    check(groups, num_samples=1)


def test_what_is_too_old_is_given_up_and_asked_again() -> None:
    """Two rounds are not enough for it, and no more are allowed."""
    stream = Stream([SHORT, SHORT, 4000], Demand(wanted=3, carries=True), num_samples=1, max_age=1)
    params = SamplingParams(max_tokens=5000)
    assert ids(stream.round(2, params=params)[0]) == ["0", "1"]
    stream.publish(2)
    assert ids(stream.round(2, params=params)[0]) == ["3", "4"]
    stream.publish(3)
    groups, counts = stream.round(2, params=params)
    assert ids(groups) == ["5", "6"] and counts["rollout/dropped"] == 1
    pending, _ = stream.buffer.state()
    assert [group.prompt.id for group in pending] == ["2"]
    assert {span.weight_version for span in pending[0].samples[0].spans} == {3}


@pytest.mark.parametrize("how", ["killed", "hangs"])
def test_a_server_that_is_lost_while_all_is_stopped(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(producing, "STOP_SECONDS", 0.3)
    stream = Stream([SHORT] * 2 + [LONG] * 6, Demand(wanted=8, carries=True), num_samples=1)
    victim = stream.fake.servers[0]

    stop = stream.producer._stop

    async def lose_and_stop(pool: ServerPool) -> None:
        victim.is_up, victim.hangs = how != "killed", how == "hangs"
        stream.producer._stop = stop
        await stop(pool)

    stream.producer._stop = lose_and_stop
    groups, counts = stream.round(2)
    check(groups, num_samples=1)
    assert counts["rollout/carried"] == 6
    victim.is_up, victim.hangs = True, False
    stream.publish(2)
    groups, _ = stream.round(8)
    assert ids(groups) == [str(n) for n in range(2, 10)]
    check(groups, num_samples=1)


def test_rounds_run_on_while_weights_are_published() -> None:
    stream = Stream([SHORT] * 4 + [LONG] * 2, Demand(wanted=4, ahead=1), max_age=1)
    groups, _ = stream.round(4)
    assert ids(groups) == ["0", "1", "2", "3"]
    time.sleep(0.1)  # the trainer's turn
    assert all(server.active for server in stream.fake.servers)
    stream.publish(2)
    assert [(server.pauses, server.paused, server.aborts) for server in stream.fake.servers] == [(2, False, 0)] * 2
    groups, counts = stream.round(4)
    check(groups)
    assert ids(groups) == ["4", "5", "6", "7"] and counts["rollout/dropped"] == 0
    assert [span.weight_version for span in groups[0].samples[0].spans] == [1, 2]
    assert [span.weight_version for span in groups[2].samples[0].spans] == [1]  # complete before the publish
    stream.producer.close()


def test_weights_that_came_by_handles() -> None:
    stream = Stream([LONG] * 4, Demand(wanted=4, ahead=1), max_age=1)
    thread = threading.Thread(target=lambda: time.sleep(0.1) or update(stream.engines, 2))
    thread.start()
    groups, _ = stream.round(4)
    thread.join()
    check(groups)
    assert all([s.weight_version for s in sample.spans] == [1, 2] for group in groups for sample in group.samples)
    stream.producer.close()


def update(engines: SglangEngines, version: int) -> None:
    engines.begin_update()
    engines.update_from_tensors([["x"]] * len(engines.urls))
    engines.end_update(version)
    engines.go_on()


def test_stale_groups_are_broken_off_while_they_run() -> None:
    stream = Stream([SHORT, 4000, SHORT], Demand(wanted=2, ahead=1), num_samples=1, max_age=1)
    params = SamplingParams(max_tokens=5000)
    assert ids(stream.round(1, params=params)[0]) == ["0"]
    for version, expected in ((2, "2"), (3, "3")):
        stream.publish(version)
        groups, counts = stream.round(1, params=params)
        assert ids(groups) == [expected]
    assert counts["rollout/dropped"] == 1
    long = [server for server in stream.fake.servers for running in server.active if running.num_tokens > 1000]
    assert long == []
    stream.producer.close()


def test_every_sequence_is_accounted_for_over_many_rounds() -> None:
    lengths = [1 + (37 * n) % 60 for n in range(400)]
    for demand, max_age in ((Demand(9), 0), (Demand(9, carries=True), 1), (Demand(9, ahead=1), 1)):
        stream = Stream(lengths, demand, num_samples=3, max_age=max_age, servers=3)
        carried, used = 0.0, Counter()
        for version in range(2, 14):
            groups, counts = stream.round(6)
            check(groups, num_samples=3)
            assert carried + counts["rollout/asked"] == (
                counts["rollout/used"] + counts["rollout/dropped"] + counts["rollout/carried"]
            )
            carried = counts["rollout/carried"]
            used.update(ids(groups))
            for group in groups:
                oldest = min(span.weight_version for sample in group.samples for span in sample.spans)
                assert stream.version - oldest <= max_age
            stream.publish(version)
        assert set(used.values()) == {1} and used.total() == 12 * 6
        pending, _ = stream.buffer.state()
        assert sorted([*used, *ids(pending)], key=int) == [str(n) for n in range(stream.source.taken)]
        stream.producer.close()


def test_a_snapshot_is_gone_on_with(tmp_path: Path) -> None:
    stream = Stream([SHORT, LONG, SHORT, SHORT, LONG], Demand(wanted=5, carries=True))
    stream.round(3)
    cursor, pending = stream.producer.snapshot()
    write_groups(tmp_path / "pending.safetensors", pending, {})
    other = Stream(stream.source.lengths, Demand(wanted=5, carries=True))
    other.source.taken = cursor["taken"]
    other.producer.restore(read_groups(tmp_path / "pending.safetensors")[0])
    for each in (stream, other):
        each.publish(2)
    results = [each.round(5) for each in (stream, other)]
    assert results[0] == results[1]
    check(results[1][0])


def test_a_snapshot_while_all_runs(tmp_path: Path) -> None:
    """What runs is begun again; what is finished is kept, and nothing of the data is lost."""
    stream = Stream([SHORT, SHORT, SHORT, LONG], Demand(wanted=2, ahead=1), num_samples=1)
    assert ids(stream.round(2)[0]) == ["0", "1"]
    time.sleep(0.1)
    cursor, pending = stream.producer.snapshot()
    assert cursor == {"taken": 4}
    assert [(group.prompt.id, len(group.samples)) for group in pending] == [("2", 1), ("3", 0)]
    write_groups(tmp_path / "pending.safetensors", pending, {})
    other = Stream(stream.source.lengths, Demand(wanted=2, ahead=1), num_samples=1)
    other.source.taken = cursor["taken"]
    other.producer.restore(read_groups(tmp_path / "pending.safetensors")[0])
    groups, counts = other.round(2)
    assert ids(groups) == ["2", "3"]
    check(groups, num_samples=1)
    for each in (stream, other):
        each.producer.close()


def test_a_stop_string_across_a_seam() -> None:
    """Tokens 10 and 11 of the response make the stop string; the seam is between them."""
    stop = text_of([token(1, 10), token(1, 11)])
    stream = Stream([SHORT, LONG], Demand(wanted=2, carries=True), num_samples=1)
    params = SamplingParams(max_tokens=1000, stop=(stop,))
    real = stream.fake._finish

    def finish(running, is_last, body):
        # Held at token 12, the last of which is not checked, until all is stopped.
        if len(body["input_ids"]) == 2 and body["input_ids"][0] == 1 and running.num_tokens == 12:
            running.aborted = True
        return real(running, is_last, body)

    stream.fake._finish = finish
    groups, _ = stream.round(2, params=params)
    sample = groups[1].samples[0]
    assert sample.finish_reason is FinishReason.stop and sample.text.endswith(stop)
    assert sample.token_ids == [token(1, i) for i in range(12)]


def test_a_longest_response_counts_over_all_pieces() -> None:
    stream = Stream([SHORT, LONG], Demand(wanted=2, carries=True), num_samples=1)
    stream.round(1, params=SamplingParams(max_tokens=60))
    stream.publish(2)
    groups, _ = stream.round(2, params=SamplingParams(max_tokens=60))
    sample = groups[0].samples[0]
    assert sample.finish_reason is FinishReason.length and len(sample.token_ids) == 60


def test_a_sequence_that_servers_keep_breaking_off() -> None:
    stream = Stream([SHORT], Demand(wanted=1))
    stream.fake._finish = lambda *_: "abort"
    with pytest.raises(EnginesLost, match="broken off 10 times"):
        stream.round(1)


def test_what_fails_between_rounds_is_raised_by_the_next() -> None:
    def scorer(asked: Prompt, text: str) -> Future[Score]:
        if asked.id == "1":
            raise KeyError("mine")
        return scored(asked, text)

    stream = Stream([SHORT, 50], Demand(wanted=1, ahead=1), scorer=scorer)
    assert ids(stream.round(1)[0]) == ["0"]
    time.sleep(0.3)
    with pytest.raises(KeyError, match="mine"):
        stream.round(1)
    stream.producer.close()


@pytest.mark.parametrize("version", ["0", "none", "7"])
def test_an_answer_of_unknown_weights_is_not_taken(version: str) -> None:
    """Older than what all served when it was asked for, newer than what was published, or no version."""
    stream = Stream([SHORT] * 4, Demand(wanted=4, ahead=1), servers=1)
    real = stream.fake._generate

    async def other(server, body):
        answer = await real(server, body)
        if len(server.loads) > 1:
            return answer
        content = answer.json()
        content["meta_info"]["weight_versions"] = [{"version": version, "start": 0, "end": len(content["output_ids"])}]
        content["meta_info"]["weight_version"] = version
        return type(answer)(200, json=content)

    stream.fake._generate = other
    stream.fake.servers[0].version = version if version.isdecimal() else "0"
    groups, _ = stream.round(4)
    check(groups)
    assert stream.fake.servers[0].loads == [("/weights/1", "1")] * 2
    stream.producer.close()
