"""All that is checked before any process starts: the configuration, its files, and whether they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from r1mega.config.check import check, longest_response
from r1mega.config.check_memory import check_recomputed_layers
from r1mega.config.check_reward_model import MODELS
from r1mega.config.check_versions import check_versions
from r1mega.config.checkpoint_files import is_megatron, read_json_object
from r1mega.config.choices import GENERATING_LOOPS, DataFormat, Loop
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.data.jsonl import read_rows
from r1mega.data.mixture import read_general
from r1mega.data.preference import READERS
from r1mega.data.prompts import read_qa
from r1mega.data.sft import iter_sft
from r1mega.data.sft_index import is_indexed
from r1mega.launch.check_card import card_fields, check_card
from r1mega.launch.check_disk import check_disk
from r1mega.launch.late_checks import check_sglang, check_tensors, check_tokens
from r1mega.models import fp8, hf_fields
from r1mega.models.hf_fields import HfFields
from r1mega.parallel.layout import Layout

# Checks that need sound input (they tokenize, for example) run after all others have passed. Each returns its faults,
# or raises a ValueError whose message is one.
Check = Callable[[Config], Sequence[Fault | str]]
LATE_CHECKS: tuple[Check, ...] = (check_tensors, check_tokens, check_sglang)


def require(config: Config, late_checks: Sequence[Check] = LATE_CHECKS, *, also: Iterable[Fault] = ()) -> None:
    """Raises ConfigError with every fault found, those that the caller has found among them."""
    faults = [*also, *find(config)]
    if not faults:
        faults += [fault for late_check in late_checks for fault in _faults_of(late_check, config)]
    if faults:
        raise ConfigError(faults)


def find(config: Config, *, here: bool = True) -> list[Fault | str]:
    """Every fault that can be found without reading whole files, of any stage.

    With `here` false, of a run that would be started somewhere else: this machine's files, packages and disk are not
    asked, and the model is that of `model.card` where there is one.
    """
    faults: list[Fault | str] = list(check(config, here=here))
    if here:
        faults += check_versions(config)
    sizes_are_sound = all(size >= 1 for size in config.parallel.sizes().values() if isinstance(size, int))
    directory = Path(config.model.hf) if config.model.hf and Path(config.model.hf).is_dir() else None
    fields: HfFields | None = None
    if directory is not None and (here or config.model.card is None):
        fields = _read_model(directory, faults)
        faults += check_card(config, fields)
    else:
        faults += check_card(config, None)
        fields = card_fields(config)
    if fields is not None:
        faults += _check_model(config, fields, sizes_are_sound)
    if here and fields is not None and config.run.dir:
        faults += check_disk(config, fields)
    return faults + (_check_rows(config) if here else [])


def _check_rows(config: Config) -> list[str]:
    data = config.data
    if config.stage.loop is Loop.reward_model:
        return _check_preferences(config)
    if data.format is DataFormat.sft:
        return _check_supervised(config)
    read_questions: Callable[[str], object] = partial(
        read_qa, question_key=data.question_key, answer_key=data.answer_key
    )
    if config.stage.loop is Loop.reject:  # the domain says whether there is an answer: launch.rejection reads the rows
        read_questions = partial(read_rows, text_keys=(data.question_key,))
    files = [("data.train", data.train, read_questions)]
    if config.stage.loop is Loop.rl:
        read_others = partial(read_general, question_key=data.question_key)
        files += [("data.eval", data.eval, read_questions), ("data.general", data.general, read_others)]
    faults = []
    for field, path, read in files:
        try:
            if path:
                read(path)
        except (ValueError, OSError) as error:
            faults.append(f"{field}: {error}; correct the file or {field}, or set data.question_key, data.answer_key")
    return faults


def _check_supervised(config: Config) -> list[str]:
    """Every row has its keys. An index of the file as it is says so too."""
    path, known = config.data.train, config.sft.index_dir or f"{config.run.dir}/index"
    try:
        if path and not (Path(path).is_file() and is_indexed(path, known)):
            for _ in iter_sft(path):
                pass
    except (ValueError, OSError) as error:
        return [f"data.train: {error}; correct the file or data.train"]
    return []


def _check_preferences(config: Config) -> list[str]:
    data, faults = config.data, []
    read = READERS.get(str(data.format))
    for field, path in (("data.train", data.train), ("data.eval", data.eval)):
        try:
            if path and read is not None:
                read(path)
        except (ValueError, OSError) as error:
            faults.append(f"{field}: {error}; correct the file or {field}")
    return faults


def _check_score(config: Config, fields: HfFields) -> list[Fault]:
    """A reward model is trained as one and as nothing else, and in RL asked where it can read the policy's tokens."""
    faults: list[Fault] = []
    hf, is_training = config.model.hf, config.stage.loop is Loop.reward_model
    if fields.has_score and not is_training:
        constraint = f"is a reward model, which writes nothing; stage.loop={config.stage.loop} needs a language model"
        faults.append(Fault("model.hf", hf, constraint, "name the checkpoint of a language model"))
    if is_training and not fields.has_score and is_megatron(Path(hf)):
        constraint = "holds a language model in Megatron's format; a new score is put to a Hugging Face checkpoint"
        remedy = "convert it: python tools/convert_checkpoint.py megatron-to-hf"
        faults.append(Fault("model.hf", hf, constraint, remedy))
    for name in MODELS if config.stage.loop is Loop.rl else ():
        path, field = getattr(config.reward, f"{name}_model"), f"reward.{name}_model"
        if not getattr(config.reward, name) or path is None or not Path(path).is_dir():
            continue
        try:
            found = hf_fields.read(path)
        except ValueError as error:
            faults += [f"{field}: {line}" for line in str(error).splitlines()]
            continue
        if not found.has_score:
            constraint = "its config.json is not one of a reward model (architectures: *ForSequenceClassification)"
            faults.append(Fault(field, path, constraint, "train one with stage=reward_model_helpful or _safety"))
        elif found["vocab_size"] != fields["vocab_size"]:
            constraint = f"its vocab_size is {found['vocab_size']}, model.hf's {fields['vocab_size']}; it reads the "
            faults.append(Fault(field, path, constraint + "policy's tokens", "train it from a model of that tokenizer"))
        else:
            faults += Layout.of(**config.parallel.sizes()).problems(found.shape())
    return faults


