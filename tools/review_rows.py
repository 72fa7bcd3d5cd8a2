"""Give rows out to a person to review, and take them back.

    python tools/review_rows.py export --rows curated.jsonl --review review.csv
    python tools/review_rows.py import --rows curated.jsonl --review review.csv --out reviewed.jsonl

`export` writes a CSV (or JSONL) with the columns id, keep, prompt, response, edited_response, note. The annotator
writes yes or no under keep, where it helps a better response under edited_response, and a note. `import` names every
row that is missing, changed where it must not be, undecided or broken, and writes nothing then; else it writes the
kept rows, with what was done in `provenance.review`, and prints the counts as one JSON line. With --special-tokens they
are written in R1's cold-start pattern, OPEN<reasoning_process>CLOSE<summary>.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def main() -> None:
    """Do what the command says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("export", "write the review file"), ("import", "take it back")):
        command = commands.add_parser(name, help=about)
        command.add_argument("--rows", type=Path, required=True, metavar="FILE.jsonl", help="{prompt, response} rows")
        command.add_argument("--review", type=Path, required=True, metavar="FILE", help=".csv or .jsonl")
        if name == "import":
            command.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="where kept rows go")
            forms = ("any", "think", "r1_zero")
            command.add_argument("--form", choices=forms, default="think", help="of edited responses (default think)")
            command.add_argument("--special-tokens", nargs=2, metavar=("OPEN", "CLOSE"), help="write them in a pattern")
    args = parser.parse_args()
    try:
        print(json.dumps(export(args) if args.command == "export" else take_back(args)))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def export(args: argparse.Namespace) -> dict[str, int]:
    """Write the review file, which must not be there: it may hold somebody's work."""
    from r1mega.curation.review import read_originals, write_review

    if args.review.exists():
        raise ValueError(f"--review: got {args.review}, which is there already; choose another name or remove it")
    rows = read_originals(args.rows)
    write_review(rows, args.review)
    return {"given": len(rows)}


def take_back(args: argparse.Namespace) -> dict[str, int]:
    """Check the review file and write the kept rows."""
    from r1mega.curation.filters import Candidate, Limits, is_well_formed
    from r1mega.curation.patterns import in_pattern
    from r1mega.curation.review import read_originals, read_review

    limits = Limits(form=args.form)

    def is_sound(text: str) -> bool:
        return is_well_formed(Candidate("", 0, "", text), limits) is not False

    rows, counts = read_review(read_originals(args.rows), args.review, is_sound)
    for row in rows if args.special_tokens else ():
        try:
            row["response"] = in_pattern(row["response"], args.special_tokens)
        except ValueError as error:
            raise ValueError(f"{row['id']}: {error}") from None
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return counts


if __name__ == "__main__":
    main()
