"""`python -m r1mega.launch.slurm_job --config RUN_DIR/config.yaml`: a run inside its Slurm job, on the first machine.

The job's script ends here. This process starts servers and ranks as steps on the job's machines, watches them, and
takes Slurm's signals: it asks the ranks to stop, and queues the job again when they have saved, or when a machine is
lost. Then the same script comes here again, and the run goes on from its newest checkpoint.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from r1mega.config import io
from r1mega.config.check_slurm import ranks_per_node, training_nodes
from r1mega.config.choices import GENERATING_LOOPS, EngineKind, Loop
from r1mega.config.faults import ConfigError, Fault
from r1mega.config.schema import Config
from r1mega.launch import preflight, resume, rundir, slurm
from r1mega.launch.engines import fleet_of
from r1mega.launch.local import WORKER, worker_env
from r1mega.launch.slurm import Job
from r1mega.launch.slurm_rank import STOP_SIGNALS
from r1mega.launch.slurm_world import World
from r1mega.launch.supervise import WorldResult
from r1mega.loop import stop
from r1mega.loop.stop import STOPPED

_FAULTY = 2  # the exit code of a run that cannot start, as of r1mega train


def main() -> int:
    """Run one start of the job; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the resolved config.yaml of a run directory")
    path = parser.parse_args().config
    try:
        config = io.load(path)
        return run(config, Job.of(os.environ))
    except (ConfigError, ValueError, RuntimeError) as error:
        _say(str(error))
        return _FAULTY


def run(config: Config, job: Job) -> int:
    """See one start of the run to its end: 0, the failed rank's code, or STOPPED where it is to go on later.

    Raises ConfigError where it cannot start.
    """
    run_dir = Path(config.run.dir).absolute()
    stop.withdraw(run_dir)
    for number in STOP_SIGNALS:
        signal.signal(number, _asks_to_stop(run_dir))
    _prepare(config, job)
    folder = run_dir / slurm.FOLDER / f"job-{job.id}.{job.restarts}"
    folder.mkdir(parents=True)
    config_path = folder / io.FILE_NAME
    config_path.write_text(io.to_yaml(config), encoding="utf-8")
    start = f"goes on from {config.run.resume_from}" if config.run.resume_from else "starts"
    _say(f"job {job.id}, start {job.restarts}, on {' '.join(job.nodes)}: {start}")
    log_dir = run_dir / rundir.LOG_DIR
    has_servers = config.stage.loop is Loop.rl and config.rollout.engine is EngineKind.sglang
    fleet = fleet_of(config, log_dir) if has_servers else None
    return _conclude(config, job, _world(config, job, config_path, folder, log_dir).run(fleet))


def _asks_to_stop(run_dir: Path):
    def ask(number: int, _frame: FrameType | None) -> None:
        stop.ask(run_dir, f"{signal.Signals(number).name} to the job")

    return ask


def _prepare(config: Config, job: Job) -> None:
    """Go on where a start before came to, fill in the job's machines, and check what may have changed since."""
    if len(job.nodes) != config.cluster.nodes:
        constraint = f"the job has {len(job.nodes)} machines"
        raise ConfigError([Fault("cluster.nodes", str(config.cluster.nodes), constraint, "submit the run again")])
    if job.restarts:
        from r1mega.loop import checkpoints

        config.run.resume = True
        if checkpoints.open_store(config).latest() is not None:
            config.run.resume_from = None  # the run has a checkpoint of its own by now
    resume.prepare(config)
    place_engines(config, job.nodes)
    asked = config.run.resume
    config.run.resume = True  # its directory holds it
    try:
        preflight.require(config, late_checks=())
    finally:
        config.run.resume = asked


