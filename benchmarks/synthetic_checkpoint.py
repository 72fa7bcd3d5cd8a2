"""A deepseek_v3 checkpoint of random numbers and a given size, in BF16 or in FP8 blocks, written in little memory.

Its shape is DeepSeek's with fewer and narrower layers: one dense layer, then layers of 64 routed experts and a shared
one, multi-head latent attention, no multi-token prediction. Names, shapes and dtypes come from the family's table. The
numbers are one random block over and over, begun elsewhere for each tensor: weights normal, FP8 values finite and as
wide as E4M3, scales positive.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from r1mega.config import checkpoint_files
from r1mega.models import hf_fields
from r1mega.models.dist_tensors import pieces_of
from r1mega.models.fp8_blocks import E4M3_MAX, SCALE_SUFFIX, scale_shape
from r1mega.models.param_map import HfTensor
from r1mega.models.safetensors_file import Stored, as_bytes, lay_out, nbytes_of

FILE_BYTES = 10**9
LEAST_FILES = 4
WIDTH_STEP = 128  # the width of an expert is a multiple, and so holds whole FP8 blocks
WIDEST = 2048  # DeepSeek-V3's own
BLOCK_NUMBERS = 1 << 23
Entry = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class Synthetic:
    """A checkpoint that was written. Bytes are of its tensors; `largest` is the largest of them."""

    path: Path
    num_layers: int
    expert_width: int
    num_files: int
    num_tensors: int
    total_bytes: int
    largest_bytes: int

    def to_json(self) -> dict[str, Any]:
        """All fields, by name."""
        return asdict(self) | {"path": str(self.path)}


def config_of(num_moe_layers: int, expert_width: int, hidden: int, *, is_fp8: bool) -> dict[str, Any]:
    """config.json of the checkpoint, with the fields that DeepSeek's has."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
        "vocab_size": 8192, "hidden_size": hidden, "intermediate_size": 4096, "num_hidden_layers": 1 + num_moe_layers,
        "num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 768, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 1,
        "moe_layer_freq": 1, "n_routed_experts": 64, "n_shared_experts": 1, "moe_intermediate_size": expert_width,
        "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "norm_topk_prob": True, "routed_scaling_factor": 2.5, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096, "rope_theta": 10000, "rope_scaling": None, "attention_bias": False,
        "tie_word_embeddings": False, "num_nextn_predict_layers": 0, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    return config | ({"quantization_config": hf_fields.FP8_CONFIG} if is_fp8 else {})


def choose_shape(target_bytes: int) -> tuple[int, int, int]:
    """(layers of experts, width of an expert, hidden size) of the smallest BF16 checkpoint of at least so many bytes.

    Of few layers rather than narrow experts: at most one for each GB.
    """
    hidden = 2048 if target_bytes >= 10**9 else 1024

    def size(layers: int, width: int) -> int:
        entries = entries_of(config_of(layers, width, hidden, is_fp8=False))
        return sum(nbytes_of(dtype, shape) for _, dtype, shape in entries)

    # Both the layers and the width enter the size linearly.
    fixed, step, wider = size(0, WIDTH_STEP), size(1, WIDTH_STEP) - size(0, WIDTH_STEP), 2 * WIDTH_STEP
    per_width = size(1, wider) - size(1, WIDTH_STEP)
    found = []
    for layers in range(1, math.ceil(target_bytes / 1e9) + 1):
        for widths in range(1, WIDEST // WIDTH_STEP + 1):
            total = fixed + layers * (step + (widths - 1) * per_width)
            if total >= target_bytes:
                found.append((total, layers, widths * WIDTH_STEP))
    _, layers, width = min(found)
    return layers, width, hidden


def entries_of(config: dict[str, Any]) -> list[Entry]:
    """Every tensor of the checkpoint in the table's order; scales stand after their weight."""
    fields = hf_fields.parse(config, allow_fp8=True)
    found: list[Entry] = []
    for piece in pieces_of(fields):
        for tensor in piece.tensors:
            found += _entries(tensor, is_fp8=fields.is_fp8, fp32=piece.slot.fp32)
    return found


def write(path: Path, target_bytes: int, *, is_fp8: bool, progress: Callable[[int, int], None]) -> Synthetic:
    """Write the checkpoint, config.json last, and return what it is.

    If it stands there whole already it is kept; anything else at that path is replaced.

    Args:
        target_bytes: least size of the BF16 checkpoint; that in FP8 is of the same model and about half as large.
        progress: told (bytes written, bytes in all).
    """
    layers, width, hidden = choose_shape(target_bytes)
    config = config_of(layers, width, hidden, is_fp8=is_fp8)
    entries = entries_of(config)
    sizes = [nbytes_of(dtype, shape) for _, dtype, shape in entries]
    total = sum(sizes)
    groups = list(_groups(entries, sizes, min(FILE_BYTES, total // LEAST_FILES)))
    made = Synthetic(path, 1 + layers, width, len(groups), len(entries), total, max(sizes))
    text = json.dumps(config, indent=2) + "\n"
    if (path / "config.json").is_file() and (path / "config.json").read_text(encoding="utf-8") == text:
        return made
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    fill, weight_map, done = _Fill(), {}, 0
    for index, group in enumerate(groups):
        file = f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors"
        head, stored = lay_out(group, file)
        with open(path / file, "wb") as target:
            target.write(head)
            for tensor in stored:
                for chunk in fill.chunks(tensor):
                    target.write(chunk)
                weight_map[tensor.name] = file
                done += tensor.nbytes
                progress(done, total)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / checkpoint_files.INDEX).write_text(json.dumps(content, indent=1), encoding="utf-8")
    (path / "config.json").write_text(text, encoding="utf-8")
    return made


class _Fill:
    """Bytes for a tensor of any size and dtype, taken from one random block of that dtype."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        normal = torch.randn(BLOCK_NUMBERS, generator=generator)
        fp8 = (normal * (E4M3_MAX / 4)).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        scales = 1e-4 * (1 + torch.rand(BLOCK_NUMBERS >> 3, generator=generator))
        self._blocks = {"BF16": (0.02 * normal).bfloat16(), "F8_E4M3": fp8, "F32": scales}
        self._begin = 0

    def chunks(self, tensor: Stored) -> Iterator[memoryview]:
        """The tensor's bytes, some MB at a time."""
        block = self._blocks[tensor.dtype]
        self._begin = (self._begin + 104_729) % block.numel()  # a prime: the tensors differ
        begin, left = self._begin * block.itemsize, tensor.nbytes
        view = as_bytes(block)
        while left:
            chunk = view[begin : begin + left]
            yield chunk
            begin, left = 0, left - len(chunk)


def _entries(tensor: HfTensor, *, is_fp8: bool, fp32: bool) -> Iterator[Entry]:
    if is_fp8 and tensor.fp8:
        yield tensor.name, "F8_E4M3", tensor.shape
        yield tensor.name + SCALE_SUFFIX, "F32", scale_shape(tensor.shape)
    else:
        yield tensor.name, "F32" if fp32 else "BF16", tensor.shape


def _groups(entries: Sequence[Entry], sizes: Sequence[int], limit: int) -> Iterator[list[Entry]]:
    """Consecutive tensors, as many to a file as fit below the limit, at least one."""
    held: list[Entry] = []
    filled = 0
    for entry, size in zip(entries, sizes, strict=True):
        if held and filled + size > limit:
            yield held
            held, filled = [], 0
        held.append(entry)
        filled += size
    yield held
