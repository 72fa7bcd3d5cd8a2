"""One SGLang server over HTTP: its public interface (SGLang 0.5.21, `srt/entrypoints/http_server.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from r1mega.types import EngineRefused, EngineUnavailable, FinishReason, SamplingParams

CONNECT_SECONDS = 10.0
HEALTH_SECONDS = 30.0  # SGLang itself gives up on its scheduler after 20


@dataclass(frozen=True)
class Answer:
    """One generated sequence; `weight_version` as the server names it."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    weight_version: str


class EngineClient:
    """Calls to the server at `url`. Every call has a limit of time; only generation may take as long as it takes.

    All raise EngineUnavailable and EngineRefused, whose messages name the server and the call.
    """

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.url = url
        self._http = http

    async def is_healthy(self) -> bool:
        """Whether the server answers and its scheduler is alive (it generates a token, where nothing else runs)."""
        try:
            answer = await self._http.get(f"{self.url}/health", timeout=HEALTH_SECONDS)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def weight_version(self) -> str:
        """The version of the weights it serves."""
        return str((await self._call("GET", "/model_info", timeout=HEALTH_SECONDS))["weight_version"])

    async def generate(self, token_ids: Sequence[int], params: SamplingParams, max_tokens: int) -> Answer:
        """One response to one prompt. How long it may take is for who watches the server to say, not for this call."""
        body = {
            "input_ids": list(token_ids),
            "sampling_params": sampling_params(params, max_tokens),
            "return_logprob": True,
        }
        return answer_of(await self._call("POST", "/generate", body, timeout=None))

    async def prompt_logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-prob at temperature 1 of each token after the first, given those before it."""
        body = {
            "input_ids": list(token_ids),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        found = await self._call("POST", "/generate", body, timeout=None)
        return [float(value) for value, *_ in found["meta_info"]["input_token_logprobs"][1:]]

    async def load_from_disk(self, path: str, version: str, timeout: float) -> None:
        """Replace the weights by those of a checkpoint directory that the server sees under the same path."""
        # A server that was started without weights would else load "dummy" ones again.
        body = {"model_path": path, "load_format": "auto", "weight_version": version, "flush_cache": False}
        await self._succeed("/update_weights_from_disk", body, timeout)
        await self._flush()

    async def begin_update(self, timeout: float) -> None:
        """Make ready for weights that come in several calls; what an update that broke off has begun is ended."""
        try:
            await self._succeed("/begin_weight_update", {}, timeout)
        except EngineRefused:
            await self._succeed("/end_weight_update", {}, timeout)
            await self._succeed("/begin_weight_update", {}, timeout)

    async def update_from_tensors(self, payloads: Sequence[str], timeout: float) -> None:
        """Load tensors whose handles are in `payloads`, one for each rank."""
        body = {"serialized_named_tensors": list(payloads), "flush_cache": False}
        await self._succeed("/update_weights_from_tensor", body, timeout)

    async def end_update(self, version: str, timeout: float) -> None:
        """Serve what was loaded since `begin_update`, under this version."""
        await self._succeed("/end_weight_update", {}, timeout)
        await self._flush()
        await self._succeed("/update_weight_version", {"new_version": version}, timeout)

    async def checksums(self, timeout: float) -> dict[str, Any]:
        """What the server says of the hashes of its parameters; see weights/checksums.py."""
        return await self._call("POST", "/weights_checker", {"action": "checksum"}, timeout=timeout)

    async def pause(self, mode: str) -> None:
        """Stop generating: `abort` ends what runs, `retract` puts it back into the queue, `in_place` freezes it."""
        await self._call("POST", "/pause_generation", {"mode": mode}, timeout=HEALTH_SECONDS)

    async def resume(self) -> None:
        """Go on generating after `pause`."""
        await self._call("POST", "/continue_generation", {}, timeout=HEALTH_SECONDS)

    async def release(self, tags: Sequence[str]) -> None:
        """Give back the memory of `weights`, `kv_cache` or `cuda_graph`; the server must be idle."""
        await self._call("POST", "/release_memory_occupation", {"tags": list(tags)}, timeout=300)

    async def reclaim(self, tags: Sequence[str]) -> None:
        """Take back what `release` gave; weights have to be loaded again."""
        await self._call("POST", "/resume_memory_occupation", {"tags": list(tags)}, timeout=300)

    async def _flush(self) -> None:
        """Forget what was computed with former weights.

        A call of its own, which waits until nothing runs: within an update SGLang 0.5.21 takes a flush that comes while
        anything runs, and be it a health check's one token, for an error and ends the server.
        """
        path = f"/flush_cache?timeout={HEALTH_SECONDS:g}"
        await self._call("POST", path, timeout=2 * HEALTH_SECONDS)

    async def _succeed(self, path: str, body: dict[str, Any], timeout: float) -> None:
        found = await self._call("POST", path, body, timeout=timeout)
        if not found.get("success"):
            raise EngineRefused(f"{self.url}{path}: {found.get('message')}")

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float | None) -> Any:
        where = f"{self.url}{path}"
        limit = httpx.Timeout(timeout, connect=CONNECT_SECONDS, pool=None)
        try:
            answer = await self._http.request(method, where, json=body, timeout=limit)
        except httpx.TransportError as error:
            raise EngineUnavailable(f"{where}: {type(error).__name__} {error}".rstrip()) from error
        if answer.status_code >= 500:
            raise EngineUnavailable(f"{where}: {answer.status_code} {answer.text[:500]}")
        if answer.status_code >= 400:
            raise EngineRefused(f"{where}: {answer.status_code} {answer.text[:500]}")
        try:
            return answer.json() if answer.content.startswith((b"{", b"[")) else {}
        except ValueError as error:
            raise EngineUnavailable(f"{where}: an answer that is no JSON ({error})") from error


def sampling_params(params: SamplingParams, max_tokens: int) -> dict[str, Any]:
    """`params` as SGLang names them. It has no use for a seed outside its deterministic mode."""
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_new_tokens": max_tokens,
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_token_ids),
        "no_stop_trim": True,
        "skip_special_tokens": False,
    }


def answer_of(found: dict[str, Any]) -> Answer:
    """The answer in what `/generate` returned. Raises EngineUnavailable where it contradicts itself."""
    meta = found["meta_info"]
    logprobs = meta.get("output_token_logprobs") or []
    token_ids = list(found["output_ids"])
    if [entry[1] for entry in logprobs] != token_ids:
        counts = f"{len(token_ids)} tokens, {len(logprobs)} log-probs"
        raise EngineUnavailable(f"/generate: an answer of {counts}, or these of other tokens")
    return Answer(
        token_ids,
        [float(entry[0]) for entry in logprobs],
        FinishReason(meta["finish_reason"]["type"]),
        str(meta["weight_version"]),
    )
