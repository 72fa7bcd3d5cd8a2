"""A real Slurm on this machine: one slurmctld and two slurmd, as the nodes n1 and n2, with a munge of its own.

All of it lives in a temporary directory, listens on its own ports, and is killed at the end.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from r1mega.launch.rank_processes import die_with_parent

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES = ("n1", "n2")
REMEDY = "as root on Debian or Ubuntu: make slurm-test-env (or apt-get install slurm-wlm munge)"
CONF = """\
ClusterName=r1mega
SlurmctldHost=localhost
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
SlurmdTimeout=20
ReturnToService=2
MpiDefault=none
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n1_port} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={n2_port} CPUs=2 State=UNKNOWN
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=200
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """What is missing here for a Slurm of our own, and how to get it."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root, and this is not root"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"{', '.join(missing)} not installed; {REMEDY}" if missing else None


class Cluster:
    """The daemons. `with Cluster() as cluster:`."""

    def __init__(self) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="r1mega-slurm-"))  # sockets want short paths
        self.env = {**os.environ, "SLURM_CONF": str(self.place / "slurm.conf")}
        self._started: list[psutil.Process] = []

    def __enter__(self) -> Cluster:
        self.place.chmod(0o755)
        (self.place / "state").mkdir()
        ports = free_ports(3)
        conf = CONF.format(place=self.place, ctld_port=ports[0], n1_port=ports[1], n2_port=ports[2])
        (self.place / "slurm.conf").write_text(conf)
        key = self.place / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        try:
            munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.place}/munge.socket"]
            munge += [f"--pid-file={self.place}/munge.pid", f"--log-file={self.place}/munge.log"]
            self._start([*munge, f"--seed-file={self.place}/munge.seed", "--num-threads=2"])
            wait_for(lambda: (self.place / "munge.socket").exists(), 20, "munged's socket")
            self._start(["slurmctld", "-D", "-i"])
            for node in NODES:
                self.start_node(node)
            wait_for(
                lambda: self.ask("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * 2,
                60,
                "two idle nodes",
            )
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End all jobs and daemons, with whatever they have started."""
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            subprocess.run(["scancel", "--user=root"], env=self.env, capture_output=True, timeout=10)
        for process in reversed(self._started):
            kill_tree(process)
        for process in self._mine():
            kill_tree(process)
        shutil.rmtree(self.place, ignore_errors=True)

    def tasks(self) -> list[str]:
        """The command lines of what runs on the nodes."""
        return [self._words(process) for process in self._mine() if self._node_of(process) is not None]

    def processes(self, node: str) -> list[psutil.Process]:
        """What Slurm runs on this node."""
        return [process for process in self._mine() if self._node_of(process) == node]

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node."""
        self._start(["slurmd", "-D", "-N", node])

    def lose_node(self, node: str) -> None:
        """What a machine's end looks like from outside: its slurmd and all it has started are gone at once."""
        daemons = [process for process in self._started if self._words(process).endswith(f"-N {node}")]
        tasks = self.processes(node)
        minders = {
            parent.pid: parent for parent in map(parent_of, tasks) if parent and "slurmstepd" in self._words(parent)
        }
        for process in [*daemons, *minders.values(), *tasks]:
            kill_tree(process)

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60)
        return done.stdout.strip() if done.returncode == 0 else f"error: {done.stderr.strip()}"

    def state(self, job: str) -> str:
        """A job's state by `scontrol show job`, which remembers ended ones for a while."""
        words = self.ask("scontrol", "show", "job", job).split()
        return next((word.partition("=")[2] for word in words if word.startswith("JobState=")), "UNKNOWN")

    def wait_for_state(self, job: str, states: Sequence[str], seconds: float) -> str:
        """Wait until the job is in one of these states; which."""
        wait_for(lambda: self.state(job) in states, seconds, f"job {job} to be {' or '.join(states)}")
        return self.state(job)

    @staticmethod
    def _words(process: psutil.Process) -> str:
        with contextlib.suppress(psutil.Error):
            return " ".join(process.cmdline())
        return ""

    @staticmethod
    def _node_of(process: psutil.Process) -> str | None:
        with contextlib.suppress(psutil.Error):
            return process.environ().get("SLURMD_NODENAME")
        return None

    def _start(self, command: Sequence[str]) -> None:
        log = (self.place / f"{Path(command[0]).name}.out").open("ab")
        process = subprocess.Popen(
            command,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent(os.getpid()),  # tests that are killed leave no daemons
        )
        log.close()
        self._started.append(psutil.Process(process.pid))

    def _mine(self) -> list[psutil.Process]:
        """Every process with this cluster's configuration in its environment, but this one."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == self.env["SLURM_CONF"]:
                    found.append(process)
        return found


def parent_of(process: psutil.Process) -> psutil.Process | None:
    """Its parent, where there is one still."""
    with contextlib.suppress(psutil.Error):
        return process.parent()
    return None


def kill_tree(process: psutil.Process) -> None:
    """SIGKILL a process and all below it."""
    with contextlib.suppress(psutil.Error):
        for member in [*process.children(recursive=True), process]:
            with contextlib.suppress(psutil.Error):
                member.send_signal(signal.SIGKILL)
    with contextlib.suppress(psutil.Error, ChildProcessError):
        process.wait(10)


def free_ports(count: int) -> list[int]:
    """Ports that are free now, below those of outgoing connections, side by side."""
    for first in range(17_000 + os.getpid() % 500 * 4, 20_000, 4):
        with contextlib.ExitStack() as held, contextlib.suppress(OSError):
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))
    raise OSError("no free ports from 17000 to 20000")


def wait_for(condition, seconds: float, what: str) -> None:
    """Wait until the condition holds. Raises TimeoutError naming `what`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)
