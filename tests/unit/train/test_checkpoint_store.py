"""The store of a run's checkpoints: what is kept, what a kill leaves, and which damage is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1mega.train import checkpoint_manifest as manifests
from r1mega.train.checkpoint_store import CheckpointError, CheckpointGone, CheckpointStore

SHARDS = ("model/__0_0.distcp", "model/__1_0.distcp", "model/.metadata", "model/deep/er/common.pt", "state.json")
# Every step of one save that has everything to do, see `crowded`.
POINTS = (
    "discarding", "restored", "cleaned", "begun", "digested", "manifest-written", "synced", "old-aside", "renamed",
    "latest-written", "latest-moved", "discarding", "replaced-removed", "discarding", "pruned",
)  # fmt: skip


def store_at(root: Path, newest: int = 2, best: int = 0, higher: bool = True) -> CheckpointStore:
    return CheckpointStore(root, newest, best, "reward" if best else "", higher)


def fill(directory: Path, content: str) -> None:
    for shard in SHARDS:
        (directory / shard).parent.mkdir(parents=True, exist_ok=True)
        (directory / shard).write_text(f"{shard} of {content}")


def save(store: CheckpointStore, update: int, content: str = "", **facts: Any) -> Path:
    fill(store.begin(update), content or str(update))
    return store.commit(update, facts)


def content_of(path: Path) -> str:
    return (path / "state.json").read_text().removeprefix("state.json of ")


def updates(store: CheckpointStore) -> list[int]:
    return [info.update for info in store.list()]


def assert_clean(root: Path) -> None:
    assert all(re.fullmatch(r"latest|update-\d{6}", name) for name in os.listdir(root)), os.listdir(root)


def killed(action: Callable[[], object]) -> bool:
    """Run `action` in a child process; whether it was killed by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the action itself failed"
    return False


def kill_at(step: int) -> Callable[..., None]:
    """A callable that kills the process at its call number `step`, counted from 0."""
    calls = iter(range(step + 1))

    def tick(*_: object) -> None:
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return tick


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def whole(root: Path) -> tuple[CheckpointStore, Path]:
    store = store_at(root)
    save(store, 8)
    return store, save(store, 12)


class TestNormalLife:
    def test_nothing_is_there_at_first(self, root: Path) -> None:
        store = store_at(root)
        assert (store.latest(), store.list()) == (None, [])
        store.begin(3)
        assert (store.latest(), store.list()) == (None, [])

    def test_a_save_is_found_again(self, root: Path) -> None:
        save(store_at(root), 12, metrics={"reward": 0.5}, layout={"tp": 2})
        store = store_at(root)
        path = store.latest()
        assert path == root / "update-000012"
        store.verify(path)
        (info,) = store.list()
        assert (info.name, info.path, info.update) == ("update-000012", path, 12)
        assert info.facts == {"metrics": {"reward": 0.5}, "layout": {"tp": 2}}
        manifest = json.loads((path / "manifest.json").read_text())
        assert (manifest["format"], manifest["update"], sorted(manifest["files"])) == (1, 12, sorted(SHARDS))
        assert manifest["files"]["state.json"]["bytes"] == len("state.json of 12")
        assert (root / "latest").read_text() == "update-000012\n"
        assert_clean(root)

    def test_the_same_update_is_replaced_only_by_the_commit(self, root: Path) -> None:
        store = store_at(root)
        save(store, 12, "old")
        partial = store.begin(12)
        assert (partial.name, os.listdir(partial)) == ("update-000012.partial", [])
        assert content_of(store.latest()) == "old"
        fill(partial, "new")
        assert content_of(store.commit(12, {})) == "new"
        store.verify(store.latest())
        assert_clean(root)

    def test_a_run_resumed_from_an_earlier_update_names_its_own(self, root: Path) -> None:
        store = store_at(root, newest=1)
        save(store, 20)
        assert save(store, 13) == store.latest()
        assert updates(store) == [13, 20]
        save(store, 14)
        assert updates(store) == [14, 20]

    def test_large_files_are_digested_in_pieces(self, root: Path) -> None:
        with mock.patch.object(manifests, "_PIECE", 7):
            path = save(store_at(root), 1)
        store_at(root).verify(path)

    def test_what_lies_beside_is_left_alone(self, root: Path) -> None:
        store = store_at(root, newest=1)
        for name in ("notes.partial", "update-1.partial", "update-0000001"):
            (root / name).mkdir(parents=True)
        save(store, 1)
        save(store, 2)
        left = {"latest", "update-000002", "notes.partial", "update-1.partial", "update-0000001"}
        assert set(os.listdir(root)) == left

    def test_a_damaged_one_is_not_listed_and_not_pruned(self, root: Path) -> None:
        store = store_at(root, newest=1)
        (save(store, 1) / "manifest.json").write_text("{")
        save(store, 2)
        assert updates(store) == [2]
        assert (root / "update-000001").is_dir()

    def test_what_cannot_be_deleted_does_not_end_the_run(self, root: Path) -> None:
        store = store_at(root, newest=1)
        save(store, 1)
        with mock.patch.object(shutil, "rmtree"), pytest.warns(UserWarning, match="cannot be deleted now"):
            save(store, 2)
        assert updates(store) == [2]
        save(store, 3)
        assert_clean(root)

    def test_a_file_system_that_cannot_flush_directories(self, root: Path) -> None:
        flush = os.fsync

        def no_directories(handle: int) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(code, "refused")
            flush(handle)

        with mock.patch.object(os, "fsync", no_directories):
            code = errno.EINVAL
            save(store_at(root), 1)
            code = errno.EIO
            with pytest.raises(OSError, match="refused"):
                save(store_at(root), 2)
        assert updates(store_at(root)) == [1]


