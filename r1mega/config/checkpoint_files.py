"""Are a Hugging Face checkpoint's files all there and whole? Answered from file headers, no tensor is read."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from r1mega.config.faults import Fault

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The safetensors format caps its header at 100 MB; a larger length means the file is something else.
MAX_HEADER_BYTES = 100_000_000
MODEL_FOLDER, METADATA = "model", ".metadata"
"""What marks a directory as a Megatron checkpoint: config.json and tokenizer beside a folder of distributed tensors."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip
_TOKENIZER_MARKS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")  # one is always there


def is_megatron(directory: Path) -> bool:
    """Whether a checkpoint directory holds Megatron's distributed tensors instead of safetensors files."""
    return (directory / MODEL_FOLDER / METADATA).is_file()


def read_json_object(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError with a one-line reason where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at line {error.lineno})") from error
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {type(found).__name__}, not an object")
    return found


def read_header(path: Path) -> dict[str, dict]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file.

    The format: 8 bytes little-endian header length, that many bytes of JSON, then the data, whose size is the largest
    end in `data_offsets`.

    Raises ValueError with a one-line reason where the header is unreadable or the file's length differs.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"{size} bytes, too short for a safetensors file")
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > MAX_HEADER_BYTES:
            raise ValueError("not a safetensors file (implausible header length)")
        text = file.read(header_bytes)
    if len(text) < header_bytes:
        raise ValueError(f"truncated: {size} bytes, the header alone needs {8 + header_bytes}")
    try:
        header = json.loads(text)
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        data_bytes = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError("not a safetensors file (its header is not the expected JSON)") from error
    expected = 8 + header_bytes + data_bytes
    if size != expected:
        word = "truncated" if size < expected else "too long"
        raise ValueError(f"{word}: {size} bytes, its header says {expected}")
    _check_entries(tensors)
    return tensors


def _check_entries(tensors: dict[str, dict]) -> None:
    """Raise ValueError naming a tensor without a dtype, a shape or a place, or one that another overlaps."""
    for name, entry in tensors.items():
        dtype, shape, place = entry.get("dtype"), entry.get("shape"), entry["data_offsets"]
        if not isinstance(dtype, str):
            raise ValueError(f"{name}: its header gives no dtype")
        if not _are_sizes(shape):
            raise ValueError(f"{name}: its header gives no shape")
        if not _are_sizes(place) or len(place) != 2 or place[0] > place[1]:
            raise ValueError(f"{name}: its header gives no place in the file")
    end = 0
    for (begin, next_end), name in sorted((entry["data_offsets"], name) for name, entry in tensors.items()):
        if begin != end:
            raise ValueError(f"{name}: begins at byte {begin} of the data; must begin at {end}, where another ends")
        end = next_end


def _are_sizes(found: object) -> bool:
    return isinstance(found, list) and all(type(number) is int and number >= 0 for number in found)


def check_weights(directory: Path, field: str) -> list[Fault]:
    """Faults of the safetensors files of a checkpoint directory, sharded (with an index) or single."""
    if (directory / INDEX).exists():
        return _check_sharded(directory, field)
    path = directory / SINGLE
    if not path.is_file():
        constraint = f"must hold {SINGLE} or {INDEX}"
        remedy = "save it with save_pretrained(safe_serialization=True), or set model.init=random"
        return [Fault(field, str(directory), constraint, remedy)]
    try:
        read_header(path)
    except (ValueError, OSError) as error:
        return [_broken(field, path, error)]
    return []


def tensor_names(directory: Path) -> set[str]:
    """Names of all tensors of a checkpoint directory, as far as its index and headers can be read."""
    if (directory / INDEX).exists():
        try:
            weight_map = read_json_object(directory / INDEX).get("weight_map")
        except ValueError:
            return set()
        return set(weight_map) if isinstance(weight_map, dict) else set()
    try:
        return set(read_header(directory / SINGLE))
    except (ValueError, OSError):
        return set()


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape over all files of a checkpoint directory that `check_weights` found whole."""
    files = [SINGLE]
    if (directory / INDEX).exists():
        files = sorted(set(read_json_object(directory / INDEX)["weight_map"].values()))
    return {name: tuple(entry["shape"]) for file in files for name, entry in read_header(directory / file).items()}


def check_tokenizer(directory: Path, field: str) -> list[Fault]:
    """A fault where a directory holds no tokenizer file that transformers could load."""
    if any((directory / name).is_file() for name in _TOKENIZER_MARKS):
        return []
    constraint = f"must hold a tokenizer ({', '.join(_TOKENIZER_MARKS)})"
    return [Fault(field, str(directory), constraint, "copy the tokenizer files there or set model.tokenizer=DIR")]


def _check_sharded(directory: Path, field: str) -> list[Fault]:
    index_path = directory / INDEX
    try:
        weight_map = read_json_object(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("no weight_map in it")
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(f"weight_map has {name} in {shard!r}, which is no file name")
    except ValueError as error:
        return [_broken(field, index_path, error)]
    faults: list[Fault] = []
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        try:
            present = read_header(path)
        except FileNotFoundError:
            constraint = f"every shard that {INDEX} names must be there"
            faults.append(Fault(field, f"no file {path}", constraint, "download the missing shard"))
            continue
        except (ValueError, OSError) as error:
            faults.append(_broken(field, path, error))
            continue
        absent = sorted(name for name, home in weight_map.items() if home == shard and name not in present)
        if absent:
            got = f"{path} without {absent[0]}" + (f" and {len(absent) - 1} more tensors" if len(absent) > 1 else "")
            faults.append(Fault(field, got, f"must hold what {INDEX} says", "download shard and index from one source"))
    return faults


def _broken(field: str, path: Path, error: Exception) -> Fault:
    return Fault(field, f"{path}: {error}", "must be a whole, readable file", "download or write the file again")
