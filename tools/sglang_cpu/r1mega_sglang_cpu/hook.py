"""Import hooks that every process of the environment gets at its start, by the `.pth` file.

They cost an interpreter that does not import torchvision or triton nothing but this module.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_kept: list[Any] = []  # what torch unregisters when it is collected


class TorchvisionOperators(MetaPathFinder):
    """Declares torchvision's operators where its library has not.

    PyPI's torchvision is built for CUDA and its library cannot load beside a CPU torch. `torchvision/__init__.py` then
    goes on to import `_meta_registrations`, which fails on operators without a schema. SGLang needs only its image
    transforms (srt/configs/deepseek_ocr.py line 7 and srt/configs/deepseekvl2.py line 88), which use none of them.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Find nothing, ever; the operators are declared on the way."""
        if fullname == "torchvision._meta_registrations":
            self._declare()

    def _declare(self) -> None:
        import torch

        if hasattr(torch.ops.torchvision, "nms"):
            return  # a torchvision for CPU has brought them
        library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            library.define(schema)
        _kept.append(library)


class TritonStandIn(MetaPathFinder):
    """Stands for triton where it is absent, as it is beside a CPU torch.

    SGLang imports it at the top of hundreds of files (srt/utils/common.py line 91 is the first), and uses it to define
    kernels that a CPU never runs.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A stand-in for triton and everything below it."""
        package, dot, _ = fullname.partition(".")
        if package != "triton" or (dot and not self._stands_for(sys.modules[package])):
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def _stands_for(self, package: ModuleType) -> bool:
        # Else a file that a real triton lacks would be found here.
        return package.__spec__ is not None and package.__spec__.loader is self

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The import machinery asks for the module, and puts it into `sys.modules`."""
        from r1mega_sglang_cpu.no_triton import StandInModule

        return StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


# torchvision's comes first, to be asked at all; triton's last, so that a real triton is found before it.
sys.meta_path.insert(0, TorchvisionOperators())
sys.meta_path.append(TritonStandIn())
