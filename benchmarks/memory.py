"""What training really holds of a GPU's memory: the figures that `r1mega plan` is compared with.

    python -m benchmarks.memory > memory.jsonl           # one CUDA device, about a minute
    python -m benchmarks.memory --dry                    # the same code on a CPU with tiny models; no figures
    python -m benchmarks.memory --only qwen2-bf16-none   # some of them

Each case builds a MegatronPolicy in a world of one, takes two updates on random packed tokens, works out log-probs
with its own weights and with the reference's, and moves to host memory and back. After every phase one asks torch's
allocator for the most that was held in it and for what is held after it. One JSON line a case with these bytes and with
everything an estimate needs; a case that fails is a line with its error, and the next one starts in a new process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]

QWEN2 = {
    "model_type": "qwen2", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 8,
    "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {
    **QWEN2, "model_type": "llama", "vocab_size": 128256, "hidden_size": 1024, "intermediate_size": 2816,
    "num_hidden_layers": 6, "num_key_value_heads": 8, "head_dim": 64,
}  # fmt: skip
DEEPSEEK = {
    "model_type": "deepseek_v3", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "q_lora_rank": 384, "kv_lora_rank": 256, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 512, "n_routed_experts": 32,
    "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5, "tie_word_embeddings": False,
}  # fmt: skip
# What a dry run changes: the code is the same, the sizes are not.
TINY = {
    "vocab_size": 250, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "moe_intermediate_size": 32, "n_routed_experts": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One model, what is computed with it, and how.

    `lengths` are the tokens of each sequence of a micro-batch; an update has `micro_batches` of them.
    """

    name: str
    model: dict[str, Any]
    lengths: tuple[int, ...]
    params: str = "bf16"
    layer_spec: str = "torch"
    recompute: str = "none"
    recompute_modules: tuple[str, ...] = ()
    recompute_num_layers: int = 1
    chunk_tokens: int = 1024
    moments: str = "fp32"
    micro_batches: int = 1
    fp8: bool = False


EVEN, ODD = (2048,) * 4, (3000, 2100, 1500, 1000, 400)
CASES = (
    Case("qwen2-bf16-none", QWEN2, EVEN),
    Case("qwen2-bf16-selective", QWEN2, ODD, recompute="selective", recompute_modules=("core_attn", "mlp")),
    Case("qwen2-bf16-full", QWEN2, (4096,) * 8, recompute="full"),
    Case("llama-fp32-none", LLAMA, (1024,) * 4, params="fp32", chunk_tokens=4096),
    Case("llama-bf16-full", LLAMA, (8192, 5000, 2000), recompute="full", recompute_num_layers=2, micro_batches=2),
    Case("deepseek-bf16-none", DEEPSEEK, EVEN),
    Case("deepseek-bf16-odd", {**DEEPSEEK, "vocab_size": 129280}, ODD, chunk_tokens=2048),
    Case("deepseek-bf16-selective", DEEPSEEK, EVEN, recompute="selective", recompute_modules=("core_attn", "moe")),
    Case("deepseek-bf16-full", DEEPSEEK, (4096,) * 4, recompute="full"),
    Case("deepseek-fp32-none", DEEPSEEK, (1024,) * 4, params="fp32"),
    Case("qwen2-te-none", QWEN2, EVEN, layer_spec="te"),
    Case("deepseek-te-none", DEEPSEEK, EVEN, layer_spec="te"),
    Case("deepseek-te-full", DEEPSEEK, (4096,) * 4, layer_spec="te", recompute="full"),
    Case(
        "deepseek-te-selective", DEEPSEEK, EVEN, layer_spec="te", moments="bf16", recompute="selective",
        recompute_modules=("core_attn", "mla_up_proj", "layernorm", "moe_act"),
    ),
    Case("deepseek-te-fp8", DEEPSEEK, EVEN, layer_spec="te", fp8=True),
)  # fmt: skip


