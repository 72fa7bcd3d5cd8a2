"""Continuous decoding: a batch whose rows leave as they end and are refilled from the waiting requests.

Every distinct prompt is read once, whatever its number of samples. A finished row is replaced by the last one at once,
so the forward never carries it, and a few long sequences at the end cost what a small batch costs.

Time inside a run is a `clock` of decoding steps, so that a row's token count and length are the clock plus a constant
of the row: nothing has to be counted on the device. `_state` holds those constants, one column a row.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from r1mega.rollout.kv_cache import DecodeCache, PrefillCache, PromptCache
from r1mega.rollout.sampling import StopRule, draw_uniforms, sample_tokens
from r1mega.types import Completion, FinishReason, Request

# Rows of `_state`.
_TOKEN = 0  # the last token, which the next step reads
_OFFSET = 1  # tokens in the cache, minus the clock
_OUT = 2  # where the next token goes in the flat output, minus the clock
_END = 3  # the clock at which the row has all its tokens

# New prompts are read when this share of the batch is free: each reading costs about one step whatever its size.
_REFILL_SHARE = 8
# One reading takes this many tokens at most, padding included (one longer prompt is read alone), ...
_PREFILL_TOKENS = 16384
# ... and prompts are read together while the longest is at most a quarter longer than the shortest, plus this.
_PREFILL_SLACK = 8


@dataclass
class _Row:
    """The host's side of a row. `lane` is its place in the output, which it keeps while its row moves."""

    position: int  # of the request
    index: int  # of the sample
    lane: int
    offset: int  # tokens in the cache, minus the clock
    first: int  # clock of its first token


@dataclass
class _Waiting:
    position: int
    request: Request
    taken: int = 0


@dataclass(frozen=True)
class _Read:
    """A prompt that has been read: its keys and values, and the logits [1, V] after its last token."""

    cache: PromptCache
    logits: torch.Tensor


def hidden_states(
    model: PreTrainedModel,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    kv_cache: PrefillCache | DecodeCache | None = None,
) -> torch.Tensor:
    """The last hidden states [rows, tokens, hidden] of a model that runs with `kv_cache.attend`."""
    out = model.base_model(input_ids=token_ids, position_ids=positions, use_cache=False, kv_cache=kv_cache)
    return out.last_hidden_state


