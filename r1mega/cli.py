"""The command line, and the only file that imports hydra: it composes here, all other processes read the result."""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from omegaconf import DictConfig

    from r1mega.config.schema import Config

FAILED, USAGE_ERROR = 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a fault in what was asked, else what the run ended with."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough; what is still buffered must not be flushed into the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(), flush=True)
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"r1mega: unknown command {command!r}; the commands are: {', '.join(COMMANDS)}", file=sys.stderr)
        return USAGE_ERROR
    return COMMANDS[command](rest)


def train(arguments: Sequence[str]) -> int:
    """Train a model as configured: supervised fine-tuning or pure RL."""
    if "-h" in arguments or "--help" in arguments:
        print(_train_help(), flush=True)
        return 0
    return _for_each_composed("train", arguments, lambda config: _launcher("local").run(config))


def plan(arguments: Sequence[str]) -> int:
    """Say what a run would take: memory of every rank, time, disk; `plan search` compares layouts."""
    if "-h" in arguments or "--help" in arguments:
        print(textwrap.dedent(PLAN_HELP), flush=True)
        return 0
    if arguments and arguments[0] == "search":
        return _for_each_composed("plan", arguments[1:], lambda config: _planner("search").search(config))
    return _for_each_composed("plan", arguments, _plan_one)


def _plan_one(config: Config) -> int:
    """What the launcher would say of the run, were it started somewhere else, belongs to a plan's faults."""
    return _planner("run").plan(config, _launcher("preflight").find(config, here=False))


PLAN_HELP = """\
    usage: r1mega plan [search] [GROUP=OPTION ...] [SECTION.FIELD=VALUE ...] [HYDRA FLAGS]

    Works out, without a GPU, weights or data, what the run of these options would take: parameters and bytes of every
    rank (from Megatron itself, in an imagined world), memory of each phase at its worst instant against cluster.*,
    time, disk, and what would make it fit. The model's shape is model.hf's config.json, or that of model.card. What
    cannot be worked out is assumed in the section `plan` (`r1mega train --help` lists it).
      r1mega plan experiment=r1_zero            every stage of the recipe, on the cluster that it ships with
      r1mega plan model.card=deepseek_v3_671b cluster=h100_64x8 parallel.pp=16 parallel.ep=32 ...
      r1mega plan ... plan.format=json          one JSON document on standard output
      r1mega plan search ...                    layouts for this model and cluster, the fastest that fit first
    Exit code 0 where it fits, 1 where it does not, 2 where it cannot be (with every reason)."""


def _planner(name: str) -> ModuleType:
    return importlib.import_module(f"r1mega.plan.{name}")


def submit(arguments: Sequence[str]) -> int:
    """Queue a run as a Slurm job, checked as `train` checks it; --dry-run prints the job's script instead."""
    if "-h" in arguments or "--help" in arguments:
        print(textwrap.dedent(SUBMIT_HELP), flush=True)
        return 0
    rest = [argument for argument in arguments if argument != "--dry-run"]
    dry_run = len(rest) < len(arguments)
    return _for_each_composed("submit", rest, lambda config: _launcher("submit").run(config, dry_run=dry_run))


SUBMIT_HELP = """\
    usage: r1mega submit [--dry-run] [GROUP=OPTION ...] [SECTION.FIELD=VALUE ...] [HYDRA FLAGS]

    Checks everything as `r1mega train` does, makes the run directory and queues one Slurm job. For example:
      r1mega submit experiment=r1_zero_gsm8k cluster=h100_8x8 model.hf=DIR data.train=FILE.jsonl checkpoint.every=16 \\
          slurm.partition=gpu slurm.time_limit='"24:00:00"'
    --dry-run prints the script, and neither writes nor queues anything. `run.resume=true` goes on with a run whose job
    has ended. The fields under `slurm.` are those of `r1mega train --help`; docs/cluster.md tells the rest."""