class TestRetention:
    def test_the_best_stay(self, root: Path) -> None:
        store = store_at(root, newest=1, best=2)
        for update, reward in enumerate([0.1, 0.9, None, 0.5, True, 0.9, 0.2]):
            save(store, update, metrics={"reward": reward})
        assert updates(store) == [1, 5, 6]

    def test_lower_may_be_better_and_metrics_may_be_missing(self, root: Path) -> None:
        store = store_at(root, newest=1, best=1, higher=False)
        save(store, 1, metrics={"reward": 3})
        save(store, 2, metrics={"reward": -1.5})
        save(store, 3, metrics=[])
        save(store, 4)
        assert updates(store) == [2, 4]

    @settings(max_examples=40, deadline=None)
    @given(
        saves=st.lists(st.tuples(st.integers(0, 12), st.none() | st.sampled_from([-1.0, 0, 0.5, 2])), max_size=9),
        newest=st.integers(1, 4),
        best=st.integers(0, 3),
        higher=st.booleans(),
    )
    def test_exactly_newest_best_and_latest(
        self, saves: list[tuple[int, float | None]], newest: int, best: int, higher: bool
    ) -> None:
        with tempfile.TemporaryDirectory() as directory, mock.patch.object(os, "fsync"):
            store = store_at(Path(directory), newest, best, higher)
            there: dict[int, float | None] = {}
            for update, reward in saves:
                (store.begin(update) / "state.json").write_text("{}")
                store.commit(update, {"metrics": {"reward": reward}})
                there[update] = reward
                scored = [u for u in there if there[u] is not None]
                scored.sort(key=lambda u: ((-there[u] if higher else there[u]), -u))
                kept = {*sorted(there)[-newest:], *scored[:best], update}
                there = {u: reward for u, reward in there.items() if u in kept}
                assert updates(store) == sorted(kept)
                assert store.latest() == Path(directory) / f"update-{update:06d}"
                assert_clean(Path(directory))


