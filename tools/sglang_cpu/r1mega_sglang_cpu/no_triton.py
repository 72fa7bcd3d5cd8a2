"""What stands for triton: enough to define kernels, an error from whoever runs one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, NoReturn


class StandInModule(ModuleType):
    """A module of triton. Any public name in it is a `StandIn` class, made when it is asked for."""

    __version__ = "0"  # torch and SGLang compare it with versions they know

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _HOST_FUNCTIONS.get(name) or _stand_in(name)
        setattr(self, name, value)
        return value


class _Meta(type):
    """Makes names below a class classes too (`triton.language.math.exp`)."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _stand_in(name)
        setattr(cls, name, value)
        return value


class StandIn(metaclass=_Meta):
    """A class, so that it serves as an annotation, a base class, the second argument of isinstance and a decorator.

    Applied to a function alone it gives a `Kernel` (`@triton.jit`); an instance made with anything else applies to a
    function likewise (`@triton.autotune(configs=..., key=...)`).
    """

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        if len(arguments) == 1 and not options and isinstance(arguments[0], FunctionType | Kernel):
            return _kernel(arguments[0])
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **_options: Any) -> None:
        # `tl.constexpr(5).value`, which srt/models/deepseek_v4.py reads on import
        self.value = arguments[0] if arguments else None

    def __call__(self, function: Any = None, *_arguments: Any, **_options: Any) -> Any:
        if isinstance(function, FunctionType | Kernel):
            return _kernel(function)
        _refuse(type(self).__name__)


class Kernel:
    """A kernel's definition. It keeps its name for the error that running it gives."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.fn = function
        functools.update_wrapper(self, function)

    def __getitem__(self, _grid: Any) -> NoReturn:
        _refuse(self.fn.__name__)

    def __call__(self, *_arguments: Any, **_options: Any) -> NoReturn:
        _refuse(self.fn.__name__)


def _stand_in(name: str) -> type:
    return _Meta(name, (StandIn,), {})


def _kernel(function: Any) -> Kernel:
    return function if isinstance(function, Kernel) else Kernel(function)


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(f"triton is not installed, and {name} needs it: SGLang took a path that a CPU cannot run")


def _cdiv(x: int, y: int) -> int:
    return -(-x // y)


def _next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


# SGLang calls these outside of kernels, to size buffers.
_HOST_FUNCTIONS: dict[str, Callable[..., int]] = {"cdiv": _cdiv, "next_power_of_2": _next_power_of_2}
