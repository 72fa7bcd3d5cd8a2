"""A stage as it runs: its command, its key, and what its directory says of it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from r1mega.config.check_pipeline import PLACE, outputs_of, stage_before
from r1mega.config.choices import StageRun
from r1mega.config.registry import conf_dir
from r1mega.config.schema import Config
from r1mega.config.schema_pipeline import PipelineConfig, PipelineStage
from r1mega.pipeline import digest

Compose = Callable[[Sequence[str]], Config]  # raises ConfigError
# What changes nothing of what a stage computes: where it runs, what it shows, what it could go on from.
_SECTIONS_WITHOUT_PART = ("cluster", "slurm", "plan", "pipeline", "logger", "checkpoint")
_FIELDS_WITHOUT_PART = {
    "run": ("dir", "name", "timeout_minutes", "resume", "resume_from", "allow_changes"),
    "sglang": (
        "python", "hosts", "remote", "first_port", "first_gpu", "startup_seconds", "hang_seconds", "restarts",
        "weights_dir",
    ),
    "benchmark": ("plot",),
}  # fmt: skip
# Fields that name files: what they hold is part of a stage only where the stage calls them its inputs.
FILE_FIELDS = (
    "model.hf", "model.tokenizer", "data.train", "data.eval", "data.general", "reward.helpful_model",
    "reward.safety_model", "benchmark.data", "benchmark.standings", "curate.examples", "curate.benchmarks",
    "run.resume_from",
)  # fmt: skip
# Stand for the paths of inputs and for the stage's directory where nothing may depend on them.
_INPUT, _STAGE = "pipeline-input", "pipeline-stage"
PLAIN = re.compile(r"[\w./:@%-]+")  # needs no quotes on Hydra's command line


@dataclass(frozen=True)
class Place:
    """Where the stages of one seed lie."""

    root: Path
    seed: int
    number: int = 0
    """Of the seed in the list of seeds: the first one's stages lie in the root itself."""

    @property
    def home(self) -> Path:
        """The directory of lineage.json and `stages/`."""
        return self.root if self.number == 0 else self.root / "seeds" / str(self.seed)

    def stage(self, name: str) -> Path:
        """The run directory of a stage."""
        return self.home / "stages" / name