class TestKills:
    @staticmethod
    def crowded(root: Path) -> CheckpointStore:
        """A store whose next save, of update 8, clears up, restores, replaces and prunes."""
        save(store_at(root), 4)
        save(store_at(root), 8, "old")
        fill(root / "update-000004.partial", "half")
        (root / "update-000008").rename(root / "update-000008.replaced")
        return store_at(root, newest=1)

    @staticmethod
    def check_usable(root: Path, *contents: str | None) -> None:
        """The latest is whole and one of `contents`; saving goes on and leaves nothing behind."""
        store = store_at(root)
        path = store.latest()
        if path is None:
            assert None in contents
        else:
            store.verify(path)
            assert content_of(path) in contents
        for info in store.list():
            store.verify(info.path)
        assert save(store, 16) == store.latest()
        store.verify(store.latest())
        assert_clean(root)

    def test_the_points_are_all_passed(self, root: Path) -> None:
        store, passed = self.crowded(root), []
        store._crash_point = passed.append
        save(store, 8, "new")
        assert tuple(passed) == POINTS
        assert updates(store) == [8]
        assert_clean(root)

    @pytest.mark.parametrize("step", range(len(POINTS)), ids=lambda step: f"{step}-{POINTS[step]}")
    def test_a_kill_at_a_crash_point(self, root: Path, step: int) -> None:
        store = self.crowded(root)
        store._crash_point = kill_at(step)
        assert killed(lambda: save(store, 8, "new"))
        self.check_usable(root, "new" if step >= POINTS.index("renamed") else "old")

    @pytest.mark.parametrize("step", range(len(POINTS)), ids=lambda step: f"{step}-{POINTS[step]}")
    def test_an_error_at_a_crash_point(self, root: Path, step: int) -> None:
        store, calls = self.crowded(root), iter(range(len(POINTS)))

        def fail(name: str) -> None:
            if next(calls) == step:
                raise OSError(name)

        store._crash_point = fail
        with pytest.raises(OSError, match=POINTS[step]):
            save(store, 8, "new")
        self.check_usable(root, "new" if step >= POINTS.index("renamed") else "old")

    @staticmethod
    def deadly(step: int, action: Callable[[], object]) -> Callable[[], None]:
        """`action` killed before its change number `step` to the file system, or in the middle of writing a file."""
        tick = kill_at(step)

        def write_halves(path: Path, text: str) -> None:
            path.write_text(text[: len(text) // 2])
            tick()
            path.write_text(text)

        def before(call: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *args, **options: (tick(), call(*args, **options))[1]

        def run() -> None:
            for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
                setattr(os, name, before(getattr(os, name)))
            manifests.write_synced = write_halves
            action()

        return run

    @pytest.mark.parametrize(
        ("start", "update", "contents"),
        [
            ("empty", 1, (None, "new")),
            ("older", 12, ("8", "new")),
            ("same", 8, ("8", "new")),
            ("crowded", 8, ("old", "new")),
            ("crowded", 12, ("old", "new")),
        ],
    )
    def test_a_kill_before_any_change(
        self, root: Path, start: str, update: int, contents: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "fsync", lambda handle: None)  # a kill loses no page; the order is tested below
        if start == "crowded":
            self.crowded(root)
        elif start != "empty":
            save(store_at(root), 8)
        seen, step, template = set(), 0, root.parent / "template"
        root.mkdir(parents=True, exist_ok=True)
        root.rename(template)
        while True:
            shutil.copytree(template, root)
            store = store_at(root, newest=1)
            if not killed(self.deadly(step, lambda store=store: save(store, update, "new"))):
                break
            path = store.latest()
            seen.add(path and content_of(path))
            self.check_usable(root, *contents)
            shutil.rmtree(root)
            step += 1
        assert step > 20
        assert seen == set(contents)

    def test_the_only_one_being_set_aside_is_found(self, root: Path) -> None:
        store = store_at(root)
        save(store, 12, "old")
        (root / "update-000012").rename(root / "update-000012.replaced")
        path = store.latest()
        assert (path.name, content_of(path)) == ("update-000012.replaced", "old")
        store.verify(path)
        assert updates(store) == [12]
        store.begin(13)
        assert store.latest() == root / "update-000012"

    def test_without_the_file_the_newest_counts(self, whole: tuple[CheckpointStore, Path], root: Path) -> None:
        (root / "latest").unlink()
        assert whole[0].latest() == whole[1]

    def test_everything_is_flushed_before_it_is_relied_on(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = store_at(root, newest=1)
        save(store, 8)
        fill(store.begin(12), "new")
        events: list[str] = []
        for name in ("fsync", "rename", "replace"):
            call = getattr(os, name)

            def log(*args: Any, name: str = name, call: Callable[..., Any] = call) -> Any:
                target = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[1])
                events.append(f"{name} {Path(target).relative_to(root)}")
                return call(*args)

            monkeypatch.setattr(os, name, log)
        store.commit(12, {})
        moved, latest = events.index("rename update-000012"), events.index("replace latest")
        partial = "fsync update-000012.partial"
        directories = ("", "/model", "/model/deep", "/model/deep/er")
        assert {f"{partial}/{name}" for name in (*SHARDS, "manifest.json")} <= set(events[:moved])
        assert events.index(f"{partial}/manifest.json") < min(events.index(partial + name) for name in directories)
        assert max(events.index(partial + name) for name in directories) < moved
        assert "fsync ." in events[moved:latest]
        assert "fsync latest.tmp" in events[moved:latest]
        assert events[latest + 1 :] == ["fsync .", "rename update-000008.removed-0", "fsync ."]


class TestDamage:
    @staticmethod
    def refused(store: CheckpointStore, path: Path, *words: str, quick: bool | None = None) -> None:
        for mode in (False, True) if quick is None else (quick,):
            with pytest.raises(CheckpointError) as caught:
                store.verify(path, quick=mode)
            text = str(caught.value)
            assert text.startswith(f"{path}: got ") and "; must be " in text, text
            assert f"run.resume_from={store.root}/NAME, NAME one of update-0000" in text, text
            assert all(word in text for word in words), text

    def test_a_flipped_byte(self, whole: tuple[CheckpointStore, Path]) -> None:
        store, path = whole
        shard = path / "model/__1_0.distcp"
        data = bytearray(shard.read_bytes())
        data[3] ^= 1
        shard.write_bytes(data)
        self.refused(store, path, "1 fault (model/__1_0.distcp: blake2b ", ", expected ", quick=False)
        store.verify(path, quick=True)

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_any_changed_byte_of_any_file(self, data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as directory, mock.patch.object(os, "fsync"):
            store = store_at(Path(directory))
            path = save(store, 12, metrics={"reward": 0.25, "loss": 1e-9}, note="né")
            file = path / data.draw(st.sampled_from((*SHARDS, "manifest.json", "manifest.json")))
            content = bytearray(file.read_bytes())
            before = bytes(content)
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
            file.write_bytes(content)
            try:
                store.verify(path)
            except CheckpointError as error:
                assert file.relative_to(path).as_posix() in str(error)
            else:  # white space between two values, or 1e-9 become 1E-9
                assert file.name == "manifest.json" and json.loads(content) == json.loads(before)

    def test_a_truncated_a_missing_and_an_extra_file(self, whole: tuple[CheckpointStore, Path]) -> None:
        store, path = whole
        os.truncate(path / "state.json", 3)
        self.refused(store, path, "1 fault (state.json: 3 bytes, expected 16)")
        (path / "model/__0_0.distcp").unlink()
        self.refused(store, path, "2 faults (model/__0_0.distcp: missing, expected 24 bytes, state.json: 3 bytes")
        (path / "model/extra").write_text("")
        self.refused(store, path, "3 faults", "model/extra: not in the manifest, expected no such file")

    def test_only_the_first_faults_are_named(self, whole: tuple[CheckpointStore, Path]) -> None:
        store, path = whole
        for number in range(9):
            (path / f"extra-{number}").write_text("")
        self.refused(
            store, path, "9 faults (extra-0", "extra-4: not in the manifest, expected no such file and 4 more)"
        )

    def test_a_link_in_the_place_of_a_file(self, whole: tuple[CheckpointStore, Path]) -> None:
        store, path = whole
        (path / "state.json").rename(path.parent / "elsewhere")
        (path / "state.json").symlink_to(path.parent / "elsewhere")
        self.refused(store, path, "state.json: neither file nor directory, expected a file of 16 bytes")

    def test_a_directory_in_the_place_of_a_file(self, whole: tuple[CheckpointStore, Path]) -> None:
        store, path = whole
        (path / "state.json").unlink()
        (path / "state.json").mkdir()
        self.refused(store, path, "state.json: missing")

    def test_an_unreadable_file(self, whole: tuple[CheckpointStore, Path]) -> None:
        store, path = whole
        with mock.patch.object(manifests, "_digest", side_effect=OSError(errno.EIO, "Input/output error")):
            self.refused(store, path, "5 faults", "state.json: cannot be read (Input/output error)", quick=False)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "manifest.json: damaged: Expecting value"),
            ("{", "manifest.json: damaged: Expecting property name"),
            ("[" * 100_000, "manifest.json: damaged: maximum recursion depth"),
            ("[]", "no object with a `format`"),
            ('{"format": true}', "no object with a `format`"),
            ('{"format": 2}', "format 2, expected 1"),
            ('{"format": 1, "x": NaN}', "NaN is no JSON number"),
            ('{"format": 1, "x": 1e999}', "damaged"),
            ('{"format": 1}', "its content does not have the digest that it names"),
            (b"\xff\xfe\xfa", "manifest.json: damaged"),
            (None, "manifest.json: No such file or directory"),
        ],
    )
    def test_a_damaged_manifest(
        self, whole: tuple[CheckpointStore, Path], root: Path, text: str | bytes | None, words: str
    ) -> None:
        store, path = whole
        (path / "manifest.json").unlink()
        if text is not None:
            (path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        self.refused(store, path, words)
        with pytest.raises(ValueError, match=r"latest: got update-000012, which is .*NAME one of update-000008$"):
            store.latest()

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda m: m.update(update=13), "of update 13, expected 12"),
            (lambda m: m.update(update="12"), "of update '12', expected 12"),
            (lambda m: m.update(files=[]), "lists no files"),
            (lambda m: m.update(files={}), "lists no files"),
            (lambda m: m["files"].update({"../x": m["files"]["state.json"]}), "lists '../x', expected paths inside"),
            (lambda m: m["files"].update({"a/../../x": {}}), "lists 'a/../../x'"),
            (lambda m: m["files"].update({"/etc/passwd": {}}), "lists '/etc/passwd'"),
            (lambda m: m["files"].update({"manifest.json": {}}), "lists 'manifest.json'"),
            (lambda m: m["files"].update({"": {}}), "lists ''"),
            (lambda m: m["files"].update({"a\0b": {}}), "lists 'a\\x00b'"),
            (lambda m: m["files"].update({"state.json": {"bytes": 16}}), "state.json: expected `bytes` and `blake2b`"),
        ],
    )
    def test_a_manifest_of_the_right_digest_that_makes_no_sense(
        self, whole: tuple[CheckpointStore, Path], change: Callable[[dict[str, Any]], None], words: str
    ) -> None:
        store, path = whole
        manifest = json.loads((path / "manifest.json").read_text())
        change(manifest)
        manifest["manifest_blake2b"] = manifests._self_digest(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
        self.refused(store, path, words)

    @pytest.mark.parametrize(
        "text", ["", "nonsense", "../x", "../../etc", "update-000012/../../x", "/tmp", "update-12", "update-0000012",
                 "update-000012.partial", "update-٠٠٠٠١٢", "update-000012\nupdate-000008", "\0", b"\xff"],
    )  # fmt: skip
    def test_latest_naming_nonsense(self, whole: tuple[CheckpointStore, Path], root: Path, text: str | bytes) -> None:
        (root / "latest").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ValueError, match=r"latest: got .*; must be a name such as .*; choose .*run\.resume_from="):
            whole[0].latest()

    def test_latest_naming_what_is_missing(self, whole: tuple[CheckpointStore, Path], root: Path) -> None:
        shutil.rmtree(whole[1])
        expected = f"{root}/latest: got update-000012, which is missing or has no manifest.json; must be the name of a"
        with pytest.raises(ValueError, match=re.escape(expected) + r".*NAME one of update-000008$"):
            whole[0].latest()
        shutil.rmtree(root / "update-000008")
        with pytest.raises(ValueError, match=r"has no other\)$"):
            whole[0].latest()

    def test_only_damaged_ones_are_not_taken_for_a_new_run(self, root: Path) -> None:
        (root / "update-000003").mkdir(parents=True)
        with pytest.raises(ValueError, match="got no file `latest` and update-000003 without a sound manifest"):
            store_at(root).latest()

    def test_unfinished_and_absent_ones_are_refused(self, whole: tuple[CheckpointStore, Path], root: Path) -> None:
        store, path = whole
        for name in ("update-000016.partial", "update-000016.removed-0"):
            shutil.copytree(path, root / name)
            self.refused(store, root / name, "got one never finished or being deleted")
        with pytest.raises(CheckpointGone, match="got no directory"):
            store.verify(root / "update-000099")

    def test_a_copy_elsewhere_may_have_any_name(self, whole: tuple[CheckpointStore, Path], tmp_path: Path) -> None:
        whole[0].verify(Path(shutil.copytree(whole[1], tmp_path / "my.copy-2")))


