"""The trainer's side of a publish beside the plainest way to move the same bytes: a gloo broadcast, and `cp`.

    python -m benchmarks.publish --gigabytes 1 --rounds 5 --json publish.json

Two trainer ranks hold a deepseek_v3 model of random numbers in BF16, its experts in two halves (ep=2), so that every
tensor is whole on some rank. `--layout tp=2,etp=2` cuts every matrix instead, and half of each comes from the other
rank first. Each round takes, one after the other and every other round in the opposite order, so that what changes on
the machine changes for all (memory that a file freed just before is written faster; files that are of no more use are
removed in between):

broadcast   rank 0 broadcasts as many bytes as the model has, in buckets, over gloo
receivers   rank 0 broadcasts the same to two processes beside the trainer, as the two ranks of an engine are
gloo        each rank broadcasts the tensors that it owns to those processes, with the checksums that the server must
            report
ipc         the plan's slices go to two engine ranks of one server (tp=2, ep=2), whole tensors come of them in shared
            memory, with the checksums that the server must report and the handles that it is sent
cp          `cp -r` of the directory that a publish by `disk` writes
disk        both ranks hash for the engine ranks and write their share as safetensors, gathering what they lack

What a server then takes to load is SGLang's own and is left out; tests/engine has the real one. A share is the rate
over that of the plain way of the same round; medians are over rounds. `ipc` is measured by the bytes that it hands
over, which are more than the model's, as both engine ranks get all that is not a routed expert's. Run it on an idle
machine. The exit code is 0 where all shares are at least a half, 1 where one is not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

LEAST = 0.5
RANKS = 2
BUCKET_BYTES = 1 << 28
PAIRS = (("gloo", "receivers"), ("ipc", "broadcast"), ("disk", "cp"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the ranks, or be one of them."""
    options = parse(arguments)
    if "RANK" in os.environ:
        measure(options)
        return 0
    from r1mega.launch import local, supervise

    with tempfile.TemporaryDirectory(prefix="r1mega-publish-", dir=options.dir) as folder:
        out = Path(folder) / "seconds.json"
        argv = [sys.executable, "-m", "benchmarks.publish", "--gigabytes", str(options.gigabytes), "--rounds"]
        argv += [str(options.rounds), "--dir", folder, "--json", str(out), "--layout", options.layout]
        argv += ["--only", *options.only]
        environment = local.worker_env("cpu", 1)
        result = supervise.run_world(argv, RANKS, log_dir=Path(folder) / "logs", env=environment)
        if result.exit_code:
            print(result.message, file=sys.stderr)
            return 2
        found = json.loads(out.read_text())
    return report(found, options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the model in BF16 (default 1)")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--layout", default="dp=2,ep=2", help="of the two trainer ranks (default dp=2,ep=2)")
    ways = [way for way, _ in PAIRS]
    parser.add_argument("--only", nargs="*", choices=ways, default=ways, help="publishes to measure (default: all)")
    parser.add_argument("--dir", type=Path, help="where files go; a file system without reflinks (default: TMPDIR)")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> None:
    """One rank: every round's seconds by name, written by rank 0."""
    from benchmarks.publish_ways import Ways

    ways = Ways(options.gigabytes, options.dir, options.layout, RANKS, BUCKET_BYTES)
    rounds, wanted = [], {name for pair in PAIRS if pair[0] in options.only for name in pair}
    for number in range(options.rounds + 1):  # the first one warms up
        turn = [(name, way) for name, way in ways.all().items() if name in wanted]
        seconds = {}
        for name, way in turn if number % 2 else reversed(turn):
            seconds[name] = timed(way)
            ways.tidy()
        rounds.append(seconds)
    if ways.rank == 0:
        found = {"model": ways.model_bytes, "handed": ways.handed_bytes, "rounds": rounds[1:]}
        options.json.write_text(json.dumps(found))
    ways.close()


def timed(way: Callable[[], None]) -> float:
    """Seconds until every rank is done; what was written before is on the disk."""
    import torch.distributed as dist

    os.sync()
    dist.barrier()
    began = time.monotonic()
    way()
    dist.barrier()
    return time.monotonic() - began


def report(found: dict, options: argparse.Namespace) -> int:
    """Print the table; the exit code."""
    moved = {name: found["handed"] if name == "ipc" else found["model"] for pair in PAIRS for name in pair}
    print(f"{platform.machine()}, {os.cpu_count()} cores; model {found['model'] / 1e9:.2f} GB, {RANKS} trainer ranks")
    print(f"{'way':10} {'s':>7} {'MB/s':>7} {'of':>10} {'share':>6} {'range':>14}")
    shares = {}
    for way, plain in (pair for pair in PAIRS if pair[0] in options.only):
        each = [(moved[way] / turn[way]) / (moved[plain] / turn[plain]) for turn in found["rounds"]]
        shares[way] = median(each)
        for name in (plain, way):
            seconds = median(turn[name] for turn in found["rounds"])
            ends = f"{plain:>10} {shares[way]:6.2f} {min(each):.2f} to {max(each):.2f}" if name == way else ""
            print(f"{name:10} {seconds:7.2f} {moved[name] / seconds / 1e6:7,.0f} {ends}".rstrip())
    if options.json:
        options.json.write_text(json.dumps(found | {"shares": shares, "least": LEAST}, indent=2) + "\n")
    return 0 if min(shares.values()) >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
