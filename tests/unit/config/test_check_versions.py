"""Packages that do not go together, by what their metadata says."""

from __future__ import annotations

import pytest

from r1mega.config.check_versions import check_versions
from r1mega.config.choices import DeviceType, Dispatcher, LayerSpec
from r1mega.config.schema import Config

SOUND = {
    "torch": "2.13.0+cu130", "megatron-core": "0.16.1", "transformer-engine": "2.11.0",
    "transformer-engine-torch": "2.11.0", "transformer-engine-cu13": "2.11.0",
}  # fmt: skip
NEEDS = {
    "r1mega": ["pyyaml>=6", 'megatron-core==0.16.1; extra == "cpu"', 'r1mega[cpu]; extra == "gpu"'],
    "megatron-core": ["torch>=2.6.0", 'transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"'],
}


def messages(
    device: DeviceType = DeviceType.cuda, layers: LayerSpec = LayerSpec.te, **changes: str | None
) -> list[str]:
    config = Config()
    config.device.type, config.device.layer_spec = device, layers
    versions = SOUND | {name.replace("_", "-"): version for name, version in changes.items()}
    return [str(fault) for fault in check_versions(config, versions.get, lambda name: NEEDS.get(name, []))]


def test_what_goes_together() -> None:
    assert messages() == []
    assert messages(DeviceType.cpu, LayerSpec.torch, torch="2.13.0+cpu") == []
    assert messages(layers=LayerSpec.torch, transformer_engine="1.0") == []  # not used
    assert messages(transformer_engine=None, transformer_engine_torch=None) == []  # another check says it is not there


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch": "2.13.0+cpu"}, "device.type: got cuda with torch 2.13.0+cpu; is torch's CPU build; install a CUDA"),
        (
            {"megatron_core": "0.15.0"},
            "model.hf: got megatron-core 0.15.0; r1mega is made for megatron-core ==0.16.1; "
            "install 'megatron-core==0.16.1'",
        ),
        (
            {"transformer_engine_torch": "2.10.0"},
            "device.layer_spec: got transformer-engine 2.11.0; transformer-engine-torch is 2.10.0, and all of",
        ),
        (
            {name: "2.3.0" for name in SOUND if name.startswith("transformer")},
            "device.layer_spec: got transformer-engine 2.3.0; megatron-core is made for transformer-engine <2.12.0,",
        ),
        (
            {"torch": "2.13.0+cu128"},
            "device.layer_spec: got transformer-engine-cu13 with torch 2.13.0+cu128; both must be built for one major "
            "version of CUDA; install transformer-engine-cu12==2.11.0",
        ),
        ({"megatron_core": "built by hand"}, "model.hf: got megatron-core built by hand; r1mega is made for"),
    ],
)
def test_what_does_not(changes: dict[str, str], message: str) -> None:
    (found,) = messages(**changes)
    assert found.startswith(message)


def test_the_deep_ep_that_megatron_knows() -> None:
    config = Config()
    config.device.type, config.parallel.dispatcher = DeviceType.cuda, Dispatcher.flex

    def found(version: str | None) -> list[str]:
        versions = SOUND | {"deep_ep": version}
        return [str(fault) for fault in check_versions(config, versions.get, lambda name: NEEDS.get(name, []))]

    assert found("1.2.1+9af0e0d") == found(None) == []
    (fault,) = found("2.1.0")
    assert fault == (
        "parallel.dispatcher: got deep_ep 2.1.0; megatron-core 0.16.1 is made for deep_ep <2; pip install "
        "--no-build-isolation git+https://github.com/deepseek-ai/DeepEP@v1.2.1"
    )


def test_this_environment_goes_together() -> None:
    config = Config()
    config.device.type, config.device.layer_spec = DeviceType.cpu, LayerSpec.torch
    assert list(check_versions(config)) == []