class DecodeRun:
    """One `generate` call. `limits[i][j]` is the number of tokens that sample j of request i may have."""

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        limits: Sequence[Sequence[int]],
        temperature: float,
        top_p: float,
        seed: int,
        stop_rule: StopRule,
        max_batch: int,
        weight_version: int,
        on_finished: Callable[[Completion], None] | None,
    ) -> None:
        self._model = model
        self._head: nn.Module = model.get_output_embeddings()
        self._limits, self._temperature, self._top_p, self._seed = limits, temperature, top_p, seed
        self._stop_rule, self._weight_version, self._on_finished = stop_rule, weight_version, on_finished
        self._requests = requests
        self._waiting = deque(_Waiting(position, request) for position, request in enumerate(requests))
        self._num_waiting = sum(request.num_samples for request in requests)
        self._max_batch = min(max_batch, self._num_waiting)
        # A prompt is kept while requests of the same tokens wait.
        self._uses = Counter(request.token_ids for request in requests)
        self._read: dict[tuple[int, ...], _Read] = {}
        self._done: list[list[Completion | None]] = [[None] * request.num_samples for request in requests]

        self._width = max(max(row) for row in limits)
        longest = max(len(r.token_ids) + max(row) for r, row in zip(requests, limits, strict=True))
        self._cache = DecodeCache(self._max_batch, longest)
        self._device = model.device
        lanes = (self._max_batch, self._width)
        self._tokens = torch.zeros(lanes, dtype=torch.long, device=self._device)
        self._logprobs = torch.zeros(lanes, device=self._device)
        self._uniforms = torch.zeros(lanes, dtype=torch.float64, device=self._device) if temperature > 0 else None
        self._state = torch.zeros(4, self._max_batch, dtype=torch.long, device=self._device)
        self._rows: list[_Row] = []
        self._free_lanes = list(range(self._max_batch))
        self._clock = 0

    def run(self) -> list[Completion]:
        """All completions, ordered by (position of the request, index)."""
        while self._rows or self._num_waiting:
            free = self._max_batch - len(self._rows)
            if self._num_waiting and free >= min(self._num_waiting, max(1, self._max_batch // _REFILL_SHARE)):
                self._admit(free)
            if self._rows:
                self._step()
        return [completion for samples in self._done for completion in samples]

    def _step(self) -> None:
        """One more token for every row."""
        count = len(self._rows)
        state = self._state[:, :count]
        offsets = [row.offset for row in self._rows]
        longest = self._clock + max(offsets)
        if min(offsets) == max(offsets):
            self._cache.begin_step(count, longest, None)
            positions = torch.full((1, 1), longest, device=self._device)
        else:
            lengths = state[_OFFSET] + self._clock
            self._cache.begin_step(count, longest, lengths)
            positions = lengths.unsqueeze(1)
        hidden = hidden_states(self._model, state[_TOKEN].unsqueeze(1), positions, self._cache)
        self._clock += 1
        self._emit(0, self._head(hidden[:, 0]), self._clock - 1)

    def _admit(self, free: int) -> None:
        """Fill free rows from the waiting requests and give each its first token."""
        wave: list[tuple[_Waiting, int]] = []
        while free and self._waiting:
            waiting = self._waiting[0]
            count = min(free, waiting.request.num_samples - waiting.taken)
            wave.append((waiting, count))
            free -= count
            if waiting.taken + count < waiting.request.num_samples:
                break
            self._waiting.popleft()
        self._read_prompts(dict.fromkeys(waiting.request.token_ids for waiting, _ in wave))
        first_row = len(self._rows)
        logits = []
        for waiting, count in wave:
            prompt = waiting.request.token_ids
            read = self._read[prompt]
            self._cache.fill(len(self._rows), count, read.cache)
            self._place(waiting, count)
            logits.append(read.logits.expand(count, -1))
            waiting.taken += count
            self._num_waiting -= count
            if waiting.taken == waiting.request.num_samples:
                self._uses[prompt] -= 1
                if not self._uses[prompt]:
                    del self._read[prompt]
        self._emit(first_row, torch.cat(logits), self._clock - 1)

    def _place(self, waiting: _Waiting, count: int) -> None:
        """Rows for the next `count` samples of a request whose prompt is in the cache."""
        position, taken, length = waiting.position, waiting.taken, len(waiting.request.token_ids)
        rows = slice(len(self._rows), len(self._rows) + count)
        lanes = [self._free_lanes.pop() for _ in range(count)]
        if self._uniforms is not None:
            own = waiting.request.seed
            key = (self._seed, position) if own is None else (own, 0)
            uniforms = draw_uniforms(*key, waiting.request.num_samples, self._width)
            self._uniforms[lanes] = uniforms[taken : taken + count].to(self._device)
        first, offset = self._clock - 1, length - self._clock
        self._rows += [_Row(position, taken + i, lane, offset, first) for i, lane in enumerate(lanes)]
        self._state[_OFFSET, rows] = offset
        self._state[_OUT, rows] = torch.tensor(lanes, device=self._device) * self._width - first
        limits = torch.tensor(self._limits[position][taken : taken + count], device=self._device)
        self._state[_END, rows] = first + limits - 1

    def _read_prompts(self, prompts: dict[tuple[int, ...], None]) -> None:
        """Run the model over the prompts that have not been read, those of similar length together."""
        todo = sorted((prompt for prompt in prompts if prompt not in self._read), key=len)
        start = 0
        while start < len(todo):
            most = len(todo[start]) * 5 // 4 + _PREFILL_SLACK
            stop = start + 1
            while (
                stop < len(todo) and len(todo[stop]) <= most and len(todo[stop]) * (stop + 1 - start) <= _PREFILL_TOKENS
            ):
                stop += 1
            self._read_together(todo[start:stop])
            start = stop

    def _read_together(self, prompts: list[tuple[int, ...]]) -> None:
        lengths = [len(prompt) for prompt in prompts]
        token_ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            token_ids[row, : len(prompt)] = torch.tensor(prompt)
        cache = PrefillCache()
        positions = torch.arange(max(lengths), device=self._device).unsqueeze(0)
        hidden = hidden_states(self._model, token_ids.to(self._device), positions, cache)
        last = torch.tensor(lengths, device=self._device) - 1
        logits = self._head(hidden[torch.arange(len(prompts), device=self._device), last])
        for prompt, prompt_cache, row in zip(prompts, cache.split(lengths), logits.split(1), strict=True):
            self._read[prompt] = _Read(prompt_cache, row)

    def _emit(self, first_row: int, logits: torch.Tensor, clock: int) -> None:
        """Pick a token for the rows from `first_row` on, and let go of the rows that it ends."""
        state = self._state[:, first_row : len(self._rows)]
        out = state[_OUT] + clock
        uniforms = None if self._uniforms is None else self._uniforms.view(-1)[out]
        tokens, logprobs = sample_tokens(logits, self._temperature, self._top_p, uniforms)
        self._tokens.view(-1)[out] = tokens
        self._logprobs.view(-1)[out] = logprobs
        state[_TOKEN] = tokens
        stopped = self._stop_rule.ends(tokens)
        if self._stop_rule.reads_text:
            self._read_text(first_row, tokens, stopped, clock)
        ended = (stopped | (state[_END] <= clock)).nonzero().squeeze(1).tolist()
        if ended:
            stopped_list = stopped[ended].tolist()
            rows = [first_row + row for row in ended]
            for row, by_stop in zip(rows, stopped_list, strict=True):
                self._finish(self._rows[row], by_stop, clock)
            self._remove(rows)

    def _read_text(self, first_row: int, tokens: torch.Tensor, stopped: torch.Tensor, clock: int) -> None:
        """Mark in `stopped` the rows whose text now holds a stop string."""
        may_end = self._stop_rule.may_end(tokens) & ~stopped
        for i in may_end.nonzero().squeeze(1).tolist():
            row = self._rows[first_row + i]
            count = clock - row.first + 1
            tail = self._tokens[row.lane, max(0, count - self._stop_rule.tail) : count].tolist()
            if self._stop_rule.text_ends(tail):
                stopped[i] = True

    def _finish(self, row: _Row, by_stop: bool, clock: int) -> None:
        count = clock - row.first + 1
        logprobs = self._logprobs[row.lane, :count]
        if not logprobs.isfinite().all():
            raise ValueError(
                f"request {self._requests[row.position].key}: the model's log-probs are not finite in weight version"
                f" {self._weight_version}; the weights are broken (a diverged update or an overflow in their dtype)"
            )
        completion = Completion(
            key=self._requests[row.position].key,
            index=row.index,
            token_ids=self._tokens[row.lane, :count].tolist(),
            logprobs=logprobs.tolist(),
            finish_reason=FinishReason.stop if by_stop else FinishReason.length,
            weight_version=self._weight_version,
        )
        self._done[row.position][row.index] = completion
        self._free_lanes.append(row.lane)
        if self._on_finished is not None:
            self._on_finished(completion)

    def _remove(self, ended: list[int]) -> None:
        """Let the last rows take the places of the ended ones, so that the active rows stay the first."""
        count = len(self._rows) - len(ended)
        gone = set(ended)
        holes = [row for row in ended if row < count]
        movers = [row for row in range(count, len(self._rows)) if row not in gone]
        if holes:
            longest = self._clock + max(self._rows[row].offset for row in movers)
            self._cache.move(movers, holes, longest)
            self._state[:, holes] = self._state[:, movers]
            for mover, hole in zip(movers, holes, strict=True):
                self._rows[hole] = self._rows[mover]
        del self._rows[count:]