def pipeline(arguments: Sequence[str]) -> int:
    """Run all stages of a recipe as one, or go on with them; say how far they are, plan or submit them."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        from r1mega.config.registry import options

        print(textwrap.dedent(PIPELINE_HELP))
        print("\n".join(f"  {name:<14}{about}".rstrip() for name, about in options().get("pipeline", {}).items()))
        return 0 if arguments else USAGE_ERROR
    rest = [argument for argument in arguments if argument != "--dry-run"]
    return _for_each_composed(
        "pipeline", rest, lambda config: _pipeline(config, rest, dry_run=len(rest) < len(arguments))
    )


def _pipeline(config: Config, arguments: Sequence[str], *, dry_run: bool) -> int:
    from hydra.core.hydra_config import HydraConfig

    runs = importlib.import_module("r1mega.pipeline.run")
    return runs.run(config, runs.Asked(list(HydraConfig.get().overrides.task), _compose_stage, arguments, dry_run))


def _compose_stage(overrides: Sequence[str]) -> Config:
    """What `r1mega train` or `evaluate` would compose from these. Raises ConfigError where that cannot be."""
    from hydra import compose
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from r1mega.config.faults import ConfigError
    from r1mega.config.io import typed
    from r1mega.config.registry import suggestions

    try:
        return typed(compose("config", list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        near = [f"; {text}: did you mean {' or '.join(found)}?" for text in overrides if (found := suggestions(text))]
        raise ConfigError([f"{str(error).splitlines()[0]}{''.join(near)}"]) from error


PIPELINE_HELP = """\
    usage: r1mega pipeline pipeline=NAME run.dir=DIR [pipeline.FIELD=VALUE ...] [--dry-run]

    Runs the stages of conf/pipeline/NAME.yaml one after the other, each as a process with its run directory
    DIR/stages/STAGE. The same command goes on where it was stopped or killed: what is done is skipped, and what changed
    is run again with what depends on it. DIR receives report.json and lineage.json.
      r1mega pipeline ... pipeline.only=STAGE      this stage alone
      r1mega pipeline ... pipeline.status=true     what is done, what has to be run, and why
      r1mega pipeline ... pipeline.seeds=[0,1,2]   all of it with each seed
      r1mega pipeline ... pipeline.plan=true       what each stage would take, as `r1mega plan`
      r1mega pipeline ... --dry-run                the chain of Slurm jobs; pipeline.submit=true queues it
      r1mega pipeline ... pipeline.sources.NAME.path=PATH      what no stage makes
    Exit code: 0, 2 for a fault in what was asked, 75 where it was asked to stop (SIGUSR1), else the failed stage's.
    docs/pipeline.md tells the rest; `r1mega train --help` lists the fields.

    pipelines:"""


def doctor(arguments: Sequence[str]) -> int:
    """Say what this machine can run, what is missing, what that costs and how to get it."""
    return _launcher("doctor").main(arguments)


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluate a model on a benchmark as the papers do: pass@1, pass@k, cons@k, beside the paper's figures."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(_evaluate_help(), flush=True)
        return 0 if arguments else USAGE_ERROR
    return _for_each_composed(
        "evaluate", ["stage=evaluate", *arguments], lambda config: _launcher("local").evaluate(config)
    )


def _for_each_composed(command: str, arguments: Sequence[str], action: Callable[[Config], int]) -> int:
    """Compose a configuration from the arguments and act on it, several times in a sweep; the exit code."""
    import hydra

    from r1mega.config.registry import conf_dir

    foreign = [argument for argument in arguments if argument.lstrip("+~").startswith(("pipeline=", "pipeline."))]
    if foreign and command != "pipeline":
        print(f"r1mega {command}: got {foreign[0]}; r1mega pipeline alone reads it; leave it out", file=sys.stderr)
        return USAGE_ERROR
    register_schema()
    codes: list[int] = []
    is_composed = False

    def job(composed: DictConfig) -> None:
        nonlocal is_composed
        is_composed = True
        code = _run_job(composed, action)
        codes.append(code)
        if code >= 128:  # ended by a signal: the jobs of a sweep that have not begun shall not begin
            raise SystemExit(code)

    sys.argv = [f"r1mega {command}", *arguments]
    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(job)()
    except SystemExit as end:
        if is_composed:  # without a code: something has failed that is no fault of what was asked; Hydra has said what
            return codes[-1] if codes else FAILED
        return _composition_failed(arguments) if end.code else 0
    return next((code for code in codes if code), 0)


def _launcher(name: str) -> ModuleType:
    """A module of r1mega.launch, imported when its command runs and not before."""
    return importlib.import_module(f"r1mega.launch.{name}")


def replay(arguments: Sequence[str]) -> int:
    """Do one update of a past run again and compare it with what was recorded."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        print(textwrap.dedent(REPLAY_HELP), flush=True)
        return 0 if arguments else USAGE_ERROR
    run_dir, *rest = arguments
    numbers = dict(part.partition("=")[::2] for part in rest)
    wrong = [part for part in rest if not part.partition("=")[2].isdigit()]
    if wrong or set(numbers) != {"round", "update"}:
        got = " ".join(wrong or rest) or "nothing"
        print(f"r1mega replay: got {got}; must be round=K update=J; see r1mega replay --help", file=sys.stderr)
        return USAGE_ERROR
    from r1mega.config.faults import ConfigError

    try:
        return _launcher("local").replay(Path(run_dir), int(numbers["round"]), int(numbers["update"]))
    except ConfigError as error:
        print(f"r1mega: {error}", file=sys.stderr)
        return USAGE_ERROR


REPLAY_HELP = """\
    usage: r1mega replay RUN_DIR round=K update=J

    Starts the training processes of the run in RUN_DIR without engines, goes from the newest checkpoint before round K
    (or from the run's start) through the recorded rounds, and compares loss, gradient norm and weight digest of update
    J with what the run recorded. `update` counts optimizer steps from the run's start, as metrics.jsonl does. Prints
    one JSON line; exit code 0 where all are identical, 1 where not, 2 where the records do not go so far."""


