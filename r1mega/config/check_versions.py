"""Packages that do not go together. Versions are read from their metadata; none of them is imported."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from r1mega.config.choices import DeviceType, Dispatcher, LayerSpec
from r1mega.config.faults import Fault
from r1mega.config.schema import Config

# Megatron-Core 0.16.1 asks it for `deep_ep.utils.EventOverlap`, which 2 no longer has, and then takes it for absent.
_DEEP_EP = Requirement("deep_ep<2")
DEEP_EP_INSTALL = "pip install --no-build-isolation git+https://github.com/deepseek-ai/DeepEP@v1.2.1"
# What TE is made of: its parts check each other when they are imported, on every rank and after the allocation.
_TE_PARTS = ("transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13")


def installed(package: str) -> str | None:
    """The version of a package of this environment; None where it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def declared(package: str) -> list[str]:
    """What a package of this environment says it needs, extras included; empty where it is not there."""
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def check_versions(
    config: Config,
    version_of: Callable[[str], str | None] = installed,
    needs_of: Callable[[str], Sequence[str]] = declared,
) -> Iterator[Fault]:
    """Faults between torch, Megatron-Core and Transformer Engine, as far as the configuration uses them."""
    wanted = _needed(needs_of("r1mega"), "megatron-core")
    yield from _outside("model.hf", "megatron-core", version_of("megatron-core"), wanted, "r1mega")
    torch = version_of("torch")
    if config.device.type is DeviceType.cuda and torch is not None and torch.endswith("+cpu"):
        yield Fault("device.type", f"cuda with torch {torch}", "is torch's CPU build", "install a CUDA build of torch")
    if config.parallel.dispatcher is Dispatcher.flex:
        found = version_of("deep_ep")
        yield from _outside("parallel.dispatcher", "deep_ep", found, _DEEP_EP, "megatron-core 0.16.1", DEEP_EP_INSTALL)
    engine = version_of("transformer-engine")
    if config.device.layer_spec is not LayerSpec.te or engine is None:
        return
    field, parts = "device.layer_spec", {part: version_of(part) for part in _TE_PARTS}
    for part, version in parts.items():
        if version is not None and version != engine:
            constraint = f"{part} is {version}, and all of Transformer Engine must be of one version"
            yield Fault(field, f"transformer-engine {engine}", constraint, f"install {part}=={engine}")
    wanted = _needed(needs_of("megatron-core"), "transformer-engine")
    yield from _outside(field, "transformer-engine", engine, wanted, "megatron-core")
    cuda = re.search(r"\+cu(\d\d)", torch or "")
    built_for = sorted(part[-2:] for part, version in parts.items() if version and part[-4:-2] == "cu")
    if cuda and built_for and cuda.group(1) not in built_for:
        got = f"transformer-engine-cu{built_for[-1]} with torch {torch}"
        remedy = f"install transformer-engine-cu{cuda.group(1)}=={engine}"
        yield Fault(field, got, "both must be built for one major version of CUDA", remedy)


def _needed(requirements: Sequence[str], package: str) -> Requirement | None:
    """The line for `package`, whichever extra it belongs to; None where there is none with bounds."""
    found = [Requirement(line) for line in requirements]
    return next((one for one in found if one.name == package and one.specifier), None)


def _outside(
    field: str, package: str, version: str | None, wanted: Requirement | None, whose: str, remedy: str | None = None
) -> Iterator[Fault]:
    if version is None or wanted is None:
        return
    try:
        is_inside = wanted.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        is_inside = False
    if not is_inside:
        constraint = f"{whose} is made for {package} {wanted.specifier}"
        yield Fault(field, f"{package} {version}", constraint, remedy or f"install '{package}{wanted.specifier}'")