def _faults_of(late_check: Check, config: Config) -> Sequence[Fault | str]:
    try:
        return late_check(config)
    except ValueError as error:
        return [str(error)]


def _read_model(directory: Path, faults: list[Fault | str]) -> HfFields | None:
    """The fields of a checkpoint; None where they cannot be had, and why is added to `faults`."""
    path = directory / "config.json"
    try:
        read_json_object(path)
    except ValueError as error:
        faults.append(Fault("model.hf", f"{path}: {error}", "must hold a model's config.json", "correct model.hf"))
        return None
    try:
        return hf_fields.read(directory)
    except ValueError as error:
        faults += [f"model.hf: {line}" for line in str(error).splitlines()]
        return None


def _check_model(config: Config, fields: HfFields, sizes_are_sound: bool) -> list[Fault | str]:
    layout = Layout.of(**config.parallel.sizes())
    faults: list[Fault | str] = list(layout.problems(fields.shape())) if sizes_are_sound else []
    if not faults:
        faults += check_recomputed_layers(config, layout.chunk_layers(fields["num_hidden_layers"]))
    if config.precision.fp8 and not faults:
        faults += fp8.problems(fields, layout)
    if sizes_are_sound:
        faults += _check_score(config, fields)
    if config.rollout.router_replay and not fields.moe_layers and config.stage.loop in GENERATING_LOOPS:
        constraint = f"a {fields.family} model of these layers has no experts to replay the choice of"
        faults.append(Fault("rollout.router_replay", "true", constraint, "set it to false"))
    # Prompts count towards the model's positions too, but their true lengths are known only once they are tokenized.
    field, tokens = longest_response(config)
    positions = fields["max_position_embeddings"]
    if tokens > positions:
        constraint = f"must be at most max_position_embeddings={positions}"
        faults.append(Fault(field, str(tokens), constraint, "lower it or use a model for longer texts"))
    return faults
