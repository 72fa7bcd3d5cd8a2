"""Rate and memory of tools/convert_checkpoint.py beside `cp -r` of the same bytes, and beside mbridge's loader.

    python -m benchmarks.convert --gigabytes 8 --rounds 3 --json convert.json
    python -m benchmarks.convert --peer-python MBRIDGE_VENV/bin/python

Writes a deepseek_v3 checkpoint of random numbers (benchmarks/synthetic_checkpoint.py) in BF16, and the same model in
FP8 blocks, about half as large. Each round then takes `cp -r` of one source, the conversions of that source, and the
same for the other source, so that what changes on the machine changes for all. A conversion's share is its rate over
that of its own round's `cp -r`; a rate is the source's bytes by the wall seconds of the whole command, the start of its
processes among them. Medians are over rounds. megatron-to-hf reads what hf-to-megatron has just written, as many bytes
as the BF16 source but for file heads, and its share is of the `cp -r` of that.

Every timed command begins alike: its source was read through once just before, so that it is in the page cache as far
as it fits, and `sync` has put on the disk what former commands wrote, which would otherwise hold this one's writes
back. What a command wrote may still be in memory when it ends, with `cp` as with ours. Outputs are deleted after each,
and one `cp -r` of each source goes before the first round, so that no command is the first to ask a virtual machine's
host for the memory of its output. Use a file system without reflinks: where there are, `cp` copies nothing.

Memory is the largest sum over a command's processes, sampled every 50 ms: of resident sizes, where the pages of shared
libraries count once for each process, and of what each process has for itself. The first must stay within
1.5 GB + 2 x workers x the largest tensor of the source.

Run it on an idle machine. CPU seconds, of all processes of a command, tell whether it was: busy neighbours draw out the
wall seconds much more. The exit code is 0 where every bound holds, 1 where one does not, 2 where nothing was found out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import measured_command
from benchmarks.measured_command import Measured

if TYPE_CHECKING:  # it imports torch, which --help need not wait for
    from benchmarks.synthetic_checkpoint import Synthetic

REPO = Path(__file__).resolve().parents[1]
TOOL = REPO / "tools" / "convert_checkpoint.py"
PACKAGES = ("torch", "megatron-core", "xxhash", "psutil")
FREE_BYTES = 1_500_000_000  # of the memory bound: what needs no tensor
DISK_SHARE = 3.6  # of --gigabytes: both sources, and a checkpoint in either format
OWN_FOLDER = "convert-benchmark"
PEER_HOW_TO = """\
mbridge was not measured. To have it beside:
    python -m venv MBRIDGE && MBRIDGE/bin/pip install -e '.[cpu]' && MBRIDGE/bin/pip install mbridge==0.15.1 --no-deps
    MBRIDGE/bin/pip install einops && python -m benchmarks.convert --peer-python MBRIDGE/bin/python"""


@dataclass(frozen=True)
class Conversion:
    """One way to run the tool. `reads` is the folder of its source, `share` the least part of the rate of `cp -r`."""

    source: str
    reads: str
    writes: str
    arguments: tuple[str, ...]
    share: float | None

    def command(self, folder: Path, workers: int) -> list[str]:
        """The command line, on the folders below `folder`."""
        option = "--megatron" if self.arguments[0].startswith("megatron") else "--hf"
        places = (option, str(folder / self.reads), "--out", str(folder / self.writes))
        return [sys.executable, str(TOOL), *self.arguments, *places, "--workers", str(workers)]


CONVERSIONS = {
    "hf-to-megatron": Conversion("bf16", "bf16", "megatron", ("hf-to-megatron",), 0.60),
    "megatron-to-hf": Conversion("bf16", "megatron", "hf", ("megatron-to-hf",), 0.60),
    "bf16-to-fp8": Conversion("bf16", "bf16", "hf", ("hf-to-hf", "--dtype", "fp8"), None),
    "fp8-to-bf16": Conversion("fp8", "fp8", "hf", ("hf-to-hf", "--dtype", "bf16"), 0.25),
}
DEFAULT = ("hf-to-megatron", "megatron-to-hf", "fp8-to-bf16")
SOURCES = {"bf16": "BF16", "fp8": "FP8"}


@dataclass
class Series:
    """One command over the rounds. `shares`: of the rate of each round's `cp -r`; empty for that itself."""

    name: str
    source_bytes: int
    runs: list[Measured] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    least_share: float | None = None
    memory_bound: int | None = None

    @property
    def peak_rss(self) -> int:
        """The largest of the rounds."""
        return max(run.peak_rss for run in self.runs)

    @property
    def seconds(self) -> float:
        """The median of the rounds."""
        return median(run.seconds for run in self.runs)

    def broken(self) -> list[str]:
        """The bounds that do not hold, in words."""
        found = []
        if self.least_share is not None and median(self.shares) < self.least_share:
            found.append(f"{self.name}: {median(self.shares):.2f} of cp -r; must be {self.least_share:.2f} or more")
        if self.memory_bound is not None and self.peak_rss > self.memory_bound:
            found.append(f"{self.name}: {self.peak_rss:,} bytes of memory; must be {self.memory_bound:,} or less")
        return found