def main() -> int:
    """Run the cases in a process of their own, started again after one that it does not survive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny, without figures")
    parser.add_argument(
        "--only", nargs="*", choices=[case.name for case in CASES], help="cases; all of them where absent"
    )
    parser.add_argument(
        "--seconds", type=float, default=80.0, help="time for all cases; those left are skipped (%(default)s)"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cases = [case for case in CASES if not arguments.only or case.name in arguments.only]
    if arguments.child:
        run_cases(cases, dry=arguments.dry)
        return 0
    return supervise(cases, dry=arguments.dry, seconds=arguments.seconds)


def supervise(cases: Sequence[Case], *, dry: bool, seconds: float) -> int:
    """Print a line for every case, whatever becomes of its process. Exit code 0 where none failed or was cut off."""
    end, left, failed = time.monotonic() + seconds, [case.name for case in cases], False
    while left and time.monotonic() < end:
        argv = [sys.executable, "-m", "benchmarks.memory", "--child", *(["--dry"] if dry else []), "--only", *left]
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(argv, cwd=REPO, stdout=subprocess.PIPE, stderr=errors, text=True)
            timer = threading.Timer(max(end - time.monotonic(), 0), child.kill)
            timer.start()
            for line in child.stdout:
                if line.startswith('{"name"'):
                    print(line, end="", flush=True)
                    report = json.loads(line)
                    failed |= "error" in report
                    left.remove(report["name"])
            code = child.wait()
            timer.cancel()
            errors.seek(0)
            tail = errors.read()[-2000:]
        if left and time.monotonic() < end:
            failed = True
            print(
                json.dumps({"name": left.pop(0), "error": f"its process ended with {code}", "stderr": tail}), flush=True
            )
    for name in left:
        print(json.dumps({"name": name, "skipped": f"{seconds:g} seconds were over"}), flush=True)
    return 1 if failed or left else 0


def run_cases(cases: Sequence[Case], *, dry: bool) -> None:
    """Every case in this process, a line each."""
    from r1mega.parallel import groups
    from r1mega.parallel.layout import Layout

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.setdefault("MASTER_PORT", str(random.randrange(20000, 50000)))
    world = groups.initialize(Layout(), "cpu" if dry else "cuda", seed=0, timeout_minutes=2)
    has_te = importlib.util.find_spec("transformer_engine") is not None
    for case in cases:
        begin = time.perf_counter()
        if case.layer_spec == "te" and not has_te:
            report: dict[str, Any] = {"skipped": "transformer_engine is not installed"}
        else:
            try:
                report = measured(_tiny(case) if dry else case, world)
            except Exception as error:  # the other cases are not to suffer from it
                report = {"error": f"{type(error).__name__}: {error}"[:500], "trace": traceback.format_exc()[-1500:]}
        line = {"name": case.name, "seconds": round(time.perf_counter() - begin, 2), **report}
        print(json.dumps(line), flush=True)
        _forget()
    groups.shutdown()


def measured(case: Case, world: Any) -> dict[str, Any]:
    """The phases of a case: bytes at their worst instant and after them."""
    import torch

    from r1mega.models.hf_config import ModelOptions
    from r1mega.models.hf_fields import parse
    from r1mega.train.optimizer import AdamSettings
    from r1mega.train.policy import MegatronPolicy

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    options = ModelOptions(
        params_dtype=dtypes[case.params],
        layer_spec=case.layer_spec,
        fp8=case.fp8,
        recompute=case.recompute,
        recompute_modules=case.recompute_modules,
        recompute_num_layers=case.recompute_num_layers,
    )
    fields = parse(case.model)
    meter = _Meter(world.device)
    items, update = _work(case)
    policy = meter("build", lambda: MegatronPolicy(
        fields, world, options, AdamSettings(lr=1e-5, moments=dtypes[case.moments])
    ))  # fmt: skip
    policy.logprob_chunk_tokens = case.chunk_tokens
    meter("load", lambda: policy.load(_Weights(world.device)))
    meter("keep_copy", lambda: policy.keep_copy("reference"))
    plan = policy.plan(items, sum(case.lengths))
    for number in (1, 2):
        meter(f"forward_backward_{number}", lambda: update(policy, plan))
        meter(f"optimizer_step_{number}", lambda: policy.optimizer_step(1e-5))
    meter("logprobs", lambda: policy.logprobs(items, plan))

    def reference() -> None:
        with policy.weights("reference"):
            policy.logprobs(items, plan)

    meter("reference_logprobs", reference)
    meter("hand_over", policy.hand_over)
    meter("weights_back", lambda: policy.take_back(only_weights=True))
    meter("logprobs_offloaded", lambda: policy.logprobs(items, plan))
    meter("take_back", policy.take_back)
    parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    report = {
        "case": asdict(case),
        "micro_batches": plan.num_chunks,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "parameter_bytes": sum(parameter.numel() * parameter.itemsize for parameter in parameters),
        "bytes": meter.bytes,
        **_machine(world.device),
    }
    policy.close()
    return report


class _Meter:
    """Runs phases and asks the allocator about them. On a CPU it knows nothing."""

    def __init__(self, device: Any) -> None:
        self._on_gpu = device.type == "cuda"
        self.bytes: dict[str, dict[str, int]] = {}
        if self._on_gpu:
            import torch

            self.bytes["before"] = {"after": torch.cuda.memory_allocated()}

    def __call__(self, phase: str, action: Callable[[], Any]) -> Any:
        if not self._on_gpu:
            return action()
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result = action()
        torch.cuda.synchronize()
        self.bytes[phase] = {"peak": torch.cuda.max_memory_allocated(), "after": torch.cuda.memory_allocated()}
        return result


class _Weights:
    """Random weights made where they are needed: nobody waits for a CPU to make a billion numbers."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def holds(self, _name: str) -> bool:
        return False

    def get(self, tensor: Any) -> Any:
        import torch

        if tensor.kind == "norm":
            return torch.ones(tensor.shape, device=self._device)
        if tensor.kind == "zero":
            return torch.zeros(tensor.shape, device=self._device)
        return torch.randn(tensor.shape, device=self._device, dtype=torch.bfloat16) * 0.02


