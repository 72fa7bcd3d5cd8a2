"""Running a program nobody trusts: no network, no files but its own, limits on everything, nothing left behind.

The sandbox is bubblewrap (Debian's `bubblewrap`): new namespaces of users, processes, mounts, network and IPC. What the
program sees are the system's programs (`/usr`, read-only), a bare `/dev`, and an empty directory in memory that goes
away with it; there is no `/etc`, `/proc`, `/tmp` or home. A seccomp filter refuses the calls that get memory past the
limits or reach deep into the kernel. Limits of the kernel hold each process; this file watches all of them together.

`unsafe_rlimits` is what remains where a machine allows no namespaces: the same limits, but the program reads whatever
its user may read and reaches the network. It is never chosen unless it is asked for by name.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import psutil

from r1mega.reward.seccomp import seccomp_filter
from r1mega.reward.watch import Outcome, watch

BUBBLEWRAP = "bubblewrap"
UNSAFE_RLIMITS = "unsafe_rlimits"
BOX = "/box"
# Limits on processes do not hold for root: programs started by root run as this user (Debian's nobody).
_NOBODY = 65534
_PROBE_SECONDS = 10.0
_PR_SET_CHILD_SUBREAPER = 36


class SandboxError(RuntimeError):
    """The sandbox itself failed, whatever the program did: no verdict on the program follows from it."""


@dataclass(frozen=True)
class Limits:
    """What one program may use. Sizes in bytes.

    `memory` bounds the address space of each process and what all of them hold together; `processes` counts threads;
    `disk` is the size of its directory and of any one file in it; `output` counts stdout and stderr each.
    """

    seconds: float = 6.0
    memory: int = 1 << 30
    processes: int = 32
    open_files: int = 64
    disk: int = 64 << 20
    output: int = 4 << 20


@dataclass(frozen=True)
class File:
    """A file that the program finds in its directory."""

    content: bytes
    executable: bool = False


class Sandbox(Protocol):
    """Runs one program to its end."""

    def run(self, argv: Sequence[str], stdin: bytes, files: Mapping[str, File], limits: Limits) -> Outcome:
        """What came of `argv`, started in an empty directory but for `files`. Nothing of it is left on return.

        Raises SandboxError where it could not be run at all.
        """


@lru_cache(maxsize=4)
def open_sandbox(kind: str) -> Sandbox:
    """The sandbox of this name, tried once. Raises SandboxError, with the remedy, where it does not work here."""
    sandbox = {BUBBLEWRAP: Bubblewrap, UNSAFE_RLIMITS: UnsafeRlimits}.get(kind)
    if sandbox is None:
        raise SandboxError(f"reward.sandbox: got {kind!r}; must be {BUBBLEWRAP} or {UNSAFE_RLIMITS}")
    made = sandbox()
    outcome = made.run(["/usr/bin/env", "true"], b"", {"file": File(b"x")}, Limits(seconds=_PROBE_SECONDS))
    if outcome.returncode != 0:
        said = outcome.stderr.decode(errors="replace").strip()[-300:] or f"status {outcome.returncode}"
        raise SandboxError(
            f"reward.sandbox: {kind} does not work on this machine ({said}); allow unprivileged user namespaces, or "
            f"set reward.sandbox={UNSAFE_RLIMITS}, which has limits but hides neither files nor the network"
        )
    return made


class Bubblewrap:
    """bwrap, found on PATH. Raises SandboxError where it is not installed, or the architecture is unknown."""

    def __init__(self) -> None:
        found = shutil.which("bwrap")
        if found is None:
            raise SandboxError(
                "reward.sandbox: got bubblewrap; `bwrap` must be on PATH; install it (Debian: apt-get install "
                f"bubblewrap), or set reward.sandbox={UNSAFE_RLIMITS}, which has limits but hides neither files nor "
                "the network"
            )
        self._bwrap = found
        try:
            self._filter = seccomp_filter()
        except ValueError as error:
            raise SandboxError(
                f"reward.sandbox: got bubblewrap; {error}; set reward.sandbox={UNSAFE_RLIMITS}"
            ) from error

    def run(self, argv: Sequence[str], stdin: bytes, files: Mapping[str, File], limits: Limits) -> Outcome:
        """See Sandbox."""
        with contextlib.ExitStack() as stack:
            arguments: list[str] = []
            descriptors: list[int] = []
            for name, file in files.items():
                descriptors.append(stack.enter_context(_in_memory(file.content)))
                mode = "0555" if file.executable else "0444"
                arguments += ["--perms", mode, "--file", str(descriptors[-1]), f"{BOX}/{name}"]
            descriptors.append(stack.enter_context(_in_memory(self._filter)))
            command = [
                self._bwrap,
                *_namespaces(limits),
                *arguments,
                *("--seccomp", str(descriptors[-1]), "--chdir", BOX, "--", *_limited(argv, limits)),
            ]
            process = _start(command, pass_fds=descriptors)
            return watch(process, stdin, seconds=limits.seconds, output=limits.output, memory=limits.memory)


class UnsafeRlimits:
    """Limits alone, in a temporary directory: see the top of the file for what this does not do."""

    def run(self, argv: Sequence[str], stdin: bytes, files: Mapping[str, File], limits: Limits) -> Outcome:
        """See Sandbox. A process that leaves its session is found again as a descendant and killed."""
        # Orphans become children of this process, so that they can be found.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        before = {child.pid for child in psutil.Process().children(recursive=True)}
        with tempfile.TemporaryDirectory(prefix="r1mega-box-", ignore_cleanup_errors=True) as folder:
            for name, file in files.items():
                path = Path(folder) / name
                path.write_bytes(file.content)
                path.chmod(0o555 if file.executable else 0o444)
            if os.geteuid() == 0:
                os.chown(folder, _NOBODY, _NOBODY)
            command = _limited([part.replace(f"{BOX}/", f"{folder}/") for part in argv], limits, shared_user=True)
            process = _start(command, cwd=folder)
            try:
                return watch(process, stdin, seconds=limits.seconds, output=limits.output, memory=limits.memory)
            finally:
                _kill_new_children(before)


def _namespaces(limits: Limits) -> list[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": BOX, "TMPDIR": BOX, "LANG": "C.UTF-8"}
    return [
        *("--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session", "--clearenv"),
        *("--uid", str(_NOBODY), "--gid", str(_NOBODY), "--hostname", "box", "--cap-drop", "ALL"),
        *("--ro-bind", "/usr", "/usr"),
        *(part for name in ("bin", "lib", "lib64") for part in ("--symlink", f"usr/{name}", f"/{name}")),
        *("--dev", "/dev", "--remount-ro", "/dev"),
        *("--perms", "1777", "--size", str(limits.disk), "--tmpfs", BOX, "--remount-ro", "/"),
        *(part for name, value in environment.items() for part in ("--setenv", name, value)),
    ]


def _limited(argv: Sequence[str], limits: Limits, *, shared_user: bool = False) -> list[str]:
    """`argv` behind the kernel's limits on each process. They are set innermost: bwrap itself needs more."""
    processes = limits.processes
    if shared_user:
        # Without a namespace the kernel counts all threads of the user, on the whole machine.
        user = os.geteuid() or _NOBODY
        processes += sum(p.info["num_threads"] or 0 for p in psutil.process_iter(["uids", "num_threads"])
                         if p.info["uids"] and p.info["uids"].real == user)  # fmt: skip
    asked = {
        "as": (resource.RLIMIT_AS, limits.memory),
        "cpu": (resource.RLIMIT_CPU, math.ceil(limits.seconds) + 1),
        "fsize": (resource.RLIMIT_FSIZE, limits.disk),
        "nofile": (resource.RLIMIT_NOFILE, limits.open_files),
        "nproc": (resource.RLIMIT_NPROC, processes),
        "core": (resource.RLIMIT_CORE, 0),
    }
    options = []
    for name, (kind, value) in asked.items():
        hard = resource.getrlimit(kind)[1]
        options.append(f"--{name}={value if hard == resource.RLIM_INFINITY else min(value, hard)}")
    return ["/usr/bin/prlimit", *options, "--", *argv]


def _start(command: Sequence[str], *, pass_fds: Sequence[int] = (), cwd: str | None = None) -> subprocess.Popen[bytes]:
    as_nobody = {"user": _NOBODY, "group": _NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        return subprocess.Popen(
            command, **pipes, pass_fds=pass_fds, cwd=cwd or "/", env={"PATH": "/usr/bin:/bin"}, bufsize=0,
            start_new_session=True, **as_nobody,
        )  # fmt: skip
    except OSError as error:
        raise SandboxError(f"{command[0]} cannot be started: {error}") from error


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[int]:
    """A descriptor that reads `content` from its start."""
    descriptor = os.memfd_create("r1mega")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def _kill_new_children(before: set[int]) -> None:
    """Kill every descendant that was not there before, until none is left: a killed one may have forked meanwhile."""
    for _ in range(100):
        new = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        if not new:
            return
        for child in new:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                child.send_signal(signal.SIGKILL)
        psutil.wait_procs(new, timeout=0.5)
    raise SandboxError(f"processes that cannot be killed: {', '.join(str(child.pid) for child in new)}")
