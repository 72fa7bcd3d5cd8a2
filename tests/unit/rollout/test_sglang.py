from __future__ import annotations

import base64
import random
import sys
import tracemalloc
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from r1mega.models.expert_choices import ExpertChoices
from r1mega.rollout import server_pool
from r1mega.rollout.client import answer_of
from r1mega.rollout.server_pool import EnginesLost
from r1mega.rollout.sglang import SglangEngines
from r1mega.types import (
    Completion,
    EngineRefused,
    EngineUnavailable,
    FinishReason,
    GroupAddress,
    Request,
    SamplingParams,
)

sys.path.insert(0, str(Path(__file__).parent))
from fake_servers import FakeServer, FakeServers, answer

PARAMS = SamplingParams(max_tokens=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_pool, "POLL_SECONDS", 0.01)


def engines(fake: FakeServers, *, max_in_flight: int = 8, patience: float = 5.0, version: int | None = 3):
    made = SglangEngines(fake.urls, max_in_flight=max_in_flight, patience_seconds=patience, transport=fake)
    if version is not None:
        made.load_from_disk("/weights/3", version)
    return made


def requests(count: int, num_samples: int = 1) -> list[Request]:
    return [Request(key=100 + i, token_ids=(i, 7), num_samples=num_samples) for i in range(count)]


def expected(count: int, num_samples: int = 1) -> list[Completion]:
    return [
        Completion(100 + i, index, [i, i + 1], [-float(i)] * 2, FinishReason.stop, 3)
        for i in range(count)
        for index in range(num_samples)
    ]


def test_a_seed_of_a_request_is_sent_and_one_of_the_call_is_not() -> None:
    fake = FakeServers(1)
    seeds = []

    def told(server: FakeServer, body: dict) -> dict:
        seeds.append(body["sampling_params"].get("sampling_seed"))
        return answer(body, server.version)

    fake.answer = told
    found = engines(fake)
    found.generate([Request(0, (1, 7), seed=5), Request(1, (2, 7), num_samples=2, seed=5), Request(2, (3, 7))], PARAMS)
    assert len(seeds) == 4 and seeds.count(None) == 1
    assert len(set(seeds)) == 3  # two samples of a request differ, and so do not two requests of one seed
    seeds.clear()
    found.generate(requests(2), SamplingParams(max_tokens=2, seed=5))
    assert seeds == [None, None]  # every sample of a prompt would else be the same


def test_servers_that_loaded_the_weights_as_they_started_load_nothing_more() -> None:
    fake = FakeServers(2, version="0")
    found = engines(fake, version=None)
    found.started_from_disk("/weights/0", 0)
    assert [c.weight_version for c in found.generate(requests(3), PARAMS)] == [0, 0, 0]
    assert not any(server.loads for server in fake.servers)
    fake.servers[0].version = "none"  # started again without them: it is given them
    fake.servers[1].is_up = False
    assert len(found.generate(requests(2), PARAMS)) == 2
    assert fake.servers[0].loads == [("/weights/0", "0")]


def test_every_sequence_comes_back_once_in_order() -> None:
    fake = FakeServers(3)
    seen: list[Completion] = []
    assert engines(fake).generate(requests(20, 4), PARAMS, seen.append) == expected(20, 4)
    assert sorted(seen, key=lambda c: (c.key, c.index)) == expected(20, 4)
    assert all(server.loads == [("/weights/3", "3")] and server.flushes == 1 for server in fake.servers)


def test_nothing_asked_for() -> None:
    assert engines(FakeServers(1)).generate([], PARAMS) == []


def test_requests_are_spread_and_bounded() -> None:
    fake = FakeServers(2, seconds=0.01)
    fake.servers[1].seconds = 0.1
    engines(fake, max_in_flight=5).generate(requests(60), PARAMS)
    assert sum(server.most_running for server in fake.servers) <= 2 * 10
    fast, slow = (sum(server.served.values()) for server in fake.servers)
    assert fast > 1.5 * slow > 0  # the one that holds fewer gets the next


