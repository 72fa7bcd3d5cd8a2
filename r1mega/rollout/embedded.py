"""The embedded engine: transformers behind the same interface as the SGLang engines, in the caller's own process.

It is what generates on a machine without SGLang, and what the others are checked against. The decoding loop is our own
(see rollout/decode.py); transformers brings the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from r1mega.rollout.decode import DecodeRun, hidden_states
from r1mega.rollout.hf_weights import WeightTable
from r1mega.rollout.kv_cache import ATTENTION
from r1mega.rollout.sampling import Decoder, StopRule, check_params
from r1mega.types import Completion, Request, SamplingParams

FAMILIES = ("deepseek_v3", "llama", "qwen2")
# Of transformers' three ways the fastest on CPU from 4 rows up: measured 1.5-5 times as fast as the loop over experts,
# more with more experts, while batched_mm copies an expert's weights for each token. It is the usual one on CUDA too.
_EXPERTS = "grouped_mm"
_LOGITS_AT_ONCE = 2**25  # elements; 128 MiB in float32
_PREFILL_TOKENS = 16384


class EmbeddedEngine:
    """`r1mega.types.Engine` with a transformers model of the families in `FAMILIES`.

    For a given seed the samples of a request depend on its position in the list and its prompt, up to rounding: the
    batch they run in does not change what they draw. The sample of a request of one, with a seed of its own, depends on
    that and the prompt alone.
    """

    def __init__(
        self,
        config_dir: str | Path,
        tokenizer: Decoder | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        max_batch: int = 256,
    ) -> None:
        """A model without weights, which come by `load`.

        `config_dir` holds config.json and may hold generation_config.json, whose end-of-sequence tokens count too.
        `tokenizer` is needed for stop strings only. `max_batch` sequences at most decode at once.
        Raises ValueError on a model that the engine would run wrongly.
        """
        if max_batch < 1:
            raise ValueError(f"max_batch: got {max_batch}, must be at least 1")
        self._tokenizer = tokenizer
        self._max_batch = max_batch
        self._device = torch.device(device)
        config = AutoConfig.from_pretrained(config_dir)
        _check_family(config, config_dir)
        self._model = _build(config, dtype, self._device)
        self._max_length: int = config.max_position_embeddings
        self._vocab_size: int = config.vocab_size
        self._end_tokens = _end_tokens(config, Path(config_dir))
        self._rules: dict[tuple[tuple[int, ...], tuple[str, ...]], StopRule] = {}
        self._weights = WeightTable(self._model)
        self._weight_version = -1

    @property
    def weight_version(self) -> int:
        """The version of the weights last loaded; -1 before the first load, and after one that failed."""
        return self._weight_version

    @property
    def model(self) -> PreTrainedModel:
        """The model in memory. Its attention is the engine's own, so it cannot run `model.generate`."""
        return self._model

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]], weight_version: int) -> None:
        """Replace the weights in place by the tensors of a Hugging Face checkpoint, in any order.

        Raises ValueError as `WeightTable.load` does; the engine then refuses to run until a load succeeds.
        """
        if weight_version < 0:
            raise ValueError(f"weight_version: got {weight_version}, must be at least 0; -1 stands for no weights")
        self._weight_version = -1
        self._weights.load(tensors)
        self._weight_version = weight_version

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_finished: Callable[[Completion], None] | None = None,
        *,
        limits: Sequence[Sequence[int]] | None = None,
    ) -> list[Completion]:
        """All completions of all requests, ordered by (position of the request, index).

        `limits[i][j]`, where given, replaces `params.max_tokens` for sample j of request i: the number of tokens it may
        have. Raises ValueError on parameters out of range, token ids outside the vocabulary, requests longer than the
        model's context, and where no complete weights are loaded or the model's log-probs are not finite.
        """
        self._check_loaded()
        check_params(params)
        limits = _limits(requests, params.max_tokens, limits)
        for request, row in zip(requests, limits, strict=True):
            self._check_request(request, max(row))
        if not requests:
            return []
        stop_rule = self._stop_rule(params)
        seed = np.random.SeedSequence().entropy if params.seed is None else params.seed
        with torch.inference_mode():
            return DecodeRun(
                self._model,
                requests,
                limits,
                params.temperature,
                params.top_p,
                seed,
                stop_rule,
                self._max_batch,
                self._weight_version,
                on_finished,
            ).run()

    @torch.inference_mode()
    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Teacher-forced log-probs at temperature 1: for each sequence, the log-prob of token t+1 given tokens 0..t.

        Raises ValueError on an empty sequence, token ids outside the vocabulary and a sequence longer than the context.
        """
        self._check_loaded()
        for i, sequence in enumerate(sequences):
            self._check_tokens(f"sequence {i}", sequence, 0)
        results: list[list[float]] = [[] for _ in sequences]
        order = sorted((i for i, s in enumerate(sequences) if len(s) > 1), key=lambda i: -len(sequences[i]))
        while order:
            rows = max(1, min(self._max_batch, _PREFILL_TOKENS // len(sequences[order[0]])))
            batch, order = order[:rows], order[rows:]
            for i, values in zip(batch, self._score([sequences[i] for i in batch]), strict=True):
                results[i] = values
        return results

    def _score(self, sequences: list[Sequence[int]]) -> list[list[float]]:
        """`logprobs` of one right-padded batch, the longest first."""
        counts = [len(sequence) - 1 for sequence in sequences]
        inputs = torch.zeros(len(sequences), counts[0], dtype=torch.long)
        for row, sequence in enumerate(sequences):
            inputs[row, : counts[row]] = torch.tensor(sequence[:-1])
        positions = torch.arange(counts[0], device=self._device).unsqueeze(0)
        hidden = hidden_states(self._model, inputs.to(self._device), positions)
        real = torch.arange(counts[0]) < torch.tensor(counts).unsqueeze(1)
        hidden = hidden[real.to(self._device)]  # the heads run over real tokens only
        targets = torch.tensor([token for sequence in sequences for token in sequence[1:]], device=self._device)
        head = self._model.get_output_embeddings()
        step = max(1, _LOGITS_AT_ONCE // self._vocab_size)
        parts = []
        for some, target in zip(hidden.split(step), targets.split(step), strict=True):
            logits = head(some).float()
            parts.append(logits.gather(1, target.unsqueeze(1)).squeeze(1) - logits.logsumexp(-1))
        return [part.tolist() for part in torch.cat(parts).split(counts)]

    def _stop_rule(self, params: SamplingParams) -> StopRule:
        """The rule of `params`, kept for the next call: stop strings make it read the whole vocabulary."""
        key = (params.stop_token_ids, params.stop)
        if key not in self._rules:
            ends = self._end_tokens.union(params.stop_token_ids)
            self._rules[key] = StopRule(self._vocab_size, ends, params.stop, self._tokenizer, self._device)
        return self._rules[key]

    def _check_loaded(self) -> None:
        if self._weight_version < 0:
            raise ValueError(
                "the engine holds no complete weights: call load() first, and again after a load that failed"
            )

    def _check_request(self, request: Request, max_tokens: int) -> None:
        if request.num_samples < 1:
            raise ValueError(f"request {request.key}: num_samples is {request.num_samples}, must be at least 1")
        self._check_tokens(f"request {request.key}", request.token_ids, max_tokens)

    def _check_tokens(self, what: str, token_ids: Sequence[int], max_tokens: int) -> None:
        if not token_ids:
            raise ValueError(f"{what}: has no tokens; at least one is needed to predict the next")
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            wrong = next(token for token in token_ids if not 0 <= token < self._vocab_size)
            raise ValueError(f"{what}: token id {wrong} is outside the model's vocabulary 0..{self._vocab_size - 1}")
        if len(token_ids) + max_tokens > self._max_length:
            raise ValueError(
                f"{what}: {len(token_ids)} tokens and {max_tokens} new ones exceed the model's context of"
                f" {self._max_length} (max_position_embeddings); lower max_tokens or drop long prompts"
            )


def _check_family(config: PretrainedConfig, config_dir: str | Path) -> None:
    """Raises ValueError on models with a part that the engine's attention or output head does not know."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{config_dir}: model_type is {config.model_type!r}, the embedded engine runs {', '.join(FAMILIES)}"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"{config_dir}: layer_types has {sorted(kinds)}, the embedded engine runs full attention only")


