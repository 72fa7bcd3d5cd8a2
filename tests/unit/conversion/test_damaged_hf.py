"""Damaged Hugging Face checkpoints: each ends in one message with the damaged tensor or file and the remedy."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from r1mega.conversion import plan

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00002-of-00003.safetensors"
SCALES = "fp8_scales.safetensors"
WEIGHT = "model.layers.0.mlp.down_proj.weight"
SCALE = WEIGHT + "_scale_inv"
EMBEDDING = "model.embed_tokens.weight"
MTP_EMBEDDING = "model.layers.2.embed_tokens.weight"
MTP_HEAD = "model.layers.2.shared_head.head.weight"
Damage = Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A damage of one kind, and what the message says of it. `is_late`: seen only while tensors are read."""

    name: str
    of: str
    damage: Damage
    names: str
    remedy: str
    is_late: bool = False
    options: dict[str, Any] = field(default_factory=dict)


def late(name: str, of: str, damage: Damage, names: str, remedy: str, **options: Any) -> Case:
    return Case(name, of, damage, names, remedy, True, options)


def config(**changes: Any) -> Damage:
    """Other values for fields of config.json; None takes the field away."""

    def damage(source: Path) -> None:
        path = source / "config.json"
        fields = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))

    return damage


def text(file: str, content: str) -> Damage:
    return lambda source: (source / file).write_text(content)


def cut(file: str, by: int) -> Damage:
    """A file shorter by some bytes, or longer."""
    return lambda source: os.truncate(source / file, (source / file).stat().st_size - by)


def folder_for(file: str) -> Damage:
    """A folder in a file's place, which no user can read as a file."""

    def damage(source: Path) -> None:
        (source / file).unlink(missing_ok=True)
        (source / file).mkdir()

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = SINGLE) -> Damage:
    """Other tensors in a file that is itself in order."""

    def damage(source: Path) -> None:
        found = load_file(source / file)
        change(found)
        save_file(found, source / file, metadata={"format": "pt"})

    return damage


def value(name: str, number: float, file: str = SINGLE) -> Damage:
    """Another number in a tensor."""

    def change(found: dict[str, torch.Tensor]) -> None:
        wide = found[name].float()
        wide.view(-1)[-1] = number
        found[name] = wide.to(found[name].dtype)

    return tensors(change, file)


def entry(name: str, **changes: Any) -> Damage:
    """Other words in a file's header about a tensor; None takes them away."""

    def damage(source: Path) -> None:
        raw = (source / SINGLE).read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + size])
        said = header[name] | changes
        header[name] = {key: word for key, word in said.items() if word is not None}
        head = json.dumps(header).encode()
        (source / SINGLE).write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + size :])

    return damage