def test_log_probs_of_given_sequences() -> None:
    assert engines(FakeServers(2)).logprobs([[5, 6, 7], [8], [9, 4]]) == [[-6.0, -7.0], [], [-4.0]]


def test_broken_connections_lose_and_double_nothing() -> None:
    fake = FakeServers(2)
    chance = random.Random(0)

    def broken(server: FakeServer, prompt: list[int]) -> httpx.Response | None:
        if chance.random() < 0.05:
            raise httpx.ReadError("broken off")
        return httpx.Response(503) if chance.random() < 0.02 else None

    fake.before = fake.after = broken
    seen: list[Completion] = []
    assert engines(fake).generate(requests(300), PARAMS, seen.append) == expected(300)
    assert len(seen) == 300


def test_a_server_that_ends_comes_back_with_the_weights_that_are_due() -> None:
    """Killed while it holds requests; the other server takes them; started again, it serves other weights at first."""
    fake = FakeServers(2, seconds=0.002)
    victim, other = fake.servers

    def kill(server: FakeServer, prompt: list[int]) -> None:
        if prompt[0] >= 30 and server is other and victim.version == "3" and len(victim.loads) == 1:
            victim.is_up, victim.version = False, "none"
        if prompt[0] >= 90:
            victim.is_up = True

    fake.before = kill
    made = engines(fake, max_in_flight=2)
    assert made.generate(requests(400), PARAMS) == expected(400)
    assert victim.loads == [("/weights/3", "3")] * 2
    assert sum(victim.served.values()) + sum(other.served.values()) == 400


