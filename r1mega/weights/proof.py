"""Do the servers hold what was published? Their checksums of every parameter against those that the tensors make."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
import torch.distributed as dist

from r1mega.models.hf_fields import HfFields
from r1mega.parallel.collectives import share
from r1mega.types import EngineFault, Servers
from r1mega.weights.checksums import ExpectedChecksums, compare, reported_by_rank, sampled
from r1mega.weights.engine_layout import EngineLayout
from r1mega.weights.engine_params import EngineBuild, EngineParam, engine_params

_NAMED = 8  # mismatches that a message names


class PublishError(RuntimeError):
    """The servers do not hold what was published, twice in a row."""


def publish_twice(publish: Callable[[], list[str]], version: int, *, speaks: bool) -> None:
    """Publish, and once more where that found faults; `publish` returns the same on every rank.

    `speaks`: whether this rank tells of the first time. Raises PublishError on every rank where it fails again.
    """
    faults: list[str] = []
    for attempt in (1, 2):
        faults = publish()
        if not faults:
            return
        if attempt == 1 and speaks:
            print(f"weights {version} did not arrive, publishing again: {'; '.join(faults)}", file=sys.stderr)
    raise PublishError("\n".join([f"weights {version} did not arrive, published twice:", *faults]))


def speaker(
    servers: Servers | None, group: dist.ProcessGroup
) -> Callable[[Callable[[Servers], list[str] | None]], list[str]]:
    """What every rank calls to hear what the servers found wrong with something that is said to them.

    `servers` is None but on the rank that speaks to them, rank 0 of the group. Collective.
    """

    def speak(say: Callable[[Servers], list[str] | None]) -> list[str]:
        faults: list[str] = []
        if servers is not None:
            try:
                faults = say(servers) or []
            except EngineFault as error:
                faults = [str(error)]
        return share(faults, group)

    return speak


class PublishProof:
    """What servers of one kind have to report.

    Args:
        layout: of one server; all are alike.
        dtype: that they hold weights in.
        share: of the parameters, whose checksums are compared, others at each version; 0 compares none.
    """

    def __init__(
        self, fields: HfFields, layout: EngineLayout, build: EngineBuild, dtype: torch.dtype, share: float
    ) -> None:
        # What several ranks hold alike, each whole, is one object, and hashed once where the tensors are told to all.
        same: dict[EngineParam, EngineParam] = {}
        self._params = [
            [same.setdefault(param, param) for param in engine_params(fields, layout, rank, build)]
            for rank in range(layout.num_ranks if share else 0)
        ]
        self._dtype, self._device, self.share = dtype, build.device, share

    @property
    def tensors(self) -> set[str]:
        """Names of all that the parameters are made of."""
        return {name for params in self._params for param in params for name in param.tensors}

    def expect(self, version: int, ranks: Sequence[int] | None = None, tensors: Set[str] | None = None) -> Expectation:
        """Ready for the tensors of one publish, each of them told to all ranks of a server; or, of these `ranks` alone,
        to each.

        With `tensors`, for the parameters that are made of these alone; see `together`.
        """
        wanted = range(len(self._params)) if ranks is None else ranks if self._params else ()
        hashing: dict[int, ExpectedChecksums] = {}
        alike: dict[int, dict[str, int]] = {}
        hashed_by: dict[int, int] = {}  # by a parameter's identity
        for rank in wanted:
            due = [
                param
                for param in sampled(self._params[rank], version, self.share)
                if tensors is None or all(name in tensors for name in param.tensors)
            ]
            alike[rank] = {param.name: hashed_by[id(param)] for param in due if id(param) in hashed_by}
            own = [param for param in due if param.name not in alike[rank]]
            hashing[rank] = ExpectedChecksums(own, dtype=self._dtype, device=self._device)
            if ranks is None:
                hashed_by |= {id(param): rank for param in own}
        return Expectation(hashing, alike)

    def together(self) -> list[tuple[str, ...]]:
        """Names of the tensors that one parameter of some rank is made of, where it is several."""
        found = {param.tensors: None for params in self._params for param in params if len(param.tensors) > 1}
        return list(found)

    def merged(self, parts: Sequence[Mapping[int, Mapping[str, str]]], version: int) -> dict[int, dict[str, str]]:
        """The checksums of one publish that several ranks hashed. Raises AssertionError where one is missing."""
        digests: dict[int, dict[str, str]] = {rank: {} for rank in range(len(self._params))}
        for part in parts:
            for rank, found in part.items():
                digests[rank] |= found
        for rank, params in enumerate(self._params):
            assert digests[rank].keys() == {param.name for param in sampled(params, version, self.share)}
        return digests

    def faults(self, expected: Mapping[int, Mapping[str, str]], answers: Sequence[Mapping[str, Any]]) -> list[str]:
        """What differs, by server, rank and tensor; empty where nothing does."""
        found = []
        for server, answer in enumerate(answers):
            reported = reported_by_rank(answer)
            for rank, params in enumerate(self._params):
                if rank not in reported:
                    found.append(f"engine {server} rank {rank}: reports nothing")
                    continue
                mismatches = compare(params, expected[rank], reported[rank])
                found += [f"engine {server} rank {rank}: {mismatch}" for mismatch in mismatches]
        more = [f"and {len(found) - _NAMED} more parameters"] if len(found) > _NAMED else []
        return found[:_NAMED] + more


class Expectation:
    """The checksums of one publish, by rank of a server, hashed while its tensors pass by.

    Args:
        alike: of each rank the parameters that an earlier one holds alike, with that rank: they are hashed there alone.
    """

    def __init__(self, hashing: Mapping[int, ExpectedChecksums], alike: Mapping[int, Mapping[str, int]]) -> None:
        self._hashing, self._alike = hashing, alike

    def wants(self, name: str, rank: int | None = None) -> bool:
        """Whether a tensor counts for some rank, or for this one."""
        return any(one.takes(name) for number, one in self._hashing.items() if rank is None or number == rank)

    def add(self, name: str, tensor: torch.Tensor, rank: int | None = None) -> None:
        """Take a tensor as it is sent, to one rank or to all."""
        for number, one in self._hashing.items():
            if rank is None or number == rank:
                one.add(name, tensor)

    def results(self) -> dict[int, dict[str, str]]:
        """rank -> parameter -> checksum. Raises ValueError where a tensor did not come."""
        found = {rank: one.result() for rank, one in self._hashing.items()}
        return {
            rank: own | {name: found[at][name] for name, at in self._alike[rank].items()} for rank, own in found.items()
        }


def build_of(device: str, extra_args: Sequence[str]) -> EngineBuild:
    """What the servers' further arguments say of their parameters."""
    text = " ".join(extra_args).replace("=", " ").split()
    value = dict(zip(text, text[1:], strict=False))
    return EngineBuild(
        device=device,
        fuse_shared_experts=False if "--disable-shared-experts-fusion" in text else None,
        whole_shared_experts=value.get("--moe-a2a-backend", "none") != "none",
        whole_dense_mlps=value.get("--moe-dense-tp-size") == "1",
        dp_lm_head="--enable-dp-lm-head" in text,
    )
