"""The embedded engine against transformers' own generate and forward."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from r1mega.rollout.embedded import EmbeddedEngine
from r1mega.types import Completion, FinishReason, Request, SamplingParams

VOCAB = 32
# fp32 sums in another order: batched products here, transformers' attention and padding there.
TOLERANCE = 1e-5


def _config(family: str) -> PretrainedConfig:
    # A wide initialization makes the distributions sharp enough that a wrong position or a lost token shows.
    common = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    if family == "qwen2":
        return Qwen2Config(**common, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True)
    if family == "llama":
        return LlamaConfig(**common, intermediate_size=48, num_key_value_heads=1, tie_word_embeddings=False)
    return DeepseekV3Config(
        **common,
        intermediate_size=48,
        moe_intermediate_size=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )


class Family:
    """A tiny model: transformers' own object, its checkpoint on disk, and the tensors of that checkpoint."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(_config(name))
        for parameter_name, buffer in model.named_buffers():
            if parameter_name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.1)
        self.model: PreTrainedModel = model.eval()
        model.save_pretrained(folder)
        self.folder = folder
        self.tensors = load_file(folder / "model.safetensors")
        self._greedy: dict[tuple[int, ...], list[int]] = {}

    def engine(self, **options: object) -> EmbeddedEngine:
        engine = EmbeddedEngine(self.folder, **options)
        engine.load(self.tensors.items(), 3)
        return engine

    @torch.no_grad()
    def greedy(self, prompt: tuple[int, ...], count: int) -> list[int]:
        """The first `count` of the 24 tokens that transformers' generate gives to the prompt alone."""
        if prompt not in self._greedy:
            ids = torch.tensor([prompt])
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, pad_token_id=0
            )
            self._greedy[prompt] = out[0, len(prompt) :].tolist()
        assert count <= 24
        return self._greedy[prompt][:count]

    @torch.no_grad()
    def forced(self, tokens: list[int], temperature: float = 1.0) -> list[float]:
        logits = self.model(torch.tensor([tokens])).logits[0, :-1].double() / temperature
        return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1).tolist()


