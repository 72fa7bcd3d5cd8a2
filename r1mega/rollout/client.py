"""One SGLang server over HTTP: its public interface (SGLang 0.5.21, `srt/entrypoints/http_server.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

from r1mega.types import (
    Completion,
    EngineRefused,
    EngineUnavailable,
    FinishReason,
    GroupAddress,
    SamplingParams,
    Span,
    TensorShape,
)

if TYPE_CHECKING:
    import torch

    from r1mega.models.expert_choices import ExpertChoices

CONNECT_SECONDS = 10.0
HEALTH_SECONDS = 30.0  # SGLang itself gives up on its scheduler after 20


_NO_SERVER = "no_available_workers"  # sglang-router 0.3.2, of a 503


class NoServerBehind(EngineUnavailable):
    """A router has no server to hand a call to."""


@dataclass(frozen=True)
class Answer:
    """One generated sequence; `weight_version` as the server names it, and (version, start, end) of its spans;
    `routed_experts` as in types.Sample."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    weight_version: str
    versions: tuple[tuple[str, int, int], ...] = ()
    routed_experts: torch.Tensor | None = None

    def spans(self) -> tuple[Span, ...]:
        """Under which weights each token was generated.

        Raises EngineUnavailable where a version is no number, or they do not cover the tokens: the server serves
        something else than what was published.
        """
        found = self.versions or ((self.weight_version, 0, len(self.token_ids)),)
        ends = [0, *(end for _, _, end in found)]
        starts = [*(start for _, start, _ in found), len(self.token_ids)]
        if starts != ends or not all(version.isdecimal() for version, _, _ in found):
            shown = " ".join(f"{version}:{start}-{end}" for version, start, end in found)
            raise EngineUnavailable(f"serves weights {shown}, for {len(self.token_ids)} tokens")
        return tuple(Span(int(version), start, end) for version, start, end in found if end > start)

    def completion(self, key: int, index: int) -> Completion:
        """As the rest of the system has it. Raises EngineUnavailable as `spans`."""
        return Completion(
            key,
            index,
            self.token_ids,
            self.logprobs,
            self.finish_reason,
            int(self.weight_version),
            self.spans(),
            self.routed_experts,
        )


