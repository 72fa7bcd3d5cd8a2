"""A process reward model as an inference tool: it scores each step of a response, and reranks responses by that.

DeepSeek-R1 tried it and gave it up for training (arXiv 2501.12948v1, section 4.2): steps are hard to define, their
labels hard to get, and it is hacked. Reranking the N best answers is what it did help with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from r1mega.config.checkpoint_files import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AGGREGATES: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "prod": math.prod,
    "mean": lambda scores: sum(scores) / len(scores),
}
SEPARATOR = "\n\n"


def split_steps(response: str, separator: str = SEPARATOR) -> list[str]:
    """The steps of a response, each with the separator that ends it; together they are the response."""
    if not separator:
        raise ValueError("separator: got an empty text; give what ends a step, such as a blank line or </step>")
    parts = response.split(separator)
    steps = [part + separator for part in parts[:-1]] + [parts[-1]]
    # A step of nothing but separators belongs to the one before.
    merged: list[str] = []
    for step in steps:
        if merged and not step.replace(separator, "").strip():
            merged[-1] += step
        elif step:
            merged.append(step)
    return merged


class ProcessRewardModel:
    """A Hugging Face checkpoint with a head over tokens: ...ForTokenClassification, or the scalar head of
    ...ForSequenceClassification.

    The score of a step is the chance of `good_label` after its last token: softmax over labels, or, of a single
    number, its sigmoid.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        good_label: int = -1,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        """Raises ValueError where the checkpoint has no such head, or no such label."""
        from transformers import AutoTokenizer

        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
        self._model, self._head_of_sequence = _load(Path(directory), dtype, device)
        self._label, labels = good_label, self._model.config.num_labels
        if not -labels <= good_label < labels:
            raise ValueError(f"good_label: got {good_label}; the model has {labels} labels")

    @torch.inference_mode()
    def step_scores(self, prompt: str, steps: Sequence[str]) -> list[float]:
        """A score between 0 and 1 for each step, in one forward pass. Raises ValueError where there is no step."""
        if not steps:
            raise ValueError("a response without any step has no scores")
        token_ids = list(self.tokenizer(prompt)["input_ids"])
        ends = []
        for step in steps:
            token_ids += self.tokenizer(step, add_special_tokens=False)["input_ids"]
            ends.append(len(token_ids) - 1)
        longest = getattr(self._model.config, "max_position_embeddings", None) or len(token_ids)
        if len(token_ids) > longest:
            raise ValueError(f"prompt and response have {len(token_ids)} tokens; the model reads {longest}")
        inputs = torch.tensor([token_ids], device=self._model.device)
        if self._head_of_sequence:
            hidden = self._model.base_model(input_ids=inputs).last_hidden_state
            logits_TL = self._model.score(hidden)[0]
        else:
            logits_TL = self._model(input_ids=inputs).logits[0]
        logits_SL = logits_TL[torch.tensor(ends, device=logits_TL.device)].float()
        if logits_SL.shape[1] == 1:
            return logits_SL[:, 0].sigmoid().tolist()
        return logits_SL.softmax(-1)[:, self._label].tolist()


def rerank(
    model: ProcessRewardModel, prompt: str, responses: Sequence[str], *, aggregate: str = "min",
    separator: str = SEPARATOR,
) -> tuple[int, list[float], list[list[float]]]:  # fmt: skip
    """(the best response, the score of each, the scores of its steps). A response of nothing has the score 0.

    Of equal ones the first is the best. Raises ValueError for an unknown aggregate or no responses.
    """
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate: got {aggregate!r}; must be one of {', '.join(AGGREGATES)}")
    if not responses:
        raise ValueError("no responses to rerank")
    steps = [split_steps(response, separator) for response in responses]
    by_step = [model.step_scores(prompt, own) if own else [] for own in steps]
    scores = [AGGREGATES[aggregate](own) if own else 0.0 for own in by_step]
    return max(range(len(scores)), key=lambda i: scores[i]), scores, by_step


def _load(directory: Path, dtype: torch.dtype, device: str) -> tuple[PreTrainedModel, bool]:
    """The model, and whether its head is that of a sequence."""
    import transformers

    named = read_json_object(directory / "config.json").get("architectures") or ["(none)"]
    kinds = {
        "ForTokenClassification": transformers.AutoModelForTokenClassification,
        "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    }
    kind = next((kind for kind in kinds if named[0].endswith(kind)), None)
    if kind is None:
        raise ValueError(f"{directory}: got the architecture {named[0]}; must be one of ...{', ...'.join(kinds)}")
    model = kinds[kind].from_pretrained(directory, dtype=dtype).to(device).eval()
    is_sequence = kind == "ForSequenceClassification"
    if is_sequence and not hasattr(model, "score"):
        raise ValueError(f"{directory}: {named[0]} has no linear head `score` that could be asked for each token")
    return model, is_sequence
