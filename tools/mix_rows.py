"""Join JSONL files of rows into one, in an order that a seed decides; no row twice.

Rows are kept as they are, provenance included. Two rows are the same where all of their values are.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path


def main() -> int:
    """Write the file and print one JSON line that says what is in it; exit code 2 where a row cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl", help="rows to join")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.jsonl", help="where they go")
    parser.add_argument("--seed", type=int, default=0, help="seed of their order (default 0)")
    parser.add_argument(
        "--keys", default="", metavar="A,B", help="keys that every row must have, such as prompt,response"
    )
    args = parser.parse_args()
    try:
        rows, counts = read_all(args.files, [key for key in args.keys.split(",") if key])
    except (OSError, ValueError) as error:
        print(f"mix_rows: {error}", file=sys.stderr)
        return 2
    random.Random(args.seed).shuffle(rows)
    part = args.out.with_name(args.out.name + ".part")
    with part.open("w", encoding="utf-8") as out:
        out.writelines(row + "\n" for row in rows)
    part.replace(args.out)
    twice = sum(counts.values()) - len(rows)
    print(json.dumps({"out": str(args.out), "rows": len(rows), "twice": twice, "files": counts}))
    return 0


def read_all(files: list[Path], keys: list[str]) -> tuple[list[str], dict[str, int]]:
    """The different rows of all files, each as one line of JSON, and the rows of each file.

    Raises ValueError naming `file:line` where a line is no JSON object or lacks one of `keys`.
    """
    found: list[str] = []
    seen: set[bytes] = set()
    counts: dict[str, int] = {}
    for path in files:
        counts[str(path)] = 0
        for row in _rows(path, keys):
            counts[str(path)] += 1
            digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()
            if digest not in seen:
                seen.add(digest)
                found.append(json.dumps(row, ensure_ascii=False))
    return found, counts


def _rows(path: Path, keys: list[str]) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error
            missing = [key for key in keys if not isinstance(row, dict) or key not in row]
            if not isinstance(row, dict) or missing:
                what = f"lacks {', '.join(missing)}" if isinstance(row, dict) else "is no JSON object"
                raise ValueError(f"{path}:{number}: the row {what}")
            yield row


if __name__ == "__main__":
    sys.exit(main())