def copy_name(source: str) -> str:
    """What the table calls the copy of a source."""
    return f"cp -r, {SOURCES[source]}"


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def measure(name: str, command: Sequence[str], reads: Path) -> Measured:
    """Run one command from the common beginning: its source read, nothing left to be written."""
    say(f"{name} ...")
    measured_command.read_through(reads)
    os.sync()
    paths = os.pathsep.join(filter(None, (str(REPO), os.environ.get("PYTHONPATH"))))
    found = measured_command.run(command, os.environ | {"PYTHONPATH": paths})
    say(f"{name}: {found.seconds:.2f} s")
    return found


@contextmanager
def removed(*folders: Path) -> Iterator[None]:
    """A context before and after which none of these folders is there, whole or partial."""
    paths = [path for folder in folders for path in (folder, folder.with_name(folder.name + ".partial"))]
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
    try:
        yield
    finally:
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)


def take_copy(label: str, folder: Path, source: str) -> Measured:
    """`cp -r` of a source."""
    with removed(folder / "copy"):
        command = ["cp", "-r", str(folder / source), str(folder / "copy")]
        return measure(f"{label}: {copy_name(source)}", command, folder / source)


def take_round(number: int, folder: Path, series: dict[str, Series], options: argparse.Namespace) -> None:
    """`cp -r` of each source and its conversions, once each, into `series`."""
    for source in options.sources:
        copy = series[copy_name(source)]
        copy.runs.append(take_copy(f"round {number}", folder, source))
        with removed(folder / "megatron"):
            for name in options.cases:
                case = CONVERSIONS[name]
                if case.source != source:
                    continue
                mine = series[name]
                with removed(*(() if case.writes == "megatron" else (folder / case.writes,))):
                    command = case.command(folder, options.workers)
                    mine.runs.append(measure(f"round {number}: {name}", command, folder / case.reads))
                rate, copied = mine.source_bytes / mine.runs[-1].seconds, copy.source_bytes / copy.runs[-1].seconds
                mine.shares.append(rate / copied)


def take_peer(source: Synthetic, python: str) -> dict[str, Any]:
    """mbridge's own report of loading the BF16 source, with `source_bytes` and the `command_seconds` of its process.

    Where it fails, as when its model does not fit into memory, `error` says so.
    """
    threads = str(len(os.sched_getaffinity(0)))
    command = [python, "-m", "benchmarks.mbridge_peer", str(source.path), "--threads", threads]
    try:
        found = measure("mbridge loads BF16", command, source.path)
    except (RuntimeError, OSError) as error:
        return {"error": str(error)}
    loaded = json.loads(found.stdout.splitlines()[-1])
    return loaded | {"source_bytes": source.total_bytes, "command_seconds": found.seconds}


def rows(series: dict[str, Series], peer: dict[str, Any] | None) -> list[list[str]]:
    """The table's cells, its head first."""
    found = [["command", "s", "CPU s", "MB/s", "of cp -r", "range", "least", "RSS MB", "own MB", "most MB"]]
    for one in series.values():
        times = [f"{one.seconds:.2f}", f"{median(run.cpu_seconds for run in one.runs):.2f}"]
        shares = ["", "", ""]
        if one.shares:
            least = "" if one.least_share is None else f"{one.least_share:.2f}"
            shares = [f"{median(one.shares):.2f}", f"{min(one.shares):.2f} to {max(one.shares):.2f}", least]
        memory = [megabytes(one.peak_rss), megabytes(max(run.peak_uss for run in one.runs))]
        memory.append("" if one.memory_bound is None else megabytes(one.memory_bound))
        found.append([one.name, *times, megabytes(one.source_bytes / one.seconds), *shares, *memory])
    if peer and "error" not in peer:
        rate, memory = megabytes(peer["source_bytes"] / peer["seconds"]), megabytes(peer["vm_hwm_bytes"])
        found.append([f"{peer['peer']}, load", f"{peer['seconds']:.2f}", "", rate, "", "", "", memory, "", ""])
    return found


