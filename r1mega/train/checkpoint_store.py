"""The checkpoints of one run on disk: written beside, renamed into place, so that a kill leaves a whole one.

Under the store's root (RUN_DIR/checkpoints) lie

    latest                    the name of the checkpoint to resume from, such as `update-000012`
    update-000012/            a whole checkpoint: what the ranks wrote, and manifest.json (sizes, digests, facts)
    update-000016.partial/    one being written; never read
    update-000012.replaced/   the former one while a new one takes its place; read where that is missing
    update-000004.removed-0/  one being deleted; never read

`begin` clears up what a kill has left of the last three. A directory is deleted only under a name that is never read
and `latest` moves only after what it will name is on disk, so at each moment the checkpoint that it names is whole.
One process at a time may write (rank 0 of the run); any number may read meanwhile.
"""

from __future__ import annotations

import itertools
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1mega.train import checkpoint_manifest as manifests
from r1mega.train.checkpoint_manifest import MANIFEST, name_of, update_of

LATEST = "latest"
PARTIAL, REPLACED, REMOVED = ".partial", ".replaced", ".removed-"
_ATTEMPTS, _PAUSE = 5, 0.02  # a reader that meets a checkpoint on the move looks again
_SHOWN = 5  # faulty files that a message names


class CheckpointError(ValueError):
    """A checkpoint is damaged or unfinished; the message names path, faults and remedy."""


class CheckpointGone(CheckpointError):
    """No checkpoint is there (any more): a reader whose checkpoint was pruned or replaced asks for `latest()` again."""


@dataclass(frozen=True)
class CheckpointInfo:
    """A whole checkpoint: where it lies, after which update it was taken and what `commit` was told about it."""

    name: str
    path: Path
    update: int
    facts: dict[str, Any]