def _work(case: Case) -> tuple[list[Any], Callable[..., Any]]:
    """The sequences of an update, and what takes its gradient."""
    from r1mega.train.batch import PackItem

    draw = random.Random(0)
    lengths = case.lengths * case.micro_batches
    items = [
        PackItem([draw.randrange(case.model["vocab_size"]) for _ in range(length)], length - length // 4)
        for length in lengths
    ]
    total = sum(item.num_response for item in items)

    def loss(logprobs_R: Any, _entropy_R: Any, _micro: Any) -> tuple[Any, dict[str, Any]]:
        value = -logprobs_R.sum() / total
        return value, {"loss": value.detach()}

    return items, lambda policy, plan: policy.forward_backward(items, plan, loss)


def _tiny(case: Case) -> Case:
    sizes = {name: value for name, value in TINY.items() if name in case.model}
    lengths = tuple(max(8, length // 64) for length in case.lengths)
    return replace(case, model={**case.model, **sizes}, lengths=lengths, chunk_tokens=16)


def _machine(device: Any) -> dict[str, Any]:
    import torch

    if device.type != "cuda":
        return {"device": "cpu", "torch": torch.__version__}
    free, total = torch.cuda.mem_get_info()
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "outside_allocator": total - free - torch.cuda.memory_reserved(),
        "transformer_engine": _version("transformer_engine"),
    }


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _forget() -> None:
    """Nothing of a case is to be counted with the next one."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The cases of a file that were measured."""
    for text in path.read_text().splitlines():
        if text.startswith("{") and "bytes" in (line := json.loads(text)):
            yield line


if __name__ == "__main__":
    sys.exit(main())
