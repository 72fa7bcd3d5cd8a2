"""Step scores of tiny models with both kinds of heads, and reranking by them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForSequenceClassification, Qwen2ForTokenClassification

from r1mega.rollout.process_reward import AGGREGATES, ProcessRewardModel, rerank, split_steps

REPO = Path(__file__).resolve().parents[3]


def tokenizer():
    """One token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.fixture(scope="module", params=[(Qwen2ForTokenClassification, 2), (Qwen2ForSequenceClassification, 1)])
def judge(request, tmp_path_factory) -> Path:
    """A model of no layers, whose score after a token is high for `!` and low for all else: the last token of a step
    decides."""
    kind, labels = request.param
    path = tmp_path_factory.mktemp("judge")
    made = tokenizer()
    config = Qwen2Config(
        vocab_size=256, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_labels=labels, max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_() if "norm" not in name else parameter.fill_(1.0)
        embedding = model.get_input_embeddings().weight
        embedding[:, 0] = 1.0
        good = made("!")["input_ids"][0]
        embedding[good] = torch.tensor([0.0, 1.0] + [0.0] * 6)
        # RMSNorm makes the one entry sqrt(8): logits of +-2 x sqrt(8) / sqrt(8) after `!` and after all else.
        model.score.weight[-1, :2] = torch.tensor([-2.0, 2.0]) / math.sqrt(8)
    model.save_pretrained(path)
    made.save_pretrained(path)
    return path


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_steps_are_the_response_in_pieces() -> None:
    assert split_steps("a\n\nb\n\nc") == ["a\n\n", "b\n\n", "c"]
    assert split_steps("a\n\n\n\nb\n\n") == ["a\n\n\n\n", "b\n\n"]
    assert split_steps("a</step>b", "</step>") == ["a</step>", "b"]
    assert split_steps("") == []
    with pytest.raises(ValueError, match="separator"):
        split_steps("a", "")


def test_a_step_has_the_score_after_its_last_token(judge: Path) -> None:
    model = ProcessRewardModel(judge)
    good, bad = sigmoid(2.0), sigmoid(-2.0)
    assert model.step_scores("q", ["one!", "two", "!!x", "x!"]) == pytest.approx([good, bad, bad, good], abs=1e-5)
    with pytest.raises(ValueError, match="without any step"):
        model.step_scores("q", [])
    with pytest.raises(ValueError, match="the model reads 256"):
        model.step_scores("q", ["x" * 300])


def test_the_aggregates_by_hand() -> None:
    assert [AGGREGATES[name]([0.5, 0.8, 0.2]) for name in ("min", "prod", "mean")] == pytest.approx([0.2, 0.08, 0.5])


def test_reranking_finds_the_response_of_good_steps_and_how_depends_on_the_aggregate(judge: Path) -> None:
    model = ProcessRewardModel(judge)
    responses = ["", "a!|b|c!|d!", "a!|b!", "a|b|c"]
    best, scores, steps = rerank(model, "q", responses, separator="|", aggregate="min")
    # The separator ends a step, so only a last step ends in `!`: a! is not good, as a!| is what is scored.
    assert [len(own) for own in steps] == [0, 4, 2, 3] and scores[0] == 0.0
    assert best == 1  # all have a bad step, and the first of equal ones is the best
    best, scores, _ = rerank(model, "q", responses, separator="|", aggregate="mean")
    good, bad = sigmoid(2.0), sigmoid(-2.0)
    assert scores[1:] == pytest.approx([(3 * bad + good) / 4, (bad + good) / 2, bad], abs=1e-5)
    assert best == 2
    best, _, _ = rerank(model, "q", ["a!b|c", "a!!", "x"], separator="|", aggregate="prod")
    assert best == 1
    with pytest.raises(ValueError, match="must be one of min, prod, mean"):
        rerank(model, "q", responses, aggregate="max")


def test_other_heads_and_labels_are_refused(judge: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="good_label: got 5"):
        ProcessRewardModel(judge, good_label=5)
    made = tokenizer()
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(ValueError, match="got the architecture Qwen2ForCausalLM; must be one of"):
        ProcessRewardModel(tmp_path)


def test_the_tool(judge: Path, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "q", "responses": ["no", "yes!"]}) + "\n")
    command = [sys.executable, str(REPO / "tools" / "rerank_prm.py"), "--prm", str(judge), "--input"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert (line["best"], line["response"], len(line["scores"])) == (1, "yes!", 2)
    path.write_text('{"question": "q", "responses": []}\n')
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 2 and "'responses' must be a list of texts" in done.stderr