def table(cells: Sequence[Sequence[str]]) -> str:
    """The cells as text, the first column to the left and the others to the right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *padded[1:]]).rstrip())
    return "\n".join(lines)


def megabytes(count: float) -> str:
    """A number of bytes in MB."""
    return f"{count / 1e6:,.0f}"


def make_sources(folder: Path, options: argparse.Namespace) -> dict[str, Synthetic]:
    """Write the checkpoints to convert into folders of their names."""
    from benchmarks import synthetic_checkpoint
    from r1mega.conversion.progress import Bar

    made = {}
    for source in options.sources:
        say(f"writing the {SOURCES[source]} source ...")
        with Bar("writing") as bar:
            made[source] = synthetic_checkpoint.write(
                folder / source, round(options.gigabytes * 1e9), is_fp8=source == "fp8", progress=bar.update
            )
    return made


def begin(made: dict[str, Synthetic], options: argparse.Namespace) -> dict[str, Series]:
    """An empty series for each command, in the order of a round."""
    found = {}
    for source, checkpoint in made.items():
        size = measured_command.read_through(checkpoint.path)
        bound = FREE_BYTES + 2 * options.workers * checkpoint.largest_bytes
        found[copy_name(source)] = Series(copy_name(source), size)
        for name in options.cases:
            if CONVERSIONS[name].source == source:
                found[name] = Series(name, size, least_share=CONVERSIONS[name].share, memory_bound=bound)
    return found


def report(made: dict[str, Synthetic], series: dict[str, Series], peer: dict[str, Any] | None, workers: int) -> str:
    """All that is printed at the end."""
    lines = []
    for source, checkpoint in made.items():
        lines.append(
            f"{SOURCES[source]} source: {checkpoint.total_bytes / 1e9:.2f} GB, {checkpoint.num_tensors:,} tensors, "
            f"{checkpoint.num_files} files, {checkpoint.num_layers} layers; largest tensor "
            f"{checkpoint.largest_bytes / 1e6:.1f} MB"
        )
    rounds = max(len(one.runs) for one in series.values())
    lines += [f"{workers} workers, medians of {rounds} rounds", table(rows(series, peer))]
    if not peer:
        lines.append(PEER_HOW_TO)
    elif "error" in peer:
        lines.append(f"mbridge was not measured; it failed: {peer['error']}")
    else:
        lines.append(
            f"{peer['peer']}'s load ends in memory, with nothing written. Its seconds leave out starting the process "
            f"and building the model; the whole command took {peer['command_seconds']:.2f} s.\n"
            f"Its RSS, {megabytes(peer['rss_before_bytes'])} MB before, holds the model and mapped pages of the source."
        )
    lines += [f"NOT MET: {broken}" for one in series.values() for broken in one.broken()]
    return "\n".join(lines)


def to_json(
    made: dict[str, Synthetic], series: dict[str, Series], peer: dict[str, Any] | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Everything measured, and what it was measured with."""
    return {
        "machine": {"processor": platform.processor() or platform.machine(), "cpus": len(os.sched_getaffinity(0))},
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "load_average": os.getloadavg(),
        "workers": options.workers,
        "sources": {source: checkpoint.to_json() for source, checkpoint in made.items()},
        "commands": [asdict(one) | {"not_met": one.broken()} for one in series.values()],
        "peer": peer,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=8.0, help="least size of the BF16 source (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="of every command (default: 3)")
    parser.add_argument("--workers", type=int, default=2, help="processes that convert (default: 2)")
    parser.add_argument(
        "--cases", nargs="+", choices=tuple(CONVERSIONS), default=DEFAULT, metavar="CASE",
        help=f"what to time, of {', '.join(CONVERSIONS)} (default: all but bf16-to-fp8)",
    )  # fmt: skip
    parser.add_argument("--dir", type=Path, help="work in a folder there, on the disk to measure (default: here)")
    parser.add_argument("--keep", action="store_true", help="keep the sources below --dir, and use them the next time")
    parser.add_argument("--peer-python", metavar="PATH", help="Python of an environment with mbridge: time it as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's numbers there")
    options = parser.parse_args(arguments)
    for name, least in (("rounds", 1), ("workers", 1), ("gigabytes", 0.15)):
        if getattr(options, name) < least:
            parser.error(f"--{name}: got {getattr(options, name)}, must be {least} or more")
    if options.keep and not options.dir:
        parser.error("--keep: needs --dir, which says where")
    options.cases = [name for name in CONVERSIONS if name in options.cases]  # in the order of a round
    if "megatron-to-hf" in options.cases and "hf-to-megatron" not in options.cases:
        parser.error("--cases: megatron-to-hf reads what hf-to-megatron has written; name both")
    used = {CONVERSIONS[name].source for name in options.cases} | ({"bf16"} if options.peer_python else set())
    options.sources = [source for source in SOURCES if source in used]
    return options


def run(folder: Path, options: argparse.Namespace) -> int:
    """Make the sources, take the rounds, print what was found; the exit code."""
    free, needed = shutil.disk_usage(folder).free, DISK_SHARE * options.gigabytes * 1e9
    if free < needed:
        raise ValueError(f"{folder}: {free:,} bytes free; {needed:,.0f} are needed; name another disk with --dir")
    made = make_sources(folder, options)
    series = begin(made, options)
    for source in made:
        take_copy("not counted", folder, source)
    for number in range(1, options.rounds + 1):
        take_round(number, folder, series, options)
    peer = take_peer(made["bf16"], options.peer_python) if options.peer_python else None
    print(report(made, series, peer, options.workers))
    if options.json:
        options.json.write_text(json.dumps(to_json(made, series, peer, options), indent=1) + "\n", encoding="utf-8")
    return int(any(one.broken() for one in series.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark in a folder of its own; the exit code."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that it too leaves nothing behind
    folder = options.dir / OWN_FOLDER if options.dir else Path(tempfile.mkdtemp(prefix=f"{OWN_FOLDER}-", dir="."))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return run(folder, options)
    except (RuntimeError, ValueError, OSError) as error:
        say(f"convert: {error}")
        return 2
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