class TestRefusals:
    @pytest.mark.parametrize(("newest", "best", "metric"), [(0, 0, ""), (-1, 1, "r"), (1, -1, "r"), (1, 1, "")])
    def test_limits_without_sense(self, root: Path, newest: int, best: int, metric: str) -> None:
        with pytest.raises(ValueError, match=r"checkpoints: got keep_.*; must be .*; .*set "):
            CheckpointStore(root, newest, best, metric)

    def test_a_negative_update(self, root: Path) -> None:
        with pytest.raises(ValueError, match="got update -1; must be 0 or more"):
            store_at(root).begin(-1)

    @pytest.mark.parametrize(
        "facts",
        [{"format": 2}, {"files": {}}, {"manifest_blake2b": ""}, {"x": float("nan")}, {"x": {1, 2}}, {"x": object()}],
    )
    def test_facts_that_cannot_be_kept(self, root: Path, facts: dict[str, Any]) -> None:
        store = store_at(root)
        fill(store.begin(1), "1")
        with pytest.raises(ValueError, match=r"update-000001: got facts .*; must be JSON .*; pass None"):
            store.commit(1, facts)
        assert store.commit(1, {"x": {2: [None, (1, 2)], "1": "é"}}) == store.latest()
        assert store.list()[0].facts == {"x": {"2": [None, [1, 2]], "1": "é"}}
        store.verify(store.latest())

    def test_nothing_to_commit(self, root: Path) -> None:
        store = store_at(root)
        with pytest.raises(CheckpointError, match=r"update-000001\.partial: got nothing; .*call begin"):
            store.commit(1, {})
        partial = store.begin(1)
        with pytest.raises(CheckpointError, match=r"update-000001\.partial: got no file; must be"):
            store.commit(1, {})
        os.mkfifo(partial / "pipe")
        with pytest.raises(CheckpointError, match="got pipe, neither file nor directory"):
            store.commit(1, {})
        assert store.latest() is None

    def test_a_file_name_that_is_no_utf8(self, root: Path) -> None:
        store = store_at(root)
        (store.begin(1) / os.fsdecode(b"a\xff")).write_text("a")
        store.verify(store.commit(1, {}))


