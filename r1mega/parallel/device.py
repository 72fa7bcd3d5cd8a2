"""The device a process computes on, and the bridge that lets Megatron-Core run where there is no CUDA.

Megatron-Core names the CUDA device in some five hundred places. `prepare("cpu")` answers for it: the names it calls in
`torch.cuda` become no-ops or their CPU counterparts, and tensors asked for on "cuda" are made on the CPU. It must run
before the first import of `megatron.core`, because Megatron binds some of these names when it is imported.
`prepare("cuda")` changes nothing at all; it only checks that CUDA is there and selects the device.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from typing import Any

import torch

_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "scalar_tensor", "tensor", "zeros",
    "zeros_like",
)  # fmt: skip
_METHOD_FACTORIES = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "new_empty_strided")
_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}
_prepared: str | None = None


def prepare(device_type: str, local_rank: int = 0, threads: int = 1, *, share_gpu: bool = False) -> torch.device:
    """Select the device of this process; bridge Megatron-Core to the CPU where asked.

    Args:
        device_type: "cpu" or "cuda".
        local_rank: index of this process on its node, the CUDA device it takes.
        threads: intra-op CPU threads of this process.
        share_gpu: deal the GPUs of a node out in turn to processes, of which there may be more.

    Raises:
        ValueError: CUDA is asked for and not there, or asked to change the device of a process that has one.
        RuntimeError: Megatron-Core was imported before the CPU bridge could be laid.
    """
    global _prepared
    if _prepared not in (None, device_type):
        raise ValueError(f"device.type: got {device_type}; this process was already prepared for {_prepared}")
    torch.set_num_threads(threads)
    if device_type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "device.type: got cuda; torch.cuda.is_available() is False on this machine "
                f"(torch {torch.__version__}); install a CUDA build of torch and a driver, or set device=cpu"
            )
        index = local_rank % torch.cuda.device_count() if share_gpu else local_rank
        torch.cuda.set_device(index)
        _prepared = device_type
        return torch.device("cuda", index)
    if device_type != "cpu":
        raise ValueError(f"device.type: got {device_type}; must be cpu or cuda")
    if _prepared is None:
        if "megatron.core" in sys.modules:
            raise RuntimeError("megatron.core was imported before r1mega.parallel.device.prepare('cpu')")
        # The fused helpers would otherwise compile for some 15 s at the first step.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        _bridge_cuda_names()
        _bridge_tensor_placement()
        _bridge_collectives()
        _bridge_groups_of_one()
        _prepared = device_type
    return torch.device("cpu")


def backend(device_type: str) -> str:
    """The torch.distributed backend for the device."""
    return "nccl" if device_type == "cuda" else "gloo"


class _Stream:
    """Stands for the one order in which a CPU process does everything."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, _other: Any) -> None: ...

    def wait_event(self, _event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_exc: Any) -> None: ...


class _Event:
    """An event that has always happened."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def record(self, *_args: Any) -> None: ...

    def wait(self, *_args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class _OneGenerator:
    """`torch.cuda.default_generators` of a process with one device, however it is indexed."""

    def __getitem__(self, _index: Any) -> torch.Generator:
        return torch.default_generator


def _nothing() -> Any:
    """A new function that does nothing: dynamo's tables want a distinct one under every name."""
    return lambda *_args, **_kwargs: None


def _bridge_cuda_names() -> None:
    cpu = torch.device("cpu")
    stream = _Stream()
    cuda = torch.cuda
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats", "ipc_collect", "_lazy_init"):
        setattr(cuda, name, _nothing())
    cuda.current_device = lambda: cpu
    cuda.device_count = lambda: 0
    cuda.Stream, cuda.Event = _Stream, _Event
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *_: stream)
    for name in ("stream", "device"):
        setattr(cuda, name, lambda *_: contextlib.nullcontext())
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        setattr(cuda, name, lambda *_: 0)
    cuda.get_device_capability = lambda *_: (0, 0)
    cuda.is_current_stream_capturing = lambda: False
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _nothing())
    cuda._lazy_call = lambda call, **_: call()
    cuda.default_generators = _OneGenerator()
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()
        module.set_rng_state = lambda state, *_args, **_kwargs: torch.set_rng_state(state)
        module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
        module.manual_seed_all = lambda seed: torch.default_generator.manual_seed(seed)
        module.initial_seed = torch.initial_seed
    cuda.FloatTensor, cuda.HalfTensor, cuda.BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor


