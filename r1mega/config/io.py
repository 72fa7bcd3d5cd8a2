"""The resolved configuration as a file: written once by the launcher, read by every other process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config

FILE_NAME = "config.yaml"


def typed(composed: DictConfig) -> Config:
    """The composed configuration as dataclasses, all interpolations resolved.

    A text field that nobody filled in (`???`) becomes the empty string, which the checks refuse together with all other
    faults. Raises ConfigError for any other field without a value, an unknown key, a wrong type or a bad interpolation.
    """
    try:
        # A plain copy: merging keys that were forced into a typed configuration (+key=value) would be accepted.
        plain = OmegaConf.create(OmegaConf.to_container(composed))
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        unset = sorted(OmegaConf.missing_keys(merged))
        if faults := [_unset(key) for key in unset if _annotation(key) is not str]:
            raise ConfigError(faults)
        for key in unset:
            OmegaConf.update(merged, key, "")
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError([_fault(error)]) from error
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    """The text of the resolved file."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def load(path: Path | str) -> Config:
    """Read a resolved file. Raises ConfigError where it is absent, not YAML, or does not fit the schema."""
    remedy = f"give the {FILE_NAME} of a run directory"
    try:
        loaded = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ConfigError([Fault(str(path), str(error), "must be a readable YAML file", remedy)]) from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError([Fault(str(path), "a list", "must hold a mapping", remedy)])
    return typed(loaded)


def _annotation(key: str) -> Any:
    section, name = key.split(".")
    return get_type_hints(get_type_hints(Config)[section])[name]


def _unset(key: str) -> Fault:
    return Fault(key, "no value", "must be given", f"choose an option of its group or set {key}=")


def _fault(error: OmegaConfBaseException) -> Fault:
    first_line = str(error.msg or error).splitlines()[0]
    return Fault(str(error.full_key or "config"), first_line, "must fit the schema", "see r1mega train --help")