@dataclass
class Stage:
    """One stage of one seed.

    Args:
        shared: overrides of all stages of the pipeline.
        paths: input -> where it lies.
    """

    name: str
    spec: PipelineStage
    place: Place
    shared: Sequence[str]
    paths: Mapping[str, Path]
    compose: Compose = field(repr=False)

    @property
    def dir(self) -> Path:
        """Its run directory."""
        return self.place.stage(self.name)

    @property
    def origins(self) -> Mapping[str, str]:
        """Input -> its reference."""
        return self.spec.inputs

    @property
    def before(self) -> list[str]:
        """Stages whose outputs it reads."""
        return list(dict.fromkeys(name for ref in self.spec.inputs.values() if (name := stage_before(ref))))

    def output(self, name: str) -> Path:
        """Where it leaves an output."""
        return self.dir / outputs_of(self.spec)[name].path

    def overrides(self) -> list[str]:
        """Of its run, with every path as it is."""
        texts = self._texts(self.paths, self.dir)
        return [*texts, *(assign(key, str(path)) for key, path in self.paths.items() if "." in key)]

    def command(self, *, resume: bool, more: Sequence[str] = ()) -> list[str]:
        """What runs it as a child."""
        if self.spec.run is StageRun.tool:
            values = {**self.paths, **self._outputs(self.dir), "seed": self.place.seed, "dir": self.dir}
            return [sys.executable, str(self.program), *(_filled(text, values) for text in self.spec.arguments)]
        words = [sys.executable, "-m", "r1mega.cli", str(self.spec.run), *self.overrides()]
        words += [assign("run.dir", str(self.dir)), *more]
        return [*words, "run.resume=true"] if resume else words

    @property
    def program(self) -> Path:
        """The file of a tool stage."""
        name = self.spec.tool or ""
        return Path(name).absolute() if "/" in name else conf_dir().parent / "tools" / name

    def config(self) -> Config:
        """Its run as it will be started: the general one with every path in its place. Raises ConfigError."""
        places = {f"{_INPUT}/{name}/": f"{path}" for name, path in self.paths.items()}
        return _replaced(self.general_config, places | {_STAGE: str(self.dir)})

    @cached_property
    def general_config(self) -> Config:
        """Its run with nothing in it that depends on where files lie. Raises ConfigError."""
        paths = {name: f"{_INPUT}/{name}/" for name in self.paths}
        fields = [f"{key}={path}" for key, path in paths.items() if "." in key]
        return self.compose([*self._stage_first(), *self._texts(paths, Path(_STAGE)), *fields, f"run.dir={_STAGE}"])

    @cached_property
    def config_digest(self) -> str:
        """Of all that decides what it computes, besides its inputs: the configuration, or a program's bytes and
        arguments. Raises ConfigError."""
        if self.spec.run is StageRun.tool:
            values = {name: "{" + name + "}" for name in (*self.paths, *outputs_of(self.spec), "dir")}
            arguments = [_filled(text, {**values, "seed": self.place.seed}) for text in self.spec.arguments]
            program = self.program.read_bytes().hex() if self.program.is_file() else ""
            return digest.of_values({"arguments": arguments, "program": digest.of_values(program)})
        return digest.of_values(_decisive(self.general_config))

    def key(self, inputs: Mapping[str, str]) -> str:
        """Two runs of a stage with one key give the same outputs. `inputs` are the digests of its inputs."""
        outputs = {name: [output.path, str(output.kind)] for name, output in outputs_of(self.spec).items()}
        parts = {"run": str(self.spec.run), "config": self.config_digest, "inputs": dict(inputs), "outputs": outputs}
        return digest.of_values(parts)

    def described(self) -> dict[str, Any]:
        """What it is, for the lineage."""
        names = ("tool", "arguments") if self.spec.run is StageRun.tool else ("experiment", "overrides")
        return {"run": str(self.spec.run)} | {name: getattr(self.spec, name) for name in names}

    def _stage_first(self) -> list[str]:
        return ["stage=evaluate"] if self.spec.run is StageRun.evaluate else []

    def _texts(self, paths: Mapping[str, object], directory: Path) -> list[str]:
        """Overrides without those of inputs that are fields."""
        values = {**paths, **self._outputs(directory), "seed": self.place.seed, "dir": directory}
        chosen = [f"experiment={self.spec.experiment}"] if self.spec.experiment else []
        written = [_filled(text, values) for text in (*self.shared, *self.spec.overrides)]
        return [*chosen, f"run.seed={self.place.seed}", *written]

    def _outputs(self, directory: Path) -> dict[str, Path]:
        return {name: directory / output.path for name, output in outputs_of(self.spec).items()}


def stages_of(pipeline: PipelineConfig, names: Sequence[str], place: Place, compose: Compose) -> dict[str, Stage]:
    """The stages of one seed in the order of `names`. A source that was not given lies where
    nothing is."""
    found = {}
    for name in names:
        spec = pipeline.stages[name]
        paths = {key: _path_of(pipeline, reference, place) for key, reference in spec.inputs.items()}
        found[name] = Stage(name, spec, place, pipeline.overrides, paths, compose)
    return found


def _path_of(pipeline: PipelineConfig, reference: str, place: Place) -> Path:
    before, _, name = reference.rpartition(".")
    if before:
        return place.stage(before) / outputs_of(pipeline.stages[before])[name].path
    path = pipeline.sources[reference].path
    return Path(path).absolute() if path else place.root / "sources-not-given" / reference


def assign(field: str, value: str) -> str:
    """The override that sets a field to this text, whatever letters are in it."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"{field}={value}" if PLAIN.fullmatch(value) else f"{field}='{escaped}'"


def _replaced(values: Any, places: Mapping[str, str]) -> Any:
    """A copy of dataclasses, lists and dictionaries, with these texts replaced inside every text."""
    if is_dataclass(values):
        changed = {one.name: _replaced(getattr(values, one.name), places) for one in fields(values)}
        return replace(values, **changed)
    if isinstance(values, list):
        return [_replaced(value, places) for value in values]
    if isinstance(values, dict):
        return {key: _replaced(value, places) for key, value in values.items()}
    if type(values) is str:
        for text, place in places.items():
            values = values.replace(text, place)
    return values


def _filled(text: str, values: Mapping[str, object]) -> str:
    return PLACE.sub(lambda place: str(values[place[1]]) if place[1] in values else place[0], text)


def _decisive(config: Config) -> dict[str, Any]:
    values = asdict(config)
    for section in _SECTIONS_WITHOUT_PART:
        del values[section]
    for section, names in _FIELDS_WITHOUT_PART.items():
        for name in names:
            values[section].pop(name, None)
    return _plain(values)


def _plain(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_plain(value) for value in values]
    return values.value if isinstance(values, Enum) else values
