"""A conversion from beginning to end: check, plan, write in parallel, prove, move into place.

Everything is written under OUT.partial and renamed at the end, so nothing that looks finished stands at OUT before it
is. A conversion that was killed is continued by the same command: parts whose every byte is as recorded are kept.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from r1mega.config import checkpoint_files
from r1mega.config.checkpoint_files import MODEL_FOLDER
from r1mega.conversion import config_files, proof
from r1mega.conversion.config_files import Edit
from r1mega.conversion.hf_source import HfSource
from r1mega.conversion.plan import ConversionPlan, Part, plan_hf, plan_megatron
from r1mega.conversion.worker import PROGRESS_FOLDER, Worker, record_path
from r1mega.models import hf_fields
from r1mega.models.dist_tensors import Piece, pieces_of

if TYPE_CHECKING:  # it imports torch.distributed.checkpoint, which other conversions need not wait for
    from r1mega.conversion.megatron_source import MegatronSource

PARTIAL = ".partial"
_FORMAT = 1  # of the plan: a conversion begun by another format is not continued


@dataclass(frozen=True)
class Request:
    """What to convert. `to` is "megatron" or "hf"; `dtype` "bf16", "fp8" or None for each tensor's own."""

    source: Path
    source_kind: str
    out: Path
    to: str
    dtype: str | None = None
    workers: int = 1
    changes: dict[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Outcome:
    """What a conversion did."""

    out: Path
    tensors: int
    read_bytes: int
    written_bytes: int
    kept_parts: int
    parts: int
    edits: list[Edit]


class ConversionError(ValueError):
    """A conversion failed while it was running; what is done is kept under OUT.partial."""


def convert(request: Request, progress: Callable[[int, int], None] = lambda done, total: None) -> Outcome:
    """Convert a checkpoint; `progress(bytes read, bytes in all)` is called as parts are done.

    Raises ValueError for a source or request that cannot be converted, before anything is written; ConversionError
    where a tensor turns out damaged, a worker is gone or the disk is full.
    """
    _check_places(request)
    torch.set_num_threads(1)  # here; a process that has started others' threads cannot be forked
    source = open_source(request.source, request.source_kind)
    config, edits, plan = _plan(request, source)
    tokenizer = request.tokenizer or request.source
    config_files.check_tokenizer(tokenizer, source.fields, must_be=request.tokenizer is not None)
    partial = _partial(request)
    with _begun(partial, _fingerprint(request, source, plan), plan):
        _check_space(partial, plan)
        total, done, kept = sum(part.read_bytes for part in plan.parts), 0, 0
        progress(done, total)
        for part, was_there in _made(request, source, partial, plan.parts):
            done, kept = done + part.read_bytes, kept + was_there
            progress(done, total)
        works = [work for part in plan.parts for work in proof.read_record(partial, part)]
        report = proof.check(source, plan, works)
        _complete(request, partial, plan, works)
        copied = config_files.write(partial, request.source, tokenizer, config)
        proof.write(partial, request, source, report, [str(edit) for edit in edits], copied)
        if os.path.lexists(request.out):
            raise ConversionError(
                f"--out {request.out}: appeared while {partial} was written; move it away and run the command again"
            )
        partial.rename(request.out)
    shutil.rmtree(request.out / PROGRESS_FOLDER, ignore_errors=True)
    return Outcome(request.out, len(report.sources), total, plan.write_bytes, kept, len(plan.parts), edits)


def open_source(path: Path, kind: str) -> HfSource | MegatronSource:
    """The checkpoint of the kind "hf" or "megatron". Raises ValueError for all that is wrong with it."""
    try:
        if kind == "hf":
            return HfSource(path)
        from r1mega.conversion.megatron_source import MegatronSource

        return MegatronSource(path)
    except OSError as error:
        raise ValueError(
            f"{error.filename or path}: {error.strerror}; must be readable; mend the path or its permissions"
        ) from error


def _plan(request: Request, source: HfSource | MegatronSource) -> tuple[dict[str, Any], list[Edit], ConversionPlan]:
    raw = checkpoint_files.read_json_object(request.source / "config.json")
    config, edits = config_files.edited(source.fields, raw, request.dtype, request.changes)
    target = hf_fields.parse(config, request.out / "config.json", allow_fp8=True)
    made = list(pieces_of(replace(target, num_mtp_layers=source.fields.num_mtp_layers)))
    pairs = list(_pairs(source.pieces, made))
    plan = plan_megatron(source, pairs) if request.to == "megatron" else plan_hf(source, pairs, request.dtype)
    return config, edits, plan


def _pairs(read: list[Piece], made: list[Piece]) -> Iterator[tuple[Piece, Piece]]:
    """Each piece of the target with the piece of the source that it is made of."""
    by_name = {piece.tensors[0].name: piece for piece in read}
    for piece in made:
        name = piece.tensors[0].name
        # A table that the source shares with the embedding.
        yield by_name.get(name) or by_name["model.embed_tokens.weight"], piece


def _check_places(request: Request) -> None:
    source, out, partial = (path.resolve() for path in (request.source, request.out, _partial(request)))
    if os.path.lexists(request.out):
        raise ValueError(f"--out {request.out}: exists; must be a new directory; choose another or move it away")
    if any(place.is_relative_to(source) or source.is_relative_to(place) for place in (out, partial)):
        raise ValueError(
            f"--out {request.out}: it and {partial} must stand outside the source {request.source}; choose another"
        )
    if request.workers < 1:
        raise ValueError(f"--workers {request.workers}: must be at least 1")


def _partial(request: Request) -> Path:
    """OUT under its unfinished name."""
    return request.out.with_name(request.out.name + PARTIAL)


def _fingerprint(request: Request, source: HfSource | MegatronSource, plan: ConversionPlan) -> str:
    """Names the work: the same for the same files, options and plan, whatever the number of workers."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.files()]
    outputs = [[(o.name, o.dtype, o.shape, o.file, o.at) for o in work.outputs] for p in plan.parts for work in p.works]
    content = [_FORMAT, str(request.source.resolve()), files, request.to, request.dtype, request.changes, outputs]
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())


@contextmanager
def _begun(partial: Path, fingerprint: str, plan: ConversionPlan) -> Iterator[None]:
    """Hold OUT.partial for this process, with the heads of all files in it: made anew, or found as this work's."""
    progress = partial / PROGRESS_FOLDER
    try:
        if partial.is_dir() and not progress.is_dir() and any(partial.iterdir()):
            raise ValueError(
                f"{partial}: holds files that no unfinished conversion left; delete it or move it away, or choose "
                "another --out"
            )
        progress.mkdir(parents=True, exist_ok=True)
        with open(progress / "lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"{partial}: another conversion is writing here; wait for it or choose another --out"
                ) from None
            stamp, temporary = progress / "fingerprint", progress / "fingerprint.tmp"
            if stamp.exists() and stamp.read_text(encoding="utf-8") != fingerprint:
                raise ValueError(
                    f"{partial}: was begun from another source, by other options or another release; "
                    "delete it to begin anew, or choose another --out"
                )
            _lay_files(partial, plan)
            temporary.write_text(fingerprint, encoding="utf-8")
            os.replace(temporary, stamp)
            yield
    except OSError as error:
        raise ConversionError(
            f"{error.filename or partial}: {error.strerror or error}; {partial} keeps what is done; make room or mend "
            "the path, then run the same command again"
        ) from error


def _lay_files(partial: Path, plan: ConversionPlan) -> None:
    """Give every file its head and its length; what parts wrote into it stays."""
    (partial / MODEL_FOLDER).mkdir(exist_ok=True)
    for file, head in plan.heads.items():
        with open(os.open(partial / file, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as target:
            target.write(head)
            target.truncate(plan.file_bytes[file])


def _check_space(partial: Path, plan: ConversionPlan) -> None:
    begun = (part for part in plan.parts if record_path(partial, part.index).exists())
    done = sum(output.nbytes for part in begun for work in part.works for output in work.outputs)
    free, needed = shutil.disk_usage(partial).free, plan.write_bytes - done
    if free < needed:
        raise ValueError(
            f"--out: {partial.parent} has {free:,} bytes free; {needed:,} are needed; make room or choose another disk"
        )


def _made(
    request: Request, source: HfSource | MegatronSource, partial: Path, parts: Sequence[Part]
) -> Iterator[tuple[Part, bool]]:
    """Each part once it stands, and whether it did before, by `request.workers` processes."""
    workers = min(request.workers, len(parts))
    pool = ProcessPoolExecutor(
        workers,
        # Forked, they share the opened source and need not import torch again. This process has no threads by then.
        mp_context=multiprocessing.get_context("fork"),
        initializer=_begin_worker,
        initargs=(source, partial),
    )
    waiting = iter(parts)
    running: dict[Future[bool], Part] = {}
    try:
        while True:
            # A few parts ahead of the workers, so that a fault ends the run soon.
            while len(running) < 2 * workers and (part := next(waiting, None)) is not None:
                running[pool.submit(_run_part, part)] = part
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise ConversionError(
            f"a worker ended without a word, as when the system is out of memory; {partial} keeps what is done; run "
            f"the same command with --workers below {workers}"
        ) from None
    except ValueError as error:
        raise ConversionError(f"{error}; {partial} keeps what is done and is not finished") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker: Worker | None = None


def _begin_worker(source: HfSource | MegatronSource, target: Path) -> None:
    global _worker
    torch.set_num_threads(1)  # the operations are small, and threads that wait for each other slow them many times
    _worker = Worker(source, target)


def _run_part(part: Part) -> bool:
    assert _worker is not None
    return _worker.run(part)


def _complete(request: Request, partial: Path, plan: ConversionPlan, works: list[dict[str, Any]]) -> None:
    """What makes the written tensors a checkpoint of their format."""
    if request.to == "megatron":
        from r1mega.conversion import dist_metadata

        dist_metadata.write(partial, (entry for work in works for entry in work["to"] if "key" in entry))
        return
    if (partial / MODEL_FOLDER).is_dir():  # not where an earlier run was stopped after this line
        (partial / MODEL_FOLDER).rmdir()
    outputs = [output for part in plan.parts for work in part.works for output in work.outputs]
    if len({output.file for output in outputs}) > 1:
        index = {
            "metadata": {"total_size": sum(output.nbytes for output in outputs)},
            "weight_map": {output.name: output.file for output in outputs},
        }
        (partial / checkpoint_files.INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