def report(arguments: Sequence[str]) -> int:
    """Draw the page of a pipeline: findings, curves, the stage table, samples, lineage, in one HTML file."""
    return importlib.import_module("r1mega.pipeline.page.document").main(arguments)


def register_schema() -> None:
    """Make the dataclasses known to Hydra as `schema`, which conf/config.yaml starts from."""
    from hydra.core.config_store import ConfigStore

    from r1mega.config.schema import Config

    ConfigStore.instance().store(name="schema", node=Config)


def _run_job(composed: DictConfig, action: Callable[[Config], int]) -> int:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from r1mega.config.faults import ConfigError
    from r1mega.config.io import typed

    hydra_config = HydraConfig.get()
    chosen = any(override.startswith("run.dir=") for override in hydra_config.overrides.task)
    if hydra_config.mode is RunMode.MULTIRUN and not chosen:
        # The jobs of a sweep live side by side in the sweep's directory.
        composed = OmegaConf.merge(composed, {"run": {"dir": hydra_config.runtime.output_dir}})
    try:
        return action(typed(composed))
    except ConfigError as error:
        print(f"r1mega: {error}", file=sys.stderr)
        return USAGE_ERROR


def _composition_failed(arguments: Sequence[str]) -> int:
    """Hydra has said what is wrong; add the nearest names that would have been right."""
    from r1mega.config.registry import suggestions

    for argument in arguments:
        near = [] if argument.startswith("-") else suggestions(argument)
        if near:
            print(f"r1mega: {argument.partition('=')[0]}: did you mean {' or '.join(near)}?", file=sys.stderr)
    print("r1mega: `r1mega train --help` lists every group, option and field", file=sys.stderr)
    return USAGE_ERROR


def _overview() -> str:
    lines = [f"  {name:<10}{(function.__doc__ or '').splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(
        [
            "usage: r1mega COMMAND [...]",
            "",
            "Pure-RL reasoning training, the DeepSeek-R1 way, on Megatron-Core.",
            "",
            "commands:",
            *lines,
            "",
            "`r1mega COMMAND --help` says more.",
        ]
    )


def _train_help() -> str:
    from r1mega.config.registry import fields, options

    head = """\
        usage: r1mega train [GROUP=OPTION ...] [SECTION.FIELD=VALUE ...] [HYDRA FLAGS]

        Checks everything first, then starts the training processes. For example:
          r1mega train experiment=toy run.dir=runs/mine
          r1mega train experiment=r1_zero_gsm8k model.hf=DIR data.train=FILE.jsonl
          r1mega train experiment=toy --cfg job                     show the composed configuration, run nothing
          r1mega train experiment=toy run.seed=0,1,2 --multirun     one run after the other
        `r1mega train --hydra-help` lists Hydra's flags.

        groups:"""
    lines = [textwrap.dedent(head)]
    for group, names in options().items():
        lines += [f"  {group}", *(f"    {f'{group}={name}':<28} {about}".rstrip() for name, about in names.items())]
    lines.append("\nfields (default in brackets, [-] where the chosen option or you must give it):")
    for entry in fields():
        lines.append(f"  {entry.path}  {entry.type}  [{'-' if entry.default is None else entry.default}]")
        lines += textwrap.wrap(entry.doc, width=114, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def _evaluate_help() -> str:
    from r1mega.config.registry import fields, options

    head = """\
        usage: r1mega evaluate model.hf=DIR benchmark=NAME [benchmark.data=FILE] [GROUP=OPTION ...] [FIELD=VALUE ...]

        DIR is a Hugging Face checkpoint, or a training checkpoint RUN_DIR/checkpoints/update-N. For example:
          r1mega evaluate model.hf=DIR benchmark=aime2024 benchmark.data=aime2024.jsonl run.dir=runs/aime
          r1mega evaluate model.hf=DIR benchmark=math500 rollout=sglang device=cuda precision=bf16 sglang.tp=8
          r1mega evaluate ... run.dir=runs/aime run.resume=true      go on with one that was stopped
        Every sample is kept in samples.jsonl, the figures in report.json. docs/evaluation.md says how they are made.

        benchmarks:"""
    lines = [textwrap.dedent(head)]
    lines += [f"  {name:<22}{about}".rstrip() for name, about in options().get("benchmark", {}).items()]
    lines.append("\nfields (default in brackets); `r1mega train --help` lists those of other sections:")
    for entry in fields():
        if entry.path.startswith("benchmark."):
            lines.append(f"  {entry.path}  {entry.type}  [{'-' if entry.default is None else entry.default}]")
            lines += textwrap.wrap(entry.doc, width=114, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "submit": submit,
    "evaluate": evaluate,
    "replay": replay,
    "plan": plan,
    "pipeline": pipeline,
    "report": report,
    "doctor": doctor,
}


if __name__ == "__main__":
    sys.exit(main())
