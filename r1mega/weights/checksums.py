"""What an engine rank must report of its parameters after a publish, and what differs from what it does report.

SGLang skips names that it does not know and says that the load succeeded. But its `/weights_checker` gives a checksum
of every parameter that it holds, and those follow from the Hugging Face tensors alone (`engine_params`, `engine_hash`).
So the trainer hashes what it published as it would lie in the engine: whatever was skipped, is stale or has one wrong
bit is found, and told by the names of both sides.

    params = engine_params(fields, layout, rank)
    expected = ExpectedChecksums(params, dtype=torch.bfloat16)
    for name, tensor in published:
        expected.add(name, tensor)
    mismatches = compare(params, expected.result(), reported_by_rank(answer)[rank])

Every tensor has to come; one that this rank has nothing of is passed over. Checksums tell that the bytes are the same,
not that the engine multiplies with them rightly: that is what the log-probs of `verify` are for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from r1mega.weights.engine_hash import hash_for
from r1mega.weights.engine_params import EngineParam, Part

_PIECE_BYTES = 1 << 24  # hashed at once


@dataclass(frozen=True)
class Mismatch:
    """A parameter that is not as it must be.

    Args:
        param: SGLang's name.
        tensors: the Hugging Face tensors that it is made of; none of one that is unknown.
        kind: "different", "missing" (the engine does not report it), or "unknown" (only the engine knows it).
    """

    param: str
    tensors: tuple[str, ...]
    kind: str

    def __str__(self) -> str:
        told = {
            "different": "the engine's is not what was published",
            "missing": "the engine reports none of this name",
            "unknown": "the engine reports one that the model has no tensors for",
        }[self.kind]
        return f"{self.param}: {told}" + (f" (from {_few(self.tensors)})" if self.tensors else "")


class ExpectedChecksums:
    """The checksums of one engine rank, from tensors that come one at a time, in any order.

    A parameter is hashed as its next bytes come. What comes before its turn is copied and held, so tensors in the order
    of a checkpoint need little memory: of experts one after the other, one at most.

    Args:
        params: those to hash, as `engine_params` gives them or `sampled` chose.
        dtype: that the engine serves the model in; tensors are rounded to it, those kept in fp32 to that.
        device: of the engine, "cpu" or "cuda", whose hashes differ (see `engine_hash`).
    """

    def __init__(self, params: Sequence[EngineParam], *, dtype: torch.dtype, device: str = "cuda") -> None:
        self._hashing = [
            _Hashing(param, torch.float32 if param.dtype_kind == "fp32" else dtype, device) for param in params
        ]
        self._takers: dict[str, list[tuple[_Hashing, int]]] = {}
        for hashing in self._hashing:
            for index, part in enumerate(hashing.parts):
                self._takers.setdefault(part.tensor, []).append((hashing, index))
        self._waiting = set(self._takers)

    @property
    def held_bytes(self) -> int:
        """Bytes of what came before its turn."""
        return sum(hashing.held_bytes for hashing in self._hashing)

    def takes(self, name: str) -> bool:
        """Whether a parameter here has anything of a tensor."""
        return name in self._takers

    def add(self, name: str, tensor: torch.Tensor) -> bool:
        """Take a Hugging Face tensor, whole. False where no parameter here has anything of it.

        Raises:
            ValueError: it has another shape than the model's, or came before.
        """
        takers = self._takers.get(name)
        if takers is None:
            return False
        whole = takers[0][0].parts[takers[0][1]].whole
        if tuple(tensor.shape) != whole:
            raise ValueError(f"{name}: got {list(tensor.shape)}; must be {list(whole)}, as config.json says")
        if name not in self._waiting:
            raise ValueError(f"{name}: came twice; a checksum is of one publish; start another")
        self._waiting.remove(name)
        for hashing, index in takers:
            hashing.take(index, tensor)
        return True

    def result(self) -> dict[str, str]:
        """16 hex digits of every parameter. Raises ValueError naming those whose tensors did not come."""
        lacking = [
            f"{hashing.param.name}: {_few(absent)} never came"
            for hashing in self._hashing
            if (absent := [name for name in hashing.param.tensors if name in self._waiting])
        ]
        if lacking:
            raise ValueError("expected checksums: not everything was published\n" + "\n".join(lacking))
        return {hashing.param.name: hashing.finish() for hashing in self._hashing}


def compare(params: Sequence[EngineParam], expected: Mapping[str, str], reported: Mapping[str, str]) -> list[Mismatch]:
    """Everything that differs, in the order of `params`, then what is unknown.

    Args:
        params: all of the rank, also where only some were hashed: their names are compared all the same.
        expected: name -> 16 hex digits, from `ExpectedChecksums.result`.
        reported: likewise, from the engine.
    """
    found = []
    for param in params:
        if param.name not in reported:
            found.append(Mismatch(param.name, param.tensors, "missing"))
        elif reported[param.name] != expected.get(param.name, reported[param.name]):
            found.append(Mismatch(param.name, param.tensors, "different"))
    known = {param.name for param in params}
    return found + [Mismatch(name, (), "unknown") for name in reported if name not in known]


def reported_by_rank(answer: Mapping[str, Any]) -> dict[int, dict[str, str]]:
    """What `/weights_checker {"action": "checksum"}` answered: of each rank name -> 16 hex digits.

    What a draft model reports (multi-token prediction) is left out; SGLang puts its role before its names. A rank may
    report several times: with data parallel attention each part answers for all ranks, and whole copies of a model
    count their ranks from 0 each.

    Raises:
        ValueError: the engine failed, the answer is not of this kind, or a rank's reports are not alike.
    """
    found: dict[int, dict[str, str]] = {}
    try:
        if not answer["success"]:
            raise ValueError(f"weights_checker: the engine failed: {answer['message']}")
        for entry in answer["ranks"]:
            infos = entry["parallelism_info"]
            drafts = tuple(f"{info['role']}." for info in infos if info["role"] != "target")
            rank = infos[0]["rank"]
            told = {name: digits for name, digits in entry["checksums"].items() if not name.startswith(drafts)}
            if found.setdefault(rank, told) != told:
                unlike = sorted({name for name, _ in found[rank].items() ^ told.items()})
                raise ValueError(f"weights_checker: rank {rank} reported twice, of {_few(unlike)} not the same")
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"weights_checker: not an answer of SGLang 0.5.21's checksum action ({error!r})") from None
    return found


def sampled(params: Sequence[EngineParam], version: int, share: float) -> list[EngineParam]:
    """A share of the parameters, another one for each weight version, in the order of `params`.

    The parameters stand on a circle in the order of a hash of their names, and each version takes the stretch after the
    last one's. So ceil(1 / share) consecutive versions see every parameter, and each sees kinds and layers mixed. It
    counts parameters, not bytes, and chooses the same names on all ranks. Raises ValueError for a share not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share of the parameters: got {share}; must be over 0 and at most 1")
    size = len(params)
    order = sorted(range(size), key=lambda index: hashlib.sha256(params[index].name.encode()).digest())
    count = math.ceil(size * share)
    return [params[index] for index in sorted(order[(version * count + at) % size] for at in range(count))]