class EngineClient:
    """Calls to the server at `url`. Every call has a limit of time; only generation may take as long as it takes.

    All raise EngineUnavailable and EngineRefused, whose messages name the server and the call.
    """

    def __init__(self, url: str, http: httpx.AsyncClient) -> None:
        self.url = url
        self._http = http

    async def is_healthy(self) -> bool:
        """Whether the server has started and its scheduler answers; nothing is generated, so it may be asked at any
        time."""
        try:
            for path in ("/health", "/server_info"):
                answer = await self._http.get(f"{self.url}{path}", timeout=HEALTH_SECONDS)
                if answer.status_code != 200:
                    return False
        except httpx.HTTPError:
            return False
        return True

    async def identity(self) -> str:
        """What tells this start of the server from every other: the seed that it drew, and how long its start took."""
        info = await self._call("GET", "/server_info", timeout=HEALTH_SECONDS)
        return f"{info['random_seed']} {info['startup_time']}"

    async def has_servers(self) -> bool:
        """Of a router: whether servers behind it are well."""
        try:
            answer = await self._http.get(f"{self.url}/readiness", timeout=HEALTH_SECONDS)
        except httpx.HTTPError:
            return False
        return answer.status_code == 200

    async def weight_version(self) -> str:
        """The version of the weights it serves."""
        return str((await self._call("GET", "/model_info", timeout=HEALTH_SECONDS))["weight_version"])

    async def generate(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        max_tokens: int,
        choices: ExpertChoices | None = None,
        *,
        seed: int | None = None,
    ) -> Answer:
        """One response to one prompt. How long it may take is for who watches the server to say, not for this call.

        With `choices`, the shape of the model's, the answer says which experts the tokens were sent to. `seed`, which
        the server has a use for in its deterministic mode alone, is this one sequence's.
        """
        body = {
            "input_ids": list(token_ids),
            "sampling_params": sampling_params(params, max_tokens) | ({} if seed is None else {"sampling_seed": seed}),
            "return_logprob": True,
            "return_routed_experts": choices is not None,
        }
        return answer_of(await self._call("POST", "/generate", body, timeout=None), len(token_ids), choices)

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

    async def load_from_disk(self, path: str, version: str, timeout: float, *, is_paused: bool = False) -> None:
        """Replace the weights by those of a checkpoint directory that the server sees under the same path."""
        # A server that was started without weights would else load "dummy" ones again.
        body = {"model_path": path, "load_format": "auto", "weight_version": version, "flush_cache": False}
        await self._succeed("/update_weights_from_disk", body, timeout)
        await self._flush(is_paused=is_paused)

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

    async def join_group(self, address: GroupAddress, first_rank: int, timeout: float) -> None:
        """Join a process group, its ranks from `first_rank` on; rank 0 waits there."""
        body = {
            "master_address": address.host,
            "master_port": address.port,
            "rank_offset": first_rank,
            "world_size": address.size,
            "group_name": address.name,
            "backend": address.backend,
        }
        await self._succeed("/init_weights_update_group", body, timeout)

    async def leave_group(self, name: str, timeout: float) -> None:
        """Leave a process group."""
        await self._succeed("/destroy_weights_update_group", {"group_name": name}, timeout)

    async def update_from_group(self, name: str, tensors: Sequence[TensorShape], timeout: float) -> None:
        """Load tensors that rank 0 of the group broadcasts one by one."""
        names, dtypes, shapes = zip(*tensors, strict=True)
        body = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": name}
        body |= {"flush_cache": False}
        await self._succeed("/update_weights_from_distributed", body, timeout)

    async def end_update(self, version: str, timeout: float, *, is_paused: bool = False) -> None:
        """Serve what was loaded since `begin_update`, under this version."""
        await self._succeed("/end_weight_update", {}, timeout)
        await self._flush(is_paused=is_paused)
        await self._succeed("/update_weight_version", {"new_version": version}, timeout)

    async def checksums(self, timeout: float) -> dict[str, Any]:
        """What the server says of the hashes of its parameters; see weights/checksums.py."""
        return await self._call("POST", "/weights_checker", {"action": "checksum"}, timeout=timeout)

    async def pause(self, mode: str) -> None:
        """Stop generating: `abort` ends what runs, `retract` puts it back into the queue, `in_place` freezes it."""
        await self._call("POST", "/pause_generation", {"mode": mode}, timeout=HEALTH_SECONDS)

    async def abort_all(self) -> None:
        """End every request: each is answered with what there is of it, and `abort`."""
        await self._call("POST", "/abort_request", {"abort_all": True}, timeout=HEALTH_SECONDS)

    async def resume(self) -> None:
        """Go on generating after `pause`."""
        await self._call("POST", "/continue_generation", {}, timeout=HEALTH_SECONDS)

    async def release(self, tags: Sequence[str]) -> None:
        """Give back the memory of `weights`, `kv_cache` or `cuda_graph`. Nothing may be running.

        Waits until the scheduler has put away the last answer's batch: SGLang 0.5.21 ends itself where it is asked
        before (an assert), or asked to take back a tag that it has (a KeyError).
        """
        await self._flush(is_paused=False)
        await self._call("POST", "/release_memory_occupation", {"tags": list(tags)}, timeout=300)

    async def reclaim(self, tags: Sequence[str]) -> None:
        """Take back what `release` gave; weights have to be loaded again."""
        await self._call("POST", "/resume_memory_occupation", {"tags": list(tags)}, timeout=300)

    async def _flush(self, *, is_paused: bool) -> None:
        """Forget what was computed with former weights.

        A call of its own, which waits until nothing runs: within an update SGLang 0.5.21 takes a flush that comes while
        anything runs, and be it a health check's one token, for an error and ends the server. A server that is paused
        by `retract` runs nothing, but what it put back into its queue would be waited for in vain.
        """
        path = "/flush_cache" if is_paused else f"/flush_cache?timeout={HEALTH_SECONDS:g}"
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
            has_none = answer.status_code == 503 and _NO_SERVER in answer.text
            kind = NoServerBehind if has_none else EngineUnavailable
            raise kind(f"{where}: {answer.status_code} {answer.text[:500]}")
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


def answer_of(found: dict[str, Any], num_prompt: int, choices: ExpertChoices | None = None) -> Answer:
    """The answer in what `/generate` returned for a prompt of so many tokens.

    Raises EngineUnavailable where it contradicts itself, EngineRefused where it lacks the experts asked for.
    """
    meta = found["meta_info"]
    logprobs = meta.get("output_token_logprobs") or []
    token_ids = list(found["output_ids"])
    if [entry[1] for entry in logprobs] != token_ids:
        counts = f"{len(token_ids)} tokens, {len(logprobs)} log-probs"
        raise EngineUnavailable(f"/generate: an answer of {counts}, or these of other tokens")
    reason = FinishReason(meta["finish_reason"]["type"])
    return Answer(
        token_ids,
        [float(entry[0]) for entry in logprobs],
        reason,
        str(meta["weight_version"]),
        tuple((str(s["version"]), int(s["start"]), int(s["end"])) for s in meta.get("weight_versions") or ()),
        None if choices is None else _routed_experts(meta, choices, num_prompt + len(token_ids) - 1, reason),
    )


def _routed_experts(
    meta: dict[str, Any], choices: ExpertChoices, num_tokens: int, reason: FinishReason
) -> torch.Tensor | None:
    text = meta.get("routed_experts")
    if text is None:
        if reason is FinishReason.abort:  # it may have ended before it was read
            return None
        raise EngineRefused("/generate: no routed_experts; the server must run with --enable-return-routed-experts")
    try:
        return choices.decode(text, num_tokens)
    except ValueError as error:
        raise EngineUnavailable(f"/generate: {error}") from None
