"""A rejection sampling on this machine: check, make the run directory, questions and weights where workers look.

Its engines and processes are started as those of an evaluation: see r1mega.launch.local.
"""

from __future__ import annotations

import json
from pathlib import Path

from r1mega.config import checkpoint_files
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.curation import questions as questioning
from r1mega.curation.questions import Question
from r1mega.launch import late_checks, preflight, resume, rundir
from r1mega.launch.evaluation import CONTENT_FILE, convert_weights, require_same
from r1mega.loop import wire_reject
from r1mega.loop.wire_evaluate import fingerprint
from r1mega.models import hf_fields


def prepare(config: Config) -> Path:
    """Check everything, make or reopen the run directory; returns the path of the configuration.

    Raises ConfigError with every fault found, before anything is written.
    """
    questions = _required(config)
    resume.prepare(config)
    directory = Path(config.run.dir)
    is_converted = checkpoint_files.is_megatron(Path(config.model.hf))
    weights = None if is_converted else fingerprint(Path(config.model.hf))
    content = {"questions": questioning.digest(questions), "weights": weights}
    path = directory / CONTENT_FILE
    if path.exists():
        named = {"questions": ("data.train", config.data.train), "weights": ("model.hf", config.model.hf)}
        require_same(json.loads(path.read_text("utf-8")), content, named, config.run.dir)
    config_path = rundir.create(config)
    questioning.write_questions(directory / wire_reject.QUESTIONS_FILE, questions)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    # What an earlier start has curated may be of other settings: nobody shall take it for this one's.
    for name in (wire_reject.REPORT_FILE, wire_reject.CURATED_FILE):
        (directory / name).unlink(missing_ok=True)
    if is_converted:
        convert_weights(config)
    return config_path


def _required(config: Config) -> list[Question]:
    """The questions of a configuration without a fault. Raises ConfigError."""
    faults: list[Fault | str] = list(preflight.find(config))
    if faults:
        raise ConfigError(faults)
    try:
        questions = wire_reject.questions_of(config)
        faults = [*late_checks.check_tensors(config), *late_checks.check_sglang(config)]
        faults += _prompt_faults(config, questions)
    except ValueError as error:
        faults = [str(error)]
    if faults:
        raise ConfigError(faults)
    return questions


def _prompt_faults(config: Config, questions: list[Question]) -> list[str]:
    """Every prompt fits, what judges it is there, and there is one to ask."""
    from r1mega.loop.wire import load_tokenizer

    tokenizer, fields = load_tokenizer(config), hf_fields.read(config.model.hf)
    asked = [prompt for prompt in wire_reject.prompts_of(config, questions, tokenizer) if prompt.token_ids]
    if not asked:
        reasons = ", ".join(sorted({one.left_out for one in questions}))
        return [f"data.train: got {config.data.train}; no question of it is asked: all are {reasons}; give others"]
    faults = late_checks.check_vocabulary((prompt.token_ids for prompt in asked), fields)
    faults += late_checks.check_positions(asked, config, fields)
    faults += late_checks.check_sandbox(any(prompt.tests for prompt in asked), config)
    alone = [] if config.curate.unjudged else wire_reject.unjudged(config, questions)
    if alone:
        first = alone[0].prompt
        faults.append(
            f"curate.unjudged: got false; {len(alone)} questions, {first.id} (domain {first.domain}) the first, are "
            "decided by no rule, and by no judge that is given their answer; set reward.judge, reward.judge_domains "
            "and answers, or keep whatever is said with curate.unjudged=true"
        )
    return faults