def place_engines(config: Config, nodes: tuple[str, ...]) -> None:
    """Give SGLang servers their machines: the last ones, or those of the trainers. On a job of one they are local."""
    settings, sglang = config.slurm, config.sglang
    if config.stage.loop not in GENERATING_LOOPS or config.rollout.engine is not EngineKind.sglang or len(nodes) == 1:
        return
    each = sglang.tp // sglang.nodes_per_engine
    free = nodes[len(nodes) - settings.engine_nodes :] if settings.engine_nodes else nodes
    room = (config.cluster.gpus_per_node - sglang.first_gpu) // each
    wanted = config.rollout.engines * sglang.nodes_per_engine
    slots = [node for node in free for _ in range(room)]
    if sglang.nodes_per_engine > 1:
        # A server of several machines has one process on each of them.
        span = sglang.nodes_per_engine
        blocks = [free[i : i + span] for i in range(0, len(free) - span + 1, span)]
        slots = [node for block in blocks for _ in range(room) for node in block]
    if len(slots) < wanted:
        constraint = f"{len(free)} machines have room for {len(slots)} processes of servers; {wanted} are wanted"
        raise ConfigError([Fault("rollout.engines", str(config.rollout.engines), constraint, "lower it")])
    sglang.hosts = slots[:wanted]
    # Standard input is passed on: its end is what ends a server.
    sglang.remote = "srun --overlap --nodes=1 --ntasks=1 --nodelist={host} --cpu-bind=none --unbuffered"
    sglang.weights_dir = os.path.abspath(sglang.weights_dir or Path(config.run.dir) / "engines")
    os.environ["R1MEGA_DEAF"] = "1"  # far_leash.py: servers answer until the trainers have saved


def _world(config: Config, job: Job, config_path: Path, folder: Path, log_dir: Path) -> World:
    """The step of the training processes."""
    settings, per_node, nodes = config.slurm, ranks_per_node(config), job.nodes[: training_nodes(config)]
    size = config.parallel.world_size
    command = ["srun", "--overlap", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}", f"--ntasks={size}"]
    command += [f"--ntasks-per-node={per_node}", "--distribution=block", "--unbuffered"]
    command += ["--kill-on-bad-exit=0", "--wait=0"]  # who failed first is found out here, and the others ended then
    command += [f"--output={log_dir}/rank%t.log", "--open-mode=truncate"]
    command += [f"--cpus-per-task={settings.cpus_per_task}"] if settings.cpus_per_task else ["--cpu-bind=none"]
    python = settings.python or sys.executable
    if settings.container_image:
        command += [f"--container-image={settings.container_image}", f"--container-workdir={os.getcwd()}"]
        command += ["--no-container-mount-home"]
        if settings.container_mounts:
            command += [f"--container-mounts={','.join(settings.container_mounts)}"]
        python = settings.container_python
    command += [python, "-m", "r1mega.launch.slurm_rank", "--folder", str(folder), "--per-node", str(per_node)]
    command += ["--run-dir", str(Path(config.run.dir).absolute()), "--"]
    command += [python, "-m", WORKER, "--config", str(config_path)]
    ours = worker_env(config.device.type, config.device.threads)
    ours.pop(
        "GLOO_SOCKET_IFNAME", None
    )  # loopback is right on one machine only; the job's script sets what is asked for
    env = {**os.environ, **ours, "MASTER_ADDR": slurm.address_of(nodes[0])}
    env["R1MEGA_RENDEZVOUS_SECONDS"] = f"{60 * settings.rendezvous_minutes:g}"
    return World(command, size, folder, log_dir, env)


def _conclude(config: Config, job: Job, result: WorldResult) -> int:
    """Say how the start ended, and queue the job again where it has to go on."""
    if result.exit_code == 0:
        _say("the run has reached its end")
        return 0
    if result.exit_code == STOPPED:
        asked = stop.asked(config.run.dir) or "somebody"
        return _requeue(config, job, f"asked to stop by {asked}; a checkpoint is written", STOPPED)
    _say(result.message)
    lost = slurm.lost_nodes(job.nodes, config.slurm.probe_seconds)
    if lost:
        return _requeue(config, job, f"lost {' '.join(lost)}", result.exit_code)
    return result.exit_code


def _requeue(config: Config, job: Job, why: str, code: int) -> int:
    settings = config.slurm
    if not settings.requeue:
        refused: str | None = "slurm.requeue=false"
    elif job.restarts >= settings.max_requeues:
        refused = f"slurm.max_requeues={settings.max_requeues}"
    else:
        refused = slurm.requeue(job.id)
    if refused is None:
        _say(f"{why}; the job is queued again")
        return code
    _say(f"{why}; the job is not queued again: {refused}; to go on: the same r1mega submit with run.resume=true")
    return code


def _say(text: str) -> None:
    print(f"r1mega: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