class CheckpointStore:
    """The checkpoints below `root`, of which the newest `keep_newest` and the best `keep_best` are kept.

    `best_metric` names an entry of facts["metrics"]. Raises ValueError for limits that make no sense.
    """

    def __init__(
        self, root: Path, keep_newest: int, keep_best: int, best_metric: str = "", higher_is_better: bool = True
    ) -> None:
        self.root = Path(root)
        if keep_newest < 1:
            raise ValueError(_message(self.root, f"keep_newest={keep_newest}", "at least 1", "set it to 1 or more"))
        if keep_best < 0 or (keep_best > 0 and not best_metric):
            got = f"keep_best={keep_best} with best_metric={best_metric!r}"
            raise ValueError(_message(self.root, got, "0, or more and a metric's name", "name one or set keep_best=0"))
        self.keep_newest, self.keep_best = keep_newest, keep_best
        self.best_metric, self.higher_is_better = best_metric, higher_is_better
        self._crash_point: Callable[[str], None] = lambda name: None  # tests kill the process here

    def begin(self, update: int) -> Path:
        """Clear up after earlier kills; makes and returns the empty directory that the ranks write into.

        A whole checkpoint of the same update stays as it is until `commit` replaces it. Raises ValueError for a
        negative update and OSError where the file system refuses.
        """
        if update < 0:
            raise ValueError(_message(self.root, f"update {update}", "0 or more", "pass the number of updates done"))
        self.root.mkdir(parents=True, exist_ok=True)
        manifests.sync_directory(self.root.parent)
        self._clear_up()
        self._crash_point("cleaned")
        partial = self.root / f"{name_of(update)}{PARTIAL}"
        partial.mkdir()
        manifests.sync_directory(self.root)
        self._crash_point("begun")
        return partial

    def commit(self, update: int, facts: Mapping[str, Any]) -> Path:
        """Turn what lies in `begin`'s directory, all ranks having closed their files, into the latest checkpoint.

        Returns its directory. Raises ValueError where `facts` is no JSON (NaN and infinity are none: pass None) or
        takes a reserved name, CheckpointError where `begin`'s directory is missing, empty or holds something other
        than files and directories, and OSError where the file system refuses.
        """
        final = self.root / name_of(update)
        partial, replaced = (self.root / f"{final.name}{suffix}" for suffix in (PARTIAL, REPLACED))
        try:
            facts = manifests.plain_facts(facts)
        except ValueError as error:
            must = f"JSON without NaN and infinity, by names other than {', '.join(manifests.RESERVED)}"
            raise ValueError(_message(final, str(error), must, "pass None for NaN, rename the fact")) from error
        try:
            files = manifests.digest_all(partial)
        except ValueError as error:
            remedy = "save again: call begin, let all ranks write, then commit"
            raise CheckpointError(_message(partial, str(error), "a directory of files", remedy)) from error
        self._crash_point("digested")
        manifests.write_manifest(partial, update, files, facts)
        self._crash_point("manifest-written")
        for directory in {partial / parent for file in files for parent in Path(file).parents}:
            manifests.sync_directory(directory)
        self._crash_point("synced")
        if os.path.lexists(final):
            if os.path.lexists(replaced):
                self._discard(replaced)
            os.rename(final, replaced)
            manifests.sync_directory(self.root)
            self._crash_point("old-aside")
        os.rename(partial, final)
        manifests.sync_directory(self.root)  # before `latest` names it
        self._crash_point("renamed")
        manifests.write_synced(self.root / f"{LATEST}.tmp", f"{final.name}\n")
        self._crash_point("latest-written")
        os.replace(self.root / f"{LATEST}.tmp", self.root / LATEST)
        manifests.sync_directory(self.root)  # before what it named so far may be deleted
        self._crash_point("latest-moved")
        if os.path.lexists(replaced):
            self._discard(replaced)
            self._crash_point("replaced-removed")
        self._prune(update)
        self._crash_point("pruned")
        return final

    def latest(self) -> Path | None:
        """The directory of the checkpoint to resume from, or None where there is none at all.

        It is the one that the file `latest` names, and where that file is missing (a kill at the end of the first
        commit) the newest. Only its manifest is read; see `verify`. With keep_newest=1 a running training may prune it
        as soon as it has saved the next one. Raises CheckpointError, a ValueError, where the file is malformed or
        names something that is not there or has no sound manifest.
        """
        got = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE)
            name = self._latest_name()
            if name is None:
                return self._newest()
            try:
                path = self._path_of(name)
                manifests.read_manifest(path)
                return path
            except FileNotFoundError:
                got = f"{name}, which is missing or has no {MANIFEST}"
            except (ValueError, OSError) as error:
                got = f"{name}, which is damaged ({error})"
        must = "the name of a whole checkpoint beside it"
        raise CheckpointError(_message(self.root / LATEST, got, must, self._remedy()))

    def verify(self, path: Path, quick: bool = False) -> None:
        """Check that `path` holds exactly the files of its manifest, each of its size and, unless `quick`, its digest.

        Raises CheckpointError naming the first faulty files, what was found, what was expected and the other
        checkpoints of this store; CheckpointGone, a CheckpointError, where it is not there or goes while it is read.
        """
        path = Path(path)
        before, must = _identity(path), "the directory of a whole checkpoint"
        if before is None:
            raise CheckpointGone(_message(path, "no directory", must, self._remedy(path)))
        if path.suffix == PARTIAL or path.suffix.startswith(REMOVED):
            raise CheckpointError(_message(path, "one never finished or being deleted", must, self._remedy(path)))
        try:
            faults = manifests.find_faults(path, quick)
        except OSError as error:
            faults = [f"{error.filename}: {error.strerror}"]
        except ValueError as error:
            faults = [str(error)]
        if faults and _identity(path) != before:
            got = "one that was pruned or replaced while it was read"
            raise CheckpointGone(_message(path, got, must, "ask for the latest one again"))
        if faults:
            rest = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
            got = f"{len(faults)} fault{'s' * (len(faults) > 1)} ({', '.join(faults[:_SHOWN])}{rest})"
            raise CheckpointError(_message(path, got, f"as {MANIFEST} lists it", self._remedy(path)))

    def list(self) -> list[CheckpointInfo]:
        """The whole checkpoints, by update.

        A directory of such a name whose manifest is missing or damaged is none: it is passed over, and never pruned,
        so that a person can look at it.
        """
        infos = []
        for name in self._names():
            try:
                path = self._path_of(name)
                manifest = manifests.read_manifest(path)
            except (ValueError, OSError):
                continue
            facts = {key: value for key, value in manifest.items() if key not in manifests.RESERVED}
            infos.append(CheckpointInfo(name, path, manifest["update"], facts))
        return sorted(infos, key=lambda info: info.update)

    def _names(self) -> set[str]:
        found = os.listdir(self.root) if self.root.is_dir() else ()
        return {base for base in (name.removesuffix(REPLACED) for name in found) if update_of(base) is not None}

    def _path_of(self, name: str) -> Path:
        path = self.root / name
        return path if os.path.lexists(path) else self.root / f"{name}{REPLACED}"

    def _latest_name(self) -> str | None:
        path = self.root / LATEST
        try:
            name = path.read_bytes().decode(errors="replace").strip()
        except FileNotFoundError:
            return None
        if update_of(name) is None:  # also what keeps a path such as ../x from being followed
            raise CheckpointError(_message(path, repr(name[:80]), "a name such as update-000012", self._remedy()))
        return name

    def _newest(self) -> Path | None:
        if infos := self.list():
            return infos[-1].path
        if names := self._names():  # to start anew beside them would be to forget them without a word
            got = f"no file `{LATEST}` and {', '.join(sorted(names))} without a sound {MANIFEST}"
            raise CheckpointError(_message(self.root, got, "whole checkpoints or none", "move the damaged ones away"))
        return None

    def _remedy(self, besides: Path | None = None) -> str:
        passed = besides.resolve() if besides else None
        others = [info.path.name for info in reversed(self.list()) if info.path.resolve() != passed]
        if not others:
            return f"choose another checkpoint with run.resume_from=PATH ({self.root} has no other)"
        return f"choose another checkpoint with run.resume_from={self.root}/NAME, NAME one of {', '.join(others)}"

    def _clear_up(self) -> None:
        for name in sorted(os.listdir(self.root)):
            path, base = self.root / name, name.partition(".")[0]
            suffix = name.removeprefix(base)
            if update_of(base) is None:
                continue
            if suffix.startswith(REMOVED):
                manifests.delete(path)
            elif suffix == REPLACED and not os.path.lexists(self.root / base):
                os.rename(path, self.root / base)  # killed before the new one took its place
                manifests.sync_directory(self.root)
                self._crash_point("restored")
            elif suffix in (PARTIAL, REPLACED):
                self._discard(path)
        (self.root / f"{LATEST}.tmp").unlink(missing_ok=True)

    def _prune(self, latest: int) -> None:
        kept = self._kept(infos := self.list(), latest)
        for info in infos:
            if info.update not in kept:
                self._discard(info.path)

    def _kept(self, infos: Iterable[CheckpointInfo], latest: int) -> set[int]:
        sign = 1 if self.higher_is_better else -1
        scores = [(_metric(info.facts, self.best_metric), info.update) for info in infos]
        ranked = sorted(((sign * score, update) for score, update in scores if score is not None), reverse=True)
        newest = sorted((update for _, update in scores), reverse=True)
        # Of equally good ones the newer is kept.
        return {latest, *newest[: self.keep_newest], *(update for _, update in ranked[: self.keep_best])}

    def _discard(self, path: Path) -> None:
        base = path.name.partition(".")[0]
        targets = (self.root / f"{base}{REMOVED}{number}" for number in itertools.count())
        target = next(target for target in targets if not os.path.lexists(target))
        os.rename(path, target)  # so that a kill halfway leaves nothing that looks whole
        manifests.sync_directory(self.root)
        self._crash_point("discarding")
        manifests.delete(target)


def _message(path: Path, got: str, must: str, remedy: str) -> str:
    return f"{path}: got {got}; must be {must}; {remedy}"


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None


def _metric(facts: Mapping[str, Any], name: str) -> float | None:
    metrics = facts.get("metrics")
    value = metrics.get(name) if isinstance(metrics, dict) else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
