"""SGLang's HTTP interface as far as the client uses it, without a model, and with faults to order."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

GROUP_CALLS = (
    "/init_weights_update_group",
    "/update_weights_from_distributed",
    "/destroy_weights_update_group",
)


@dataclass
class FakeServer:
    """One server. `version` is what it serves; `is_up` False refuses connections."""

    version: str = "none"
    is_up: bool = True
    seconds: float = 0.0  # that a sequence takes
    running: int = 0
    most_running: int = 0
    flushes: int = 0
    starts: int = 1
    held: set[str] = field(default_factory=lambda: {"weights", "kv_cache"})
    calls: list[tuple[str, ...]] = field(default_factory=list)  # of releases and what takes back
    loads: list[tuple[str, str]] = field(default_factory=list)
    group_calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    served: Counter[tuple[int, ...]] = field(default_factory=Counter)


class FakeServers(httpx.AsyncBaseTransport):
    """Servers at http://0, http://1 ... A response to the prompt [a, ...] is the tokens [a, a + 1] of log-probs -a.

    `before` is asked before each sequence is answered, `after` when it is about to be: (server, prompt) -> None or an
    answer to give instead; they may raise what a connection raises.
    """

    def __init__(self, count: int, **options: Any) -> None:
        self.servers = [FakeServer(**options) for _ in range(count)]
        self.before: Callable[[FakeServer, list[int]], httpx.Response | None] = lambda server, prompt: None
        self.after: Callable[[FakeServer, list[int]], httpx.Response | None] = lambda server, prompt: None
        self.loaded: Callable[[FakeServer], None] = lambda server: None
        self.answer: Callable[[FakeServer, dict], dict] = lambda server, body: answer(body, server.version)

    @property
    def urls(self) -> list[str]:
        return [f"http://{i}" for i in range(len(self.servers))]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        server = self.servers[int(request.url.host)]
        if not server.is_up:
            raise httpx.ConnectError("refused")
        body = json.loads(request.content) if request.content else {}
        path = request.url.path
        if path == "/generate":
            return await self._generate(server, body)
        if path == "/health":
            return httpx.Response(200)
        if path == "/server_info":
            return httpx.Response(200, json={"random_seed": server.starts, "startup_time": {"tokenizer_e2e": 1.5}})
        if path in ("/release_memory_occupation", "/resume_memory_occupation"):
            self._change_memory(server, path.startswith("/release"), body["tags"])
            return httpx.Response(200)
        if path == "/model_info":
            return httpx.Response(200, json={"weight_version": server.version})
        if path == "/flush_cache":
            server.flushes += 1
            return httpx.Response(200, text="Cache flushed.")
        if path in GROUP_CALLS:
            server.group_calls.append((path, body))
            refused = path == "/destroy_weights_update_group" and body["group_name"] == "unknown"
            return httpx.Response(400 if refused else 200, json={"success": not refused, "message": "no such group"})
        assert path == "/update_weights_from_disk" and not body["flush_cache"], path
        server.version = body["weight_version"]
        server.loads.append((body["model_path"], server.version))
        self.loaded(server)
        return httpx.Response(200, json={"success": True, "message": ""})

    def _change_memory(self, server: FakeServer, gives_back: bool, tags: list[str]) -> None:
        """SGLang ends itself where a tag comes twice, or while it is busy."""
        server.calls.append(("release" if gives_back else "resume", *tags))
        assert not server.running and server.flushes, "not idle"
        before = len(server.held)
        server.held = server.held - set(tags) if gives_back else server.held | set(tags)
        assert abs(len(server.held) - before) == len(tags), f"{server.calls}"

    async def _generate(self, server: FakeServer, body: dict[str, Any]) -> httpx.Response:
        prompt = body["input_ids"]
        server.running += 1
        server.most_running = max(server.most_running, server.running)
        try:
            instead = self.before(server, prompt)
            await asyncio.sleep(server.seconds)
            instead = instead or self.after(server, prompt)
        finally:
            server.running -= 1
        if instead is not None:
            return instead
        if not server.is_up:
            raise httpx.ReadError("broken off")
        server.served[tuple(prompt)] += 1
        return httpx.Response(200, json=self.answer(server, body))


def answer(body: dict[str, Any], version: str, finish: str = "stop") -> dict[str, Any]:
    """What `/generate` returns for a request."""
    prompt = body["input_ids"]
    tokens = [prompt[0], prompt[0] + 1][: body["sampling_params"]["max_new_tokens"]]
    return {
        "output_ids": tokens,
        "meta_info": {
            "output_token_logprobs": [[-float(prompt[0]), token, None] for token in tokens],
            "input_token_logprobs": [[None, prompt[0], None]] + [[-float(t), t, None] for t in prompt[1:]],
            "finish_reason": {"type": finish},
            "weight_version": version,
        },
    }
