"""Checks that read whole files: they run when the configuration itself is sound, still before any process starts."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from r1mega.config import checkpoint_files
from r1mega.config.check import longest_response
from r1mega.config.choices import EngineKind, Init, Loop, Mtp, Transport
from r1mega.config.schema import Config
from r1mega.data.mixture import read_general
from r1mega.data.preference import READERS, tokenize_preferences
from r1mega.data.prompts import read_qa, tokenize_prompts
from r1mega.models import hf_fields
from r1mega.models.hf_fields import HfFields, layer_of
from r1mega.rollout.server import ROUTER_VERSION, SGLANG_VERSION
from r1mega.types import DOMAIN_OF, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PYTHON_SECONDS = 60.0  # a Python on a cold network disk takes long


def check_tokens(config: Config) -> list[str]:
    """Every prompt and example fits its limit, by the tokenizer the run will use."""
    from r1mega.loop.wire import load_tokenizer

    tokenizer = load_tokenizer(config)
    fields = hf_fields.read(config.model.hf)
    data, template = config.data, str(config.data.template)
    if config.stage.loop is Loop.sft:
        return _check_supervised(config, tokenizer, fields)
    if config.stage.loop is Loop.reward_model:
        limit = config.reward_model.max_length
        read = READERS[str(data.format)]
        found = [
            tokenize_preferences(read(path), tokenizer, template, limit) for path in (data.train, data.eval) if path
        ]
        sequences = (sequence.token_ids for part in found for example in part for sequence in example.sequences)
        return check_vocabulary(sequences, fields)
    faults = []
    files = [read_qa(path, data.question_key, data.answer_key) for path in (data.train, data.eval) if path is not None]
    if data.general is not None:
        files.append(read_general(data.general, data.question_key))
    for rows in files:
        prompts = tokenize_prompts(rows, tokenizer, template, data.max_prompt_tokens)
        faults += check_vocabulary((prompt.token_ids for prompt in prompts), fields)
        faults += check_positions(prompts, config, fields)
        faults += check_sandbox(any(prompt.tests for prompt in prompts), config)
    return faults + _check_judged(files[0], files[-1] if data.general is not None else (), config)


def _check_supervised(config: Config, tokenizer: PreTrainedTokenizerBase, fields: HfFields) -> list[str]:
    """Builds the index of the rows, or finds it. Where that fails no run directory is left that was not there."""
    from r1mega.loop.wire_supervised import index_dir, open_rows

    directory, run_dir = index_dir(config), Path(config.run.dir)
    is_new = config.sft.index_dir is None and not run_dir.exists()
    try:
        faults = check_vocabulary([[open_rows(config, tokenizer).max_token_id]], fields)
    except ValueError as error:
        faults = [str(error)]
    except OSError as error:
        faults = [f"sft.index_dir: got {directory}; must be a directory to write to ({error.strerror}); choose another"]
    if faults and is_new and run_dir.exists():
        shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):  # somebody else has put something there
            run_dir.rmdir()
    return faults


def _check_judged(train: Sequence[Prompt], general: Sequence[Prompt], config: Config) -> list[str]:
    """What reward models are to judge is there, and is not asked before they judge."""
    reward, early = config.reward, sorted({prompt.domain for prompt in train} & set(DOMAIN_OF.values()))
    faults = []
    if reward.preference_from and early:
        faults.append(
            f"data.train: got questions of domain {' and '.join(early)}; before update "
            f"reward.preference_from={reward.preference_from} no model judges them; move them to data.general, or set "
            "reward.preference_from=0"
        )
    domains = {prompt.domain for prompt in (*train, *general)}
    return faults + [
        f"reward.{name}: got {getattr(reward, name):g}; no question of data.train or data.general has domain "
        f'{domain!r}, which that model judges; give rows "domain": "{domain}", or set reward.{name}=0'
        for name, domain in DOMAIN_OF.items()
        if getattr(reward, name) and domain not in domains
    ]


def check_sandbox(has_programs: bool, config: Config) -> list[str]:
    """Where there are programs to judge, the place to run them works: on this machine, at least."""
    if not has_programs:
        return []
    from r1mega.reward.sandbox import SandboxError, open_sandbox

    try:
        open_sandbox(str(config.reward.sandbox))
    except SandboxError as error:
        return [str(error)]
    return []


def check_vocabulary(sequences: Iterable[Sequence[int]], fields: HfFields) -> list[str]:
    largest, size = max(max(token_ids) for token_ids in sequences), fields["vocab_size"]
    if largest < size:
        return []
    return [
        f"model.tokenizer: it gives token id {largest}; the model's vocab_size is {size}; "
        "use the tokenizer that belongs to the model"
    ]


def check_positions(prompts: Sequence[Prompt], config: Config, fields: HfFields) -> list[str]:
    """The longest prompt with the longest response behind it has a position for every token."""
    name, response = longest_response(config)
    positions = fields["max_position_embeddings"]
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    total = len(longest.token_ids) + response
    if total <= positions:
        return []
    return [
        f"{name}: got {response}; {longest.id} has {len(longest.token_ids)} prompt tokens, together {total}; "
        f"the model's max_position_embeddings is {positions}; lower {name} or take the longest prompts out of the file"
    ]


def check_sglang(config: Config) -> list[str]:
    """The environment of the servers holds the SGLang that they are spoken to as, and the router asked for."""
    if config.rollout.engine is not EngineKind.sglang or config.stage.loop not in (Loop.rl, Loop.reject):
        return []
    python = config.sglang.python
    wanted = {"sglang": ("SGLang", SGLANG_VERSION)}
    if config.sglang.router:
        wanted["sglang-router"] = ("sglang-router", ROUTER_VERSION)
    if config.sglang.transport is Transport.ipc:
        wanted["torch"] = ("torch", version("torch"))
    asks = "; ".join(f"print(version({package!r}))" for package in wanted)
    program = f"from importlib.metadata import version; {asks}"
    try:
        asked = subprocess.run([python, "-c", program], capture_output=True, text=True, timeout=_PYTHON_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"sglang.python: got {python}; cannot be run ({error}); name the Python of SGLang's environment"]
    found = asked.stdout.split()
    faults = []
    for i, (name, expected) in enumerate(wanted.values()):
        if i < len(found) and name == "torch" and release(found[i]) == release(expected):
            continue  # handles of memory are pickled in a form that belongs to a release
        if i >= len(found) or found[i] != expected:
            faults.append(
                f"sglang.python: {python} has {name} {found[i] if i < len(found) else 'none'}; must have {expected}, "
                "whose interface is the one used; install it there (without a GPU: make sglang-cpu)"
            )
            break  # what comes after a missing package was not asked for
    return faults


def release(version: str) -> list[str]:
    """Major and minor number of a version."""
    return version.split(".")[:2]


def check_tensors(config: Config) -> list[str]:
    """The checkpoint holds every tensor of the model's table, in its shape, and no others."""
    from r1mega.models.tables import slots_of
    from r1mega.models.tables.common import SCORE

    if config.model.init is not Init.load:
        return []
    if checkpoint_files.is_megatron(Path(config.model.hf)):
        from r1mega.conversion.megatron_source import MegatronSource  # torch's checkpoints take seconds to import

        MegatronSource(config.model.hf)
        return []
    scores = config.stage.loop is Loop.reward_model
    drops = config.model.mtp is Mtp.drop or scores
    fields = hf_fields.read(config.model.hf, drop_mtp=drops)
    is_base = scores and not fields.has_score
    if scores:
        fields = fields.as_reward_model()
    expected = {tensor.name: tensor.shape for slot in slots_of(fields) for tensor in (*slot.tensors, *slot.aliases)}
    found = checkpoint_files.tensor_shapes(fields.path.parent)
    if drops:
        found = {name: shape for name, shape in found.items() if layer_of(name) < fields["num_hidden_layers"]}
    if is_base:
        del expected[SCORE]  # made anew
        found.pop("lm_head.weight", None)
    if fields["tie_word_embeddings"]:
        found.pop("lm_head.weight", None)  # some writers store the tied table twice
    faults = []
    for name in expected:
        if name not in found:
            faults.append(
                f"model.hf: {config.model.hf} lacks tensor {name}; config.json asks for it; restore the checkpoint"
            )
        elif found[name] != expected[name]:
            faults.append(
                f"model.hf: {name}: got shape {list(found[name])}; config.json makes it {list(expected[name])}; "
                "use the config.json that belongs to these weights"
            )
    for name in sorted(set(found) - set(expected)):
        faults.append(f"model.hf: {config.model.hf} holds tensor {name}; a {fields.family} model has none of that name")
    shown = 10
    return faults[:shown] + (
        [f"model.hf: {len(faults) - shown} more tensors like these"] if len(faults) > shown else []
    )