@pytest.fixture(scope="module", params=["deepseek_v3", "qwen2", "llama"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family("qwen2", tmp_path_factory.mktemp("one"))


PROMPTS = [(5, 9, 2), (7,), tuple(range(1, 24)), (5, 9, 2), (30, 31, 3, 4, 8, 12)]


def _requests(num_samples: int = 1) -> list[Request]:
    return [Request(key=10 * i, token_ids=prompt, num_samples=num_samples) for i, prompt in enumerate(PROMPTS)]


def _same(one: list[Completion], other: list[Completion]) -> bool:
    return [c.token_ids for c in one] == [c.token_ids for c in other]


@pytest.mark.parametrize("max_batch", [3, 64])
def test_greedy_is_generates(family: Family, max_batch: int) -> None:
    completions = family.engine(max_batch=max_batch).generate(
        _requests(2), SamplingParams(temperature=0, max_tokens=12)
    )
    assert [(c.key, c.index) for c in completions] == [(10 * i, j) for i in range(len(PROMPTS)) for j in range(2)]
    for completion in completions:
        assert completion.token_ids == family.greedy(PROMPTS[completion.key // 10], 12)
        assert completion.finish_reason is FinishReason.length
        assert completion.weight_version == 3


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_logprobs_of_samples_are_the_models(family: Family, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_p=0.9, max_tokens=15, seed=5)
    for completion in family.engine().generate(_requests(2), params):
        prompt = list(PROMPTS[completion.key // 10])
        forced = family.forced(prompt + completion.token_ids, temperature or 1.0)[len(prompt) - 1 :]
        assert completion.logprobs == pytest.approx(forced, abs=TOLERANCE)
        # Negative control: the log-probs of the tokens moved by one place are far outside the tolerance.
        assert completion.logprobs[1:] != pytest.approx(forced[:-1], abs=100 * TOLERANCE)


def test_scores_are_the_models_forward(family: Family) -> None:
    sequences = [[3, 1, 4, 1, 5, 9], [2], list(range(1, 31)), [8, 8], list(range(1, 31))]
    got = family.engine(max_batch=2).logprobs(sequences)
    assert [len(row) for row in got] == [5, 0, 29, 1, 29]
    for sequence, row in zip(sequences, got, strict=True):
        if row:
            assert row == pytest.approx(family.forced(sequence), abs=TOLERANCE)


def test_unequal_limits_and_a_small_batch_change_no_token(family: Family) -> None:
    limits = [[1, 20], [3, 9], [24, 2], [7, 7], [1, 1]]
    want = [family.greedy(prompt, count) for prompt, row in zip(PROMPTS, limits, strict=True) for count in row]
    for max_batch in (4, 10):
        completions = family.engine(max_batch=max_batch).generate(
            _requests(2), SamplingParams(temperature=0), limits=limits
        )
        assert [c.token_ids for c in completions] == want


def test_storage_grows_with_the_sequences(qwen2: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1mega.rollout.kv_cache._FIRST_TOKENS", 2)
    params = SamplingParams(temperature=0, max_tokens=24)
    assert [c.token_ids for c in qwen2.engine(max_batch=3).generate(_requests(), params)] == [
        qwen2.greedy(prompt, 24) for prompt in PROMPTS
    ]


def test_a_prompt_is_read_once(family: Family) -> None:
    engine = family.engine(max_batch=4)
    widths = []
    engine.model.base_model.embed_tokens.register_forward_pre_hook(lambda _, args: widths.append(tuple(args[0].shape)))
    engine.generate(_requests(6), SamplingParams(max_tokens=4, seed=0))
    # PROMPTS[0] and PROMPTS[3] are the same, and the prompt of one token is not told from a step.
    read = sum(rows for rows, width in widths if width > 1)
    assert read == 3
    decoded = sum(rows for rows, width in widths if width == 1)
    # The prompt of one token, and of each sample every token but the last, which nothing has to read. No row more.
    assert decoded == 1 + 30 * 3


def test_seed_decides_the_samples(family: Family) -> None:
    params = SamplingParams(max_tokens=16, seed=11)
    one = family.engine().generate(_requests(4), params)
    assert _same(one, family.engine().generate(_requests(4), params))
    assert _same(one, family.engine(max_batch=3).generate(_requests(4), params))
    assert not _same(one, family.engine().generate(_requests(4), SamplingParams(max_tokens=16, seed=12)))
    assert len({tuple(c.token_ids) for c in one}) == len(one)  # also for the two requests of the same prompt


def test_a_request_with_a_seed_of_its_own_draws_the_same_in_any_company(qwen2: Family) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=12)
    own = [Request(i, PROMPTS[i % len(PROMPTS)], seed=1000 + i) for i in range(6)]
    engine = qwen2.engine(max_batch=4)
    together = {c.key: c.token_ids for c in engine.generate(own, params)}
    backwards = {c.key: c.token_ids for c in qwen2.engine().generate(own[::-1], params)}
    assert backwards == together
    longer = SamplingParams(temperature=1.0, top_p=0.95, max_tokens=20, seed=3)
    alone = [engine.generate([request], longer)[0].token_ids[:12] for request in own]
    assert alone == [together[i] for i in range(6)]
    others = engine.generate([Request(0, own[0].token_ids, seed=7)], params)
    assert others[0].token_ids != together[0]


def test_without_a_seed_calls_differ(qwen2: Family) -> None:
    engine = qwen2.engine()
    assert not _same(*(engine.generate(_requests(4), SamplingParams(max_tokens=16)) for _ in range(2)))


def test_first_tokens_follow_the_distribution(qwen2: Family) -> None:
    count = 4000
    completions = qwen2.engine(max_batch=512).generate(
        [Request(0, PROMPTS[0], count)], SamplingParams(temperature=2.0, max_tokens=1, seed=3)
    )
    seen = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=VOCAB).double()

    def chi_square(temperature: float) -> float:
        with torch.no_grad():
            probs = (qwen2.model(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / temperature).softmax(-1)
        expected = probs * count
        common = expected >= 5
        cells = torch.cat([expected[common], expected[~common].sum(0, keepdim=True)])
        got = torch.cat([seen[common], seen[~common].sum(0, keepdim=True)])
        return ((got - cells).square() / cells.clamp(min=1e-9)).sum().item()

    # 32 cells at most: the 99.99 % point of chi-square with 31 degrees of freedom is 69.
    assert chi_square(2.0) < 69
    assert chi_square(1.6) > 69  # negative control


def test_stop_tokens_end_a_sequence_and_stay_in_it(family: Family) -> None:
    full = family.greedy(PROMPTS[0], 12)
    stop = full[4]
    cut = full[: full.index(stop) + 1]
    (completion,) = family.engine().generate(
        [Request(0, PROMPTS[0])], SamplingParams(temperature=0, max_tokens=12, stop_token_ids=(stop,))
    )
    assert (completion.token_ids, completion.finish_reason) == (cut, FinishReason.stop)
    assert len(completion.logprobs) == len(cut)


def test_a_stop_token_at_the_limit_is_a_stop(qwen2: Family) -> None:
    (first,) = qwen2.greedy(PROMPTS[0], 1)
    (completion,) = qwen2.engine().generate(
        [Request(0, PROMPTS[0])], SamplingParams(temperature=0, max_tokens=1, stop_token_ids=(first,))
    )
    assert completion.finish_reason is FinishReason.stop


def test_the_models_end_tokens_count(qwen2: Family, tmp_path: Path) -> None:
    full = qwen2.greedy(PROMPTS[4], 12)
    for where in ("config.json", "generation_config.json"):
        folder = tmp_path / where
        folder.mkdir()
        config = _config("qwen2")
        if where == "config.json":
            config.eos_token_id = full[3]
        else:
            (folder / where).write_text(f'{{"eos_token_id": [{full[3]}, {VOCAB - 1}]}}')
        config.save_pretrained(folder)
        engine = EmbeddedEngine(folder)
        engine.load(qwen2.tensors.items(), 0)
        (completion,) = engine.generate([Request(0, PROMPTS[4])], SamplingParams(temperature=0, max_tokens=12))
        assert completion.token_ids[-1] == full[3]
        assert len(completion.token_ids) == full.index(full[3]) + 1


class Letters:
    """A tokenizer of one letter a token, for stop strings."""

    def __len__(self) -> int:
        return VOCAB

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(chr(ord("A") + token) for token in token_ids)


def test_stop_strings_end_a_sequence_and_stay_in_it(qwen2: Family) -> None:
    text = Letters().decode(qwen2.greedy(PROMPTS[2], 20), skip_special_tokens=False)
    stop = text[5:8]
    (completion, other) = qwen2.engine(tokenizer=Letters()).generate(
        [Request(0, PROMPTS[2]), Request(1, PROMPTS[1])],
        SamplingParams(temperature=0, max_tokens=20, stop=("no such text", stop)),
    )
    assert Letters().decode(completion.token_ids, skip_special_tokens=False) == text[: text.index(stop) + 3]
    assert completion.finish_reason is FinishReason.stop
    # The stop string's last letter alone ends nothing.
    assert other.token_ids == qwen2.greedy(PROMPTS[1], len(other.token_ids))


def test_completions_are_handed_over_as_they_end(qwen2: Family) -> None:
    seen: list[Completion] = []
    limits = [[9, 2], [1, 4], [3, 8], [5, 7], [6, 10]]
    completions = qwen2.engine().generate(_requests(2), SamplingParams(seed=0), seen.append, limits=limits)
    assert [len(c.token_ids) for c in seen] == sorted(count for row in limits for count in row)
    assert sorted(map(id, seen)) == sorted(map(id, completions))


def test_no_requests(qwen2: Family) -> None:
    assert qwen2.engine().generate([], SamplingParams()) == []
    assert qwen2.engine().logprobs([]) == []


@pytest.mark.parametrize(
    ("request_", "params", "message"),
    [
        (Request(4, ()), {}, "request 4: has no tokens"),
        (Request(4, (1, VOCAB)), {}, "token id 32 is outside the model's vocabulary 0..31"),
        (Request(4, (1,), 0), {}, "num_samples is 0"),
        (Request(4, (1,) * 120), {"max_tokens": 9}, "exceed the model's context of 128"),
        (Request(4, (1,)), {"max_tokens": 0}, "max_tokens: got 0"),
        (Request(4, (1,)), {"temperature": -1.0}, "temperature: got -1.0"),
        (Request(4, (1,)), {"top_p": 0.0}, "top_p: got 0.0"),
        (Request(4, (1,)), {"seed": -1}, "seed: got -1"),
        (Request(4, (1,)), {"stop": ("",)}, "empty stop string"),
        (Request(4, (1,)), {"stop": ("x",)}, "the engine has no tokenizer"),
        (Request(4, (1,)), {"stop_token_ids": (VOCAB,)}, "stop_token_ids: got 32"),
    ],
)
def test_what_cannot_be_generated_is_refused(
    qwen2: Family, request_: Request, params: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        qwen2.engine().generate([request_], SamplingParams(**{"max_tokens": 4, **params}))


@pytest.mark.parametrize(("limits", "message"), [([], "0 rows for 1 requests"), ([[3]], "needs 2 numbers")])
def test_limits_have_to_fit_the_requests(qwen2: Family, limits: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qwen2.engine().generate([Request(0, (1,), 2)], SamplingParams(), limits=limits)


def test_nothing_runs_without_complete_weights(qwen2: Family) -> None:
    engine = EmbeddedEngine(qwen2.folder)
    assert engine.weight_version == -1
    with pytest.raises(ValueError, match="no complete weights"):
        engine.generate([Request(0, (1,))], SamplingParams())
    engine.load(qwen2.tensors.items(), 5)
    assert engine.weight_version == 5
    with pytest.raises(ValueError, match="weight_version: got -1"):
        engine.load(qwen2.tensors.items(), -1)
    with pytest.raises(ValueError, match="not delivered"):
        engine.load(list(qwen2.tensors.items())[1:], 6)
    assert engine.weight_version == -1
    with pytest.raises(ValueError, match="no complete weights"):
        engine.logprobs([[1, 2]])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_are_named(qwen2: Family, temperature: float) -> None:
    engine = qwen2.engine()
    broken = {**qwen2.tensors, "model.norm.weight": torch.full_like(qwen2.tensors["model.norm.weight"], torch.nan)}
    engine.load(broken.items(), 8)
    with pytest.raises(ValueError, match="not finite in weight version 8"):
        engine.generate([Request(0, (1,))], SamplingParams(temperature=temperature, max_tokens=3))


def test_models_that_would_run_wrongly_are_refused(tmp_path: Path) -> None:
    config = _config("qwen2")
    config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="full attention only"):
        EmbeddedEngine(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="model_type is 'gpt2'"):
        EmbeddedEngine(tmp_path)
    with pytest.raises(ValueError, match="max_batch: got 0"):
        EmbeddedEngine(tmp_path, max_batch=0)


def test_bfloat16_keeps_the_router_bias_in_float32(tmp_path: Path) -> None:
    family = Family("deepseek_v3", tmp_path)
    engine = family.engine(dtype=torch.bfloat16)
    buffers = dict(engine.model.named_buffers())
    bias = buffers["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert torch.equal(bias, family.tensors["model.layers.1.mlp.gate.e_score_correction_bias"])
    (completion,) = engine.generate([Request(0, PROMPTS[2])], SamplingParams(max_tokens=60, seed=0))
    forced = family.forced([*PROMPTS[2], *completion.token_ids])[len(PROMPTS[2]) - 1 :]

    def median_distance(got: list[float], want: list[float]) -> float:
        return statistics.median(abs(g - w) for g, w in zip(got, want, strict=True))

    # 8 bits of mantissa; the median, because rounding sends a token to another expert now and then.
    assert median_distance(completion.logprobs, forced) < 0.1
    assert median_distance(completion.logprobs[1:], forced[:-1]) > 0.3  # negative control