def _on_cpu(device: Any) -> Any:
    """The device itself, or the CPU where CUDA (by name, object or index) is meant."""
    if isinstance(device, int) and not isinstance(device, bool):
        return "cpu"
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


def _placed_on_cpu(function: Any) -> Any:
    @functools.wraps(function)
    def place(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return place


def _bridge_tensor_placement() -> None:
    for name in _FACTORIES:
        setattr(torch, name, _placed_on_cpu(getattr(torch, name)))
    for name in _METHOD_FACTORIES:
        setattr(torch.Tensor, name, _placed_on_cpu(getattr(torch.Tensor, name)))

    tensor_to, tensor_type = torch.Tensor.to, torch.Tensor.type

    @functools.wraps(tensor_to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and not isinstance(args[0], torch.dtype):
            args = (_on_cpu(args[0]), *args[1:])
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return tensor_to(self, *args, **kwargs)

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        # The optimizers tell precisions apart by the name of the CUDA tensor type.
        if dtype is None:
            name = tensor_type(self)
            return _TYPE_NAMES.get(name, name)
        return tensor_type(self, dtype, **kwargs)

    torch.Tensor.to, torch.Tensor.type = to, type_
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self
    torch.Tensor.record_stream = _nothing()
    torch.Tensor.pin_memory = lambda self, *_: self
    torch.nn.Module.cuda = lambda self, *_: self


class _Done:
    """The handle of a collective that had nothing to wait for."""

    def wait(self, *_args: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _bridge_groups_of_one() -> None:
    """A rank alone in its group exchanges nothing.

    gloo would still copy, in a thread of its own whose OpenMP team then crowds out the main thread's: measured, the
    engine's decoding took 1.7 times as long after the first gradient reduction on two cores.
    """
    import torch.distributed as dist

    def gathers(function: Any) -> Any:
        @functools.wraps(function)
        def call(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if dist.get_world_size(kwargs.get("group")) > 1:
                return function(output, input, *args, **kwargs)
            if output.data_ptr() != input.data_ptr():
                output.copy_(input.view_as(output))
            return _Done() if kwargs.get("async_op") else None

        return call

    def in_place(function: Any) -> Any:
        @functools.wraps(function)
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if dist.get_world_size(kwargs.get("group")) > 1:
                return function(tensor, *args, **kwargs)
            return _Done() if kwargs.get("async_op") else None

        return call

    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, gathers(getattr(dist, name)))
    for name in ("all_reduce", "broadcast"):
        setattr(dist, name, in_place(getattr(dist, name)))


def _bridge_collectives() -> None:
    """gloo differs from NCCL in two ways Megatron's token dispatcher meets."""
    import torch.distributed as dist

    all_to_all_single, all_gather = dist.all_to_all_single, dist.all_gather
    reduce_scatter = dist.reduce_scatter

    def as_ints(splits: Any) -> list[int] | None:
        return None if splits is None else [int(size) for size in splits]

    @functools.wraps(all_to_all_single)
    def all_to_all_single_ints(
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes=None,
        input_split_sizes=None,
        group=None,
        async_op=False,
    ) -> Any:
        return all_to_all_single(
            output, input, as_ints(output_split_sizes), as_ints(input_split_sizes), group=group, async_op=async_op
        )

    @functools.wraps(all_gather)
    def all_gather_any_size(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group=None, async_op=False) -> Any:
        sizes = [part.shape[0] if part.dim() else 1 for part in tensor_list]
        if async_op or len(set(sizes)) == 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        longest = max(sizes)
        padded = tensor.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in sizes]
        all_gather(gathered, padded, group=group)
        for part, full, size in zip(tensor_list, gathered, sizes, strict=True):
            part.copy_(full[:size])
        return None

    @functools.wraps(reduce_scatter)
    def reduce_scatter_any_size(output, input_list, op=dist.ReduceOp.SUM, group=None, async_op=False) -> Any:
        if async_op or len({part.shape for part in input_list}) == 1:
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        sizes = [part.shape[0] for part in input_list]
        whole = torch.cat(list(input_list))
        dist.all_reduce(whole, op=op, group=group)
        output.copy_(whole.split(sizes)[dist.get_rank(group)])
        return None

    dist.all_to_all_single = all_to_all_single_ints
    dist.all_gather = all_gather_any_size
    dist.reduce_scatter = reduce_scatter_any_size
