"""Mix files of {prompt, response} rows into one that supervised fine-tuning reads, with counts and provenance.

    python tools/mix_sft.py --out sft.jsonl --source reasoning=runs/rejection/curated.jsonl --source writing=w.jsonl \\
        --limit reasoning=600000 --limit writing=200000 --benchmark aime.jsonl --benchmark math500.jsonl

Rows whose prompt shares an n-gram with a benchmark are left out, and so are those with the words of an earlier one;
then those over the limit of their source, or over its share of the whole. Writes --out, where each row's `provenance`
names its source, and OUT.counts.json beside it; prints that as one JSON line. The same input and seed give the same
bytes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def main() -> None:
    """Read, mix, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="where the mixture goes")
    parser.add_argument("--source", action="append", required=True, metavar="NAME=FILE.jsonl", help="rows, named")
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=N", help="rows of a source at most")
    parser.add_argument("--share", action="append", default=[], metavar="NAME=S", help="share of a source, 0 .. 1")
    parser.add_argument("--benchmark", action="append", default=[], metavar="FILE.jsonl", help="what is evaluated on")
    parser.add_argument("--benchmark-keys", nargs="+", default=["question", "problem", "prompt", "answer", "solution"])
    parser.add_argument("--ngram", type=int, default=10, help="words in a row that are an overlap (default 10, R1's)")
    parser.add_argument(
        "--special-tokens", nargs=2, metavar=("OPEN", "CLOSE"), help="write thinking responses as OPEN..CLOSE.."
    )
    parser.add_argument("--seed", type=int, default=0, help="which rows are left out over a limit (default 0)")
    args = parser.parse_args()
    try:
        print(json.dumps(run(args), ensure_ascii=False))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The counts of the mixture, which is written."""
    from r1mega.curation import mix
    from r1mega.curation.decontaminate import read_benchmarks
    from r1mega.curation.patterns import in_pattern
    from r1mega.curation.texts import CLOSE

    sources = _sources(args)
    benchmarks = read_benchmarks(args.benchmark, args.benchmark_keys, args.ngram) if args.benchmark else None
    found = mix.mix(sources, seed=args.seed, benchmarks=benchmarks)
    for row in found.rows if args.special_tokens else ():
        if CLOSE in row["response"]:
            try:
                row["response"] = in_pattern(row["response"], args.special_tokens)
            except ValueError as error:
                raise ValueError(f"{row['provenance']['row']}: {error}") from None
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows), encoding="utf-8")
    summary = {
        "out": str(args.out),
        "rows": len(found.rows),
        "sha256": mix.digest_of(args.out),
        "seed": args.seed,
        "sources": {
            source.name: {"file": source.path, "sha256": mix.digest_of(source.path), **found.counts[source.name]}
            for source in sources
        },
        "benchmarks": {path: mix.digest_of(path) for path in args.benchmark},
    }
    path = args.out.with_name(args.out.name + ".counts.json")
    path.write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return summary


def _sources(args: argparse.Namespace) -> list[Any]:
    """The sources in their order. Raises ValueError for what is malformed or names none of them."""
    from r1mega.curation.mix import Source

    paths = dict(_pairs("--source", args.source))
    if len(paths) < len(args.source):
        raise ValueError(f"--source: got {' '.join(args.source)}; every source needs a name of its own")
    limits = {name: _number("--limit", name, text, int) for name, text in _pairs("--limit", args.limit)}
    shares = {name: _number("--share", name, text, float) for name, text in _pairs("--share", args.share)}
    for option, named in (("--limit", limits), ("--share", shares)):
        for name in named:
            if name not in paths:
                raise ValueError(f"{option}: got {name}; the sources are {', '.join(paths)}")
    return [Source(name, path, limits.get(name), shares.get(name)) for name, path in paths.items()]


def _pairs(option: str, given: list[str]) -> list[tuple[str, str]]:
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{option}: got {text!r}; must be NAME=VALUE")
    return [(text.partition("=")[0], text.partition("=")[2]) for text in given]


def _number(option: str, name: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{option}: got {name}={text}; must be a number") from None


if __name__ == "__main__":
    main()