def index(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Another index of a checkpoint of several files."""

    def damage(source: Path) -> None:
        content = json.loads((source / INDEX).read_text())
        change(content)
        (source / INDEX).write_text(json.dumps(content))

    return damage


def first_of_shard(weight_map: dict[str, Any]) -> str:
    return next(name for name, home in weight_map.items() if home == SHARD)


CONFIG_CASES = [
    Case("no config", "v3", lambda s: (s / "config.json").unlink(), "config.json: no such file", "restore it"),
    Case("config not JSON", "v3", text("config.json", "{"), "config.json: not JSON", "restore the file"),
    Case("config no object", "v3", text("config.json", "[]"), "config.json: a JSON list", "restore the file"),
    Case("config unreadable", "v3", folder_for("config.json"), "config.json: Is a directory", "mend the path"),
    Case("another family", "v3", config(model_type="mixtral"), "model_type: got 'mixtral'", "must be one of"),
    Case("field missing", "v3", config(kv_lora_rank=None), "kv_lora_rank: missing", "deepseek_v3 needs it"),
    Case("field unknown", "v3", config(index_topk=8), "index_topk: got 8", "remove it from a copy of config.json"),
    Case("size as text", "v3", config(hidden_size="64"), "hidden_size: got '64'", "restore the file"),
    Case("size below zero", "v3", config(v_head_dim=-12), "v_head_dim: got -12", "must be a whole number from 1"),
    Case("divisor zero", "v3", config(topk_group=0), "topk_group: got 0", "restore the file"),
    Case("layers without end", "v3", config(num_hidden_layers=10**12), "num_hidden_layers: got", "restore the file"),
    Case("rope no object", "v3", config(rope_parameters=[1]), "rope_parameters: got [1]", "must be an object"),
    Case("of a wider model", "v3", config(intermediate_size=128), f"{WEIGHT}: got shape (64, 96)", "restore the file"),
    Case("of a deeper model", "v3", config(num_hidden_layers=5), "model.layers.3", "restore the checkpoint"),
    Case("of a shallower model", "v3", config(num_hidden_layers=1), "num_nextn_predict_layers: got 2", "remove the"),
    Case(
        "other quantisation", "fp8", config(quantization_config={"quant_method": "gptq"}),
        "quantization_config.quant_method: got 'gptq'", "take the checkpoint in bf16 instead",
    ),
    Case(
        "FP8 unannounced", "fp8", config(quantization_config=None),
        f"{WEIGHT}: got dtype F8_E4M3; must be BF16", "restore the file",
    ),
]  # fmt: skip
FILE_CASES = [
    Case("nothing there", "v3", shutil.rmtree, "source-v3: no such directory", "check --hf"),
    Case("no weights", "v3", lambda s: (s / SINGLE).unlink(), "must hold model.safetensors", "save it with"),
    Case("file empty", "v3", text(SINGLE, ""), f"{SINGLE}: 0 bytes, too short", "download or write the file again"),
    Case("file truncated", "v3", cut(SINGLE, 2), f"{SINGLE}: truncated", "download or write the file again"),
    Case("file too long", "v3", cut(SINGLE, -2), f"{SINGLE}: too long", "download or write the file again"),
    Case("file not safetensors", "v3", text(SINGLE, "<html>404 not found</html>"), SINGLE, "download or write"),
    Case("header cut", "v3", lambda s: os.truncate(s / SINGLE, 99), f"{SINGLE}: truncated", "download or write"),
    Case("no dtype", "v3", entry(WEIGHT, dtype=None), f"{WEIGHT}: its header gives no dtype", "download or write"),
    Case("no shape", "v3", entry(WEIGHT, shape=[64, "96"]), f"{WEIGHT}: its header gives no shape", "download or"),
    Case("no place", "v3", entry(WEIGHT, data_offsets=["0", "9"]), f"{WEIGHT}: its header gives no place", "download"),
    Case("places overlap", "v3", entry(WEIGHT, data_offsets=[8, 12296]), "of the data; must begin at", "download or"),
    Case("bytes not of shape", "v3", entry(WEIGHT, shape=[64, 97]), f"{WEIGHT}: 12288 bytes for BF16", "restore it"),
    Case("shard missing", "sharded", lambda s: (s / SHARD).unlink(), SHARD, "download the missing shard"),
    Case("shard truncated", "sharded", cut(SHARD, 1), f"{SHARD}: truncated", "download or write the file again"),
    Case("shard unreadable", "sharded", folder_for(SHARD), f"{SHARD}: [Errno 21] Is a directory", "download or write"),
    Case("index not JSON", "sharded", text(INDEX, "{"), f"{INDEX}: not JSON", "download or write the file again"),
    Case("index unreadable", "sharded", folder_for(INDEX), f"{INDEX}: cannot be read", "download or write"),
    Case("index without map", "sharded", text(INDEX, '{"weight_map": 7}'), f"{INDEX}: no weight_map", "download or"),
    Case("index with a list", "sharded", text(INDEX, '{"weight_map": [7]}'), f"{INDEX}: no weight_map", "download or"),
    Case(
        "index with a number", "sharded", index(lambda i: i["weight_map"].update({WEIGHT: 2})),
        f"weight_map has {WEIGHT} in 2", "download or write",
    ),
    Case(
        "index points nowhere", "sharded", index(lambda i: i["weight_map"].update({WEIGHT: "lost.safetensors"})),
        "lost.safetensors", "download the missing shard",
    ),
    Case(
        "index points elsewhere", "sharded", index(lambda i: i["weight_map"].update({WEIGHT: "../v3.safetensors"})),
        f"weight_map has {WEIGHT} in '../v3.safetensors'", "download or write",
    ),
    Case(
        "index names what no shard holds", "sharded", index(lambda i: i["weight_map"].update({"model.new": SHARD})),
        f"{SHARD} without model.new", "download shard and index from one source",
    ),
    Case(
        "index omits a tensor", "sharded", index(lambda i: i["weight_map"].pop(first_of_shard(i["weight_map"]))),
        f"{SHARD}: holds ", "download shard and index from one source",
    ),
    Case(
        "tensor in two shards", "sharded", tensors(lambda t: t.update({WEIGHT: torch.zeros(64, 96)}), SHARD),
        f"{SHARD}: holds {WEIGHT}; the index has it in", "download shard and index from one source",
    ),
]  # fmt: skip
TENSOR_CASES = [
    Case("tensor missing", "v3", tensors(lambda t: t.pop(WEIGHT)), f"tensor {WEIGHT} is missing", "restore the"),
    Case(
        "tensor extra", "v3", tensors(lambda t: t.update({"model.extra": torch.zeros(2)})),
        "tensor model.extra", "check model_type and num_hidden_layers",
    ),
    Case(
        "shape wrong", "v3", tensors(lambda t: t.update({WEIGHT: t[WEIGHT].mT.contiguous()})),
        f"{WEIGHT}: got shape (96, 64)", "restore the file",
    ),
    Case(
        "dtype whole numbers", "v3", tensors(lambda t: t.update({WEIGHT: t[WEIGHT].long()})),
        f"{WEIGHT}: got dtype I64", "must be BF16 or F32 or F16",
    ),
    Case(
        "dtype double", "v3", tensors(lambda t: t.update({WEIGHT: t[WEIGHT].double()})),
        f"{WEIGHT}: got dtype F64", "restore the file",
    ),
    Case(
        "repeated table of other dtype", "v3", tensors(lambda t: t.update({MTP_EMBEDDING: t[EMBEDDING].float()})),
        f"{MTP_EMBEDDING}: got F32; must be BF16 as {EMBEDDING}", "restore the file",
    ),
    Case("scale missing", "fp8", tensors(lambda t: t.pop(SCALE)), f"its scales {SCALE} are missing", "restore the"),
    Case(
        "scale in bf16", "fp8", tensors(lambda t: t.update({SCALE: t[SCALE].bfloat16()})),
        f"{SCALE}: got BF16 (1, 1); must be F32", "restore the file",
    ),
    Case(
        "scale misshapen", "fp8", tensors(lambda t: t.update({SCALE: torch.ones(2, 1)})),
        f"{SCALE}: got F32 (2, 1); must be F32 (1, 1)", "restore the file",
    ),
    Case(
        "scale without FP8", "fp8", tensors(lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()})),
        f"{WEIGHT}: BF16, yet it has scales {SCALE}", "restore the file",
    ),
    Case("former scales cut", "former_fp8", cut(SCALES, 3), f"{SCALES}: truncated", "restore it"),
    Case(
        "former scales misshapen", "former_fp8", tensors(lambda t: t.update({SCALE: torch.ones(2, 1)}), SCALES),
        f"{SCALES}: {SCALE}: got F32 (2, 1); must be F32 (1, 1)", "move it away",
    ),
    Case(
        "former scales of nothing", "former_fp8", tensors(lambda t: t.update({"x_scale_inv": torch.ones(1)}), SCALES),
        f"{SCALES}: x_scale_inv", "restore the file",
    ),
]  # fmt: skip
NUMBER_CASES = [
    *(
        late(f"scale {number}", "fp8", value(SCALE, number), f"{WEIGHT}: a scale is NaN, inf", "restore it")
        for number in (math.nan, math.inf, 0.0, -1.0)
    ),
    late("scale huge", "fp8", value(SCALE, 3e38), f"{WEIGHT}: a scale is NaN, inf", "above 2^119"),
    late("FP8 value NaN", "fp8", value(WEIGHT, math.nan), f"{WEIGHT}: an FP8 value is NaN", "restore it"),
    late("weight NaN", "v3", value(WEIGHT, math.nan), f"{WEIGHT}: a weight is NaN", "or convert to bf16", dtype="fp8"),
    late("weight inf", "v3", value(WEIGHT, math.inf), f"{WEIGHT}: a weight is NaN", "mend the", dtype="fp8"),
    late("repeated table differs", "v3", value(MTP_EMBEDDING, 9), f"{MTP_EMBEDDING}: differs", "make them equal"),
    late("repeated head differs", "v3", value(MTP_HEAD, 9), f"{MTP_HEAD}: differs", "make them equal"),
    late("NaN scale to Megatron", "fp8", value(SCALE, math.nan), WEIGHT, "restore it", to="megatron", dtype=None),
]
CASES = [*CONFIG_CASES, *FILE_CASES, *TENSOR_CASES, *NUMBER_CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_damage_is_named_with_its_remedy(case: Case, bench: Any) -> None:
    bench.check(case)


@pytest.mark.parametrize("of", ["v3", "sharded", "fp8", "former_fp8"])
@pytest.mark.parametrize(("to", "dtype"), [("megatron", None), ("hf", "bf16"), ("hf", "fp8")])
def test_the_same_checkpoints_convert_undamaged(of: str, to: str, dtype: str | None, bench: Any) -> None:
    outcome = bench.convert(bench.copy(of), to=to, dtype=dtype)
    assert outcome.out.is_dir() and not bench.partial.exists()
    assert (outcome.out / "conversion.json").is_file() and not (outcome.out / ".progress").exists()


def test_a_file_cut_after_the_check(bench: Any) -> None:
    source = bench.copy("v3")

    def progress(done: int, total: int) -> None:
        cut(SINGLE, 2)(source)

    bench.refused(source, (f"{SINGLE}: ends at byte", "restore it"), progress=progress)


def test_a_file_cut_while_it_is_read(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "PART_BYTES", 1 << 16)
    source = bench.copy("v3")

    def progress(done: int, total: int) -> None:
        if done:
            os.truncate(source / SINGLE, 1 << 17)

    bench.refused(source, (f"{SINGLE}: ends at byte {1 << 17}", "restore it"), progress=progress)


def test_a_checkpoint_gone_after_the_check(bench: Any) -> None:
    source = bench.copy("v3")

    def progress(done: int, total: int) -> None:
        shutil.rmtree(source)

    bench.refused(source, (f"{SINGLE}: No such file", "run the same command again"), progress=progress)


def test_a_name_that_the_system_refuses(bench: Any) -> None:
    bench.refused(bench.folder / ("x" * 300), ("File name too long", "mend the path"))