class TestReaders:
    @staticmethod
    def reads(store: CheckpointStore, done: threading.Event) -> Iterator[str]:
        while not done.is_set():
            path = store.latest()  # never refuses: what `latest` names is always there
            try:
                store.verify(path, quick=True)
            except CheckpointGone:
                yield "gone"  # two saves later, or replaced
            else:
                yield "whole"

    @pytest.mark.parametrize("same", [False, True])
    def test_a_reader_never_sees_half_a_checkpoint(self, root: Path, same: bool) -> None:
        writer = store_at(root, newest=1)
        save(writer, 0)
        done, seen, errors = threading.Event(), [], []

        def read() -> None:
            try:
                seen.extend(self.reads(store_at(root), done))
            except Exception as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        for update in range(1, 41):
            save(writer, 0 if same else update, "x" * (update % 7))  # sizes differ: a mixture would be noticed
        done.set()
        reader.join()
        assert not errors
        assert seen.count("whole") > 20

    def test_one_that_goes_while_it_is_read(self, root: Path) -> None:
        store = store_at(root, newest=1)
        path = save(store, 1)
        walk = manifests._walk

        def prune_first(directory: Path) -> dict[str, int | None]:
            with mock.patch.object(manifests, "_walk", walk):
                save(store, 2)
            return walk(directory)

        with (
            mock.patch.object(manifests, "_walk", prune_first),
            pytest.raises(CheckpointGone, match="pruned or replaced while it was read"),
        ):
            store.verify(path)
