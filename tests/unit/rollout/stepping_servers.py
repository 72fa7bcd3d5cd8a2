"""Servers that generate token by token, so that they can be stopped, paused and given weights in between.

As SGLang 0.5.21 does: an abort is seen with the next token, before it is looked whether that token ends the sequence; a
retracted request goes on where it was; a flush that waits for an idle server waits for retracted ones as well.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent))
from fake_servers import FakeServer, FakeServers

PROMPT = 2  # tokens of a prompt: [its number, the length of its response]


def token(number: int, position: int) -> int:
    """Token `position` of the response to a prompt, whoever generates it."""
    return (31 * number + 7 * position) % 97


def logprob(version: int, position: int) -> float:
    """Its log-prob, which says under which weights it was generated."""
    return -(version + position / 1000)


@dataclass(eq=False)
class Running:
    """A request that a server works on."""

    aborted: bool = False
    num_tokens: int = 0
    events: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class SteppingServer(FakeServer):
    """`hangs`: it takes requests and never answers."""

    paused: bool = False
    hangs: bool = False
    aborts: int = 0
    pauses: int = 0
    active: list[Running] = field(default_factory=list)


class SteppingServers(FakeServers):
    """See FakeServers; `seconds` is what a token takes. The lengths of responses come with the prompts."""

    def __init__(self, count: int, **options: Any) -> None:
        super().__init__(0)
        self.servers: list[SteppingServer] = [SteppingServer(**options) for _ in range(count)]

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        server, path = self.servers[int(request.url.host)], request.url.path
        body = json.loads(request.content) if request.content else {}
        if not server.is_up:
            raise httpx.ConnectError("refused")
        if path == "/abort_request":
            server.aborts += 1
            for running in server.active:
                running.aborted = True
        elif path == "/pause_generation":
            assert body["mode"] == "retract"
            server.paused, server.pauses = True, server.pauses + 1
        elif path == "/continue_generation":
            server.paused = False
        elif path in ("/begin_weight_update", "/update_weights_from_tensor", "/end_weight_update"):
            return httpx.Response(200, json={"success": True, "message": ""})
        elif path == "/update_weight_version":
            self._renamed(server, body["new_version"])
        elif path == "/flush_cache" and server.active and not (server.paused and "timeout" not in request.url.params):
            return httpx.Response(400, text="Timed out waiting for idle state.")
        elif path == "/health" and server.paused:
            return httpx.Response(503)
        else:
            before = server.version
            answer = await super().handle_async_request(request)
            if path == "/update_weights_from_disk":
                server.version, after = before, server.version
                self._renamed(server, after)
            return answer
        return httpx.Response(200, json={"success": True})

    def _renamed(self, server: SteppingServer, version: str) -> None:
        for running in server.active:
            running.events.append((server.version, running.num_tokens))
        server.version = version

    async def _generate(self, server: SteppingServer, body: dict[str, Any]) -> httpx.Response:
        prompt, offset = body["input_ids"], len(body["input_ids"]) - PROMPT
        number, length = prompt[:PROMPT]
        assert prompt[PROMPT:] == [token(number, i) for i in range(offset)], "a continuation of other tokens"
        running, tokens, logprobs = Running(), [], []
        server.active.append(running)
        try:
            finish = None
            while finish is None:
                await asyncio.sleep(server.seconds)
                if not server.is_up:
                    raise httpx.ReadError("broken off")
                if server.paused or server.hangs:
                    continue
                position = offset + len(tokens)
                logprobs.append([logprob(int(server.version), position), token(number, position), None])
                tokens.append(token(number, position))
                running.num_tokens = len(tokens)
                finish = self._finish(running, position + 1 == length, body)
        finally:
            server.active.remove(running)
        server.served[tuple(prompt)] += 1
        meta = {"output_token_logprobs": logprobs, "finish_reason": {"type": finish}, "weight_version": server.version}
        meta["weight_versions"] = spans(running, server.version)
        return httpx.Response(200, json={"output_ids": tokens, "meta_info": meta})

    def _finish(self, running: Running, is_last: bool, body: dict[str, Any]) -> str | None:
        if running.aborted:
            return "abort"
        if is_last:
            return "stop"
        return "length" if running.num_tokens == body["sampling_params"]["max_new_tokens"] else None


def spans(running: Running, version: str) -> list[dict[str, Any]]:
    """As SGLang reports them."""
    found, start = [], 0
    for name, end in [*running.events, (version, running.num_tokens)]:
        if end > start:
            found.append({"version": name, "start": start, "end": end})
            start = end
    return found