class _Hashing:
    """One parameter: the hash so far, the part that is next, and the parts that came before their turn.

    The parameter is seen as rows: of the last dim, or of single elements where it has no other.
    """

    def __init__(self, param: EngineParam, dtype: torch.dtype, device: str) -> None:
        self.param, self.parts, self._dtype = param, param.parts, dtype
        self._columns = param.shape[-1] if len(param.shape) > 1 else 1
        elements = math.prod(param.shape)
        self._rows = elements // self._columns
        self._hash = hash_for(device, elements * dtype.itemsize)
        self._on_host = device == "cpu"
        self._next = self._row = 0
        self._held: dict[int, torch.Tensor] = {}
        self._done: str | None = None

    @property
    def held_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._held.values())

    def take(self, index: int, tensor: torch.Tensor) -> None:
        part = self.parts[index]
        cut = tensor.detach()[tuple(slice(at, at + size) for at, size in zip(part.offset, part.shape, strict=True))]
        if index != self._next:
            # A copy: the sender may fill the tensor's memory anew, and a view would keep all of it.
            device = torch.device("cpu") if self._on_host else cut.device
            self._held[index] = cut.to(device, self._dtype, copy=True, memory_format=torch.contiguous_format)
            return
        self._feed(part, cut)
        while self._next in self._held:
            self._feed(self.parts[self._next], self._held.pop(self._next))

    def finish(self) -> str:
        if self._done is None:
            self._zeros(self._rows)
            self._done = self._hash.hex()
        return self._done

    def _feed(self, part: Part, cut: torch.Tensor) -> None:
        self._zeros(self._first_row(part))
        self._next += 1
        is_whole = cut.numel() == cut.shape[0] * self._columns
        if self._on_host and cut.dtype == self._dtype and is_whole and cut.is_contiguous():
            # As it lies there: small tensors cost what is done to each more than their bytes do.
            self._hash.update(cut.view(-1).view(torch.uint8))
            self._row += cut.shape[0]
            return
        cut = cut.reshape(cut.shape[0], -1)
        step = max(_PIECE_BYTES // (self._columns * self._dtype.itemsize), 1)
        for piece in cut.split(step):
            piece = piece.to(self._dtype)
            if piece.shape[1] < self._columns:
                piece = F.pad(piece, (0, self._columns - piece.shape[1]))
            self._hash.update(piece.contiguous().view(-1).view(torch.uint8))
        self._row += cut.shape[0]

    def _zeros(self, until: int) -> None:
        """Nothing stands in the rows from the last part to the next."""
        assert until >= self._row, "parts out of order"
        nbytes = (until - self._row) * self._columns * self._dtype.itemsize
        for begin in range(0, nbytes, _PIECE_BYTES):
            self._hash.update(torch.zeros(min(_PIECE_BYTES, nbytes - begin), dtype=torch.uint8))
        self._row = until

    def _first_row(self, part: Part) -> int:
        assert len(part.shape) == 1 or part.at[-1] == 0, "parts begin at the first column"
        row = 0
        for at, size in zip(part.at, self.param.shape[: max(len(part.at) - 1, 1)], strict=False):
            row = row * size + at
        return row


def _few(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are: a parameter of experts has hundreds."""
    told = ", ".join(names[:most])
    return told + (f" and {len(names) - most} more" if len(names) > most else "")