def _build(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model with unset weights."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # it describes the files of a checkpoint; `load` is given plain tensors
    experts = {"experts_implementation": _EXPERTS} if getattr(config, "num_local_experts", None) else {}
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION, **experts)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()  # updates of 0.001 would drown in bfloat16
    return model.eval().requires_grad_(False)


def _end_tokens(config: PretrainedConfig, config_dir: Path) -> set[int]:
    """The end-of-sequence tokens of the config and of generation_config.json, either of which may list several."""
    configs: list[PretrainedConfig | GenerationConfig] = [config]
    if (config_dir / "generation_config.json").exists():
        configs.append(GenerationConfig.from_pretrained(config_dir))
    tokens: set[int] = set()
    for each in configs:
        ends = each.eos_token_id
        tokens.update([ends] if isinstance(ends, int) else ends or [])
    return tokens


def _limits(
    requests: Sequence[Request], max_tokens: int, limits: Sequence[Sequence[int]] | None
) -> Sequence[Sequence[int]]:
    """`limits` checked against the requests, or `max_tokens` for every sample."""
    if limits is None:
        return [[max_tokens] * max(1, request.num_samples) for request in requests]
    if len(limits) != len(requests):
        raise ValueError(f"limits: got {len(limits)} rows for {len(requests)} requests; give one per request")
    for request, row in zip(requests, limits, strict=True):
        if len(row) != request.num_samples or min(row, default=0) < 1:
            raise ValueError(
                f"limits of request {request.key}: got {list(row)}, needs {request.num_samples} numbers of at least 1"
            )
    return limits