class Handed(FakeServers):
    """Servers that are handed weights."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path in ("/end_weight_update", "/update_weight_version"):
            self.servers[int(request.url.host)].version = "3"
            return httpx.Response(200, json={"success": True, "message": ""})
        return await super().handle_async_request(request)


def test_a_server_waits_for_a_copy_that_is_being_written(tmp_path: Path) -> None:
    """Started again after weights were handed over, it takes them from the disk once they stand there."""
    fake, directory = Handed(2), tmp_path / "3"
    options = {"max_in_flight": 2, "patience_seconds": 5.0, "transport": fake}
    made = SglangEngines(fake.urls, directory_of=lambda version: tmp_path / str(version), **options)
    made.end_update(3)
    stale, other = fake.servers
    stale.version = "2"

    def write(server: FakeServer, prompt: list[int]) -> None:
        assert server is other or stale.version == "2" or directory.is_dir()
        if prompt[0] == 100:
            assert stale.loads == []
            directory.mkdir()

    fake.before = write
    assert made.generate(requests(1000), PARAMS) == expected(1000)
    assert stale.loads == [(str(directory), "3")] and other.loads == []


def test_stale_weights_are_noticed_and_replaced() -> None:
    fake = FakeServers(1)
    made = engines(fake)
    fake.servers[0].version = "2"
    assert made.generate(requests(5), PARAMS) == expected(5)
    assert fake.servers[0].loads == [("/weights/3", "3")] * 2


def test_a_sequence_that_was_aborted_is_asked_for_again() -> None:
    fake = FakeServers(1)
    aborted: list[int] = []

    def abort(server: FakeServer, prompt: list[int]) -> httpx.Response | None:
        if prompt[0] in aborted:
            return None
        aborted.append(prompt[0])
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1}}
        return httpx.Response(200, json=answer(body, "3", finish="abort"))

    fake.before = abort
    assert engines(fake).generate(requests(3), PARAMS) == expected(3)


def test_a_server_that_never_answers() -> None:
    fake = FakeServers(2)
    made = engines(fake, patience=0.1)
    for server in fake.servers:
        server.is_up = False
    with pytest.raises(EnginesLost, match=r"answered for 0\.1 s \(run\.timeout_minutes\): http://0/generate: Conn"):
        made.generate(requests(3), PARAMS)
    with pytest.raises(EnginesLost, match="http://0: does not serve weights 4: no answer"):
        made.load_from_disk("/weights/4", 4)
    with pytest.raises(EnginesLost, match=r"http://0: no answer within 0\.1 s \(run\.timeout_minutes\)"):
        made.wait_until_ready()


def test_a_sequence_that_breaks_every_server() -> None:
    fake = FakeServers(2)

    def poison(server: FakeServer, prompt: list[int]) -> httpx.Response | None:
        return httpx.Response(500, text="index out of range") if prompt[0] == 4 else None

    fake.before = poison
    with pytest.raises(EnginesLost, match=r"asked for 10 times in vain, last: .*500 index out of range"):
        engines(fake).generate(requests(9), PARAMS)


def test_a_request_that_is_refused_is_not_asked_again() -> None:
    fake = FakeServers(1)
    refused: list[int] = []

    def refuse(server: FakeServer, prompt: list[int]) -> httpx.Response | None:
        refused.append(prompt[0])
        return httpx.Response(400, text="too long")

    fake.before = refuse
    with pytest.raises(EngineRefused, match="http://0/generate: 400 too long"):
        engines(fake).generate(requests(1), PARAMS)
    assert refused == [0]


def test_an_error_in_what_is_done_with_a_result_is_not_swallowed() -> None:
    def fail(completion: Completion) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        engines(FakeServers(2)).generate(requests(30), PARAMS, fail)


@pytest.mark.parametrize("change", [{"output_ids": [1]}, {"output_ids": [0, 2]}, {"output_ids": [0, 1, 2]}])
def test_an_answer_that_contradicts_itself(change: dict) -> None:
    found = answer({"input_ids": [0], "sampling_params": {"max_new_tokens": 2}}, "3")
    assert answer_of(found, 1).token_ids == [0, 1]
    with pytest.raises(EngineUnavailable, match="log-probs"):
        answer_of(found | change, 1)


# Three layers, the first of them dense; 2 of 8 experts. As SGLang says it: zeros where there are no experts.
CHOICES = ExpertChoices(num_layers=3, first_moe_layer=1, num_experts=8, top_k=2)


def told(*tokens: list[list[int]]) -> str:
    """What a server says of tokens with these experts in its MoE layers."""
    return base64.b64encode(np.array([[[0, 0], *layers] for layers in tokens], dtype=np.int32).tobytes()).decode()


def test_the_experts_of_an_answer() -> None:
    found = answer({"input_ids": [5], "sampling_params": {"max_new_tokens": 2}}, "3")
    found["meta_info"]["routed_experts"] = told([[1, 7], [0, 2]], [[3, 4], [6, 5]])
    experts = answer_of(found, 1, CHOICES).routed_experts
    assert experts.dtype == torch.uint8
    assert experts.tolist() == [[[1, 7], [0, 2]], [[3, 4], [6, 5]]]
    assert answer_of(found, 1).routed_experts is None  # not asked for


@pytest.mark.parametrize(
    ("text", "prompt", "message"),
    [
        (told([[1, 7], [0, 2]]), 1, r"24 bytes, not those of int32 \[2, 3, 2\]"),
        (told([[1, 7], [0, 2]], [[3, 4], [6, 5]]), 2, r"48 bytes, not those of int32 \[3, 3, 2\]"),
        (told([[1, 7], [0, 2]], [[3, 8], [6, 5]]), 1, "experts 0 to 8, the model has 8"),
        (told([[1, 7], [0, 2]], [[3, 4], [-1, 5]]), 1, "experts -1 to 7, the model has 8"),
        (told([[1, 7], [0, 2]], [[3, 4], [0, 0]]), 1, r"token 1, layer 2: \[0, 0\] has one twice"),
        ("A", 1, "not base64"),
        ("?", 1, "0 bytes"),
    ],
)
def test_experts_that_cannot_be(text: str, prompt: int, message: str) -> None:
    found = answer({"input_ids": [5], "sampling_params": {"max_new_tokens": 2}}, "3")
    found["meta_info"]["routed_experts"] = text
    with pytest.raises(EngineUnavailable, match=message):
        answer_of(found, prompt, CHOICES)


def test_a_server_that_does_not_tell_the_experts_is_refused() -> None:
    found = answer({"input_ids": [5], "sampling_params": {"max_new_tokens": 2}}, "3")
    with pytest.raises(EngineRefused, match="--enable-return-routed-experts"):
        answer_of(found, 1, CHOICES)
    ended = answer({"input_ids": [5], "sampling_params": {"max_new_tokens": 2}}, "3", finish="abort")
    assert answer_of(ended, 1, CHOICES).routed_experts is None


def test_experts_come_with_completions_where_they_are_asked_for() -> None:
    fake = FakeServers(1)
    asked: list[bool] = []

    def tell(server: FakeServer, body: dict) -> dict:
        asked.append(body["return_routed_experts"])
        found = answer(body, server.version)
        if asked[-1]:
            found["meta_info"]["routed_experts"] = told(*[[[1, 7], [0, 2]]] * 3)
        return found

    fake.answer = tell
    made = SglangEngines(fake.urls, max_in_flight=4, patience_seconds=5.0, choices=CHOICES, transport=fake)
    made.load_from_disk("/weights/3", 3)
    (plain,) = made.generate(requests(1), PARAMS)
    (with_experts,) = made.generate(requests(1), SamplingParams(max_tokens=2, routed_experts=True))
    assert asked == [False, True]
    assert plain.routed_experts is None and with_experts.routed_experts.shape == (3, 2, 2)


def test_memory_does_not_grow_with_the_number_of_requests_waiting() -> None:
    """What is held for requests not yet sent: nothing but their place in the list."""

    def peak(count: int) -> int:
        fake = FakeServers(1)
        made, asked = engines(fake), requests(1, count)
        tracemalloc.start()
        seen = made.generate(asked, PARAMS)
        assert len(seen) == count
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    few, many = peak(200), peak(2000)
    assert many - few < 1800 * 1500  # a completion is about 600 bytes, a task with its request many thousand


def test_servers_in_a_process_group(capsys) -> None:
    """Each from its own first rank on; a group that one is not in hinders nobody from leaving."""
    fake = FakeServers(2)
    made = engines(fake, version=None)
    made.join_group(GroupAddress("g", "10.0.0.1", 4000, 5, "gloo"), [1, 3])
    made.update_from_group("g", [("a", "bfloat16", (2, 3)), ("b", "float32", (4,))])
    made.leave_groups(["unknown", "g"])
    for server, first in zip(fake.servers, (1, 3), strict=True):
        (_, join), (_, update), *left = server.group_calls
        assert join == {
            "master_address": "10.0.0.1", "master_port": 4000, "rank_offset": first, "world_size": 5,
            "group_name": "g", "backend": "gloo",
        }  # fmt: skip
        assert update["names"] == ["a", "b"] and update["shapes"] == [[2, 3], [4]] and not update["flush_cache"]
        assert "load_format" not in update and update["group_name"] == "g"
        assert [body["group_name"] for _, body in left] == ["unknown", "g"]
    assert made.weight_versions() == ["none", "none"]
    fake.servers[1].is_up = False
    with pytest.raises(EngineUnavailable):
        made.update_from_group("g", [("a", "bfloat16", (2, 3))])
    assert capsys.readouterr().err == ""
    made.leave_groups(["g", "h"])
    assert capsys.readouterr().err.count("did not leave its groups: http://1") == 1
    assert [body["group_name"] for _, body in fake.servers[0].group_calls[-2:]] == ["g", "h"]
