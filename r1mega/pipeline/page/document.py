"""The page of a pipeline: one HTML file that needs nothing else, and is the same to the byte for the same input.

The browser is told (Content-Security-Policy) to load nothing and to run no script but the page's own, whatever a model
may have written into its answers.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path

from r1mega.metrics.catalog import format_seconds
from r1mega.pipeline.page.curves import curves
from r1mega.pipeline.page.fields import PageError
from r1mega.pipeline.page.input import Page, read
from r1mega.pipeline.page.lineage import lineage
from r1mega.pipeline.page.markup import Child, Element, definitions, el, raw, to_html
from r1mega.pipeline.page.samples import samples
from r1mega.pipeline.page.tables import findings, stage_table
from r1mega.pipeline.page.text import listed, plural

PAGE_FILE = "report.html"
_MOST_NAMED = 10  # stages in the sentence under the title


def main(arguments: Sequence[str]) -> int:
    """`r1mega report`: draw the page and print its path; 2 where a file is missing or not as it must be."""
    about = (
        "Writes one HTML page that needs no other file and no network, from report.json and lineage.json in RUN_DIR, "
        "which `r1mega pipeline` leaves there: the findings against their baselines, accuracy and response length over "
        "updates, the stages with their metrics, answers of several stages side by side, and what every artifact was "
        "made of."
    )
    parser = argparse.ArgumentParser(prog="r1mega report", description=about)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the run.dir of an `r1mega pipeline`")
    parser.add_argument("--out", metavar="FILE", type=Path, help=f"where to write it [RUN_DIR/{PAGE_FILE}]")
    options = parser.parse_args(list(arguments))
    try:
        print(write(options.run_dir, options.out), flush=True)
    except PageError as error:
        print(f"r1mega: {error}", file=sys.stderr)
        return 2
    return 0


def write(run_dir: Path, out: Path | None = None) -> Path:
    """Draw the page of `run_dir` into `out` (its report.html where None) and return the path.

    Raises PageError, which names file and key, where report.json or lineage.json is missing or not as it must be, and
    where `out` cannot be written.
    """
    page = read(run_dir)
    path = run_dir / PAGE_FILE if out is None else out
    text = render(page)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(path)
    except OSError as error:
        raise PageError(f"{path} cannot be written: {error.strerror}") from error
    return path


def render(page: Page) -> str:
    """The page as HTML."""
    parts = (
        ("findings", "Findings", _verdicts(page), findings(page.findings)),
        (
            "curves",
            "Curves",
            "Accuracy and mean response length over the updates of each stage.",
            curves(page.stages, len(page.seeds)),
        ),
        ("stages", "Stages", "What each stage scores once it is done.", stage_table(page.stages)),
        ("samples", "Samples", "The same question, answered by the models of several stages.", samples(page.stages)),
        ("lineage", "Lineage", "Every artifact, and what it was made of.", lineage(page)),
    )
    links = [el("a", title, href=f"#{name}") for name, title, _, _ in parts]
    sections = [
        el("section", el("h2", title), el("p", lead, cls="lead"), part, id=name) for name, title, lead, part in parts
    ]
    header = el("header", el("h1", page.title), el("p", _sentence(page), cls="sentence"), el("nav", *links))
    body = el("body", header, el("main", *sections), _footer(page), raw("script", _asset("page.js")))
    root = el("html", _head(page), body, lang="en")
    for one in (*sections, header, *root):
        one.tail = "\n"
    return to_html(root)


def _head(page: Page) -> Element:
    script = base64.b64encode(hashlib.sha256(_asset("page.js").encode()).digest()).decode()
    allowed = f"style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    return el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", page.title),
        raw("style", _asset("page.css")),
    )


def _asset(name: str) -> str:
    return resources.files("r1mega.pipeline.page").joinpath(name).read_text(encoding="utf-8")


def _sentence(page: Page) -> str:
    names = [stage.name for stage in page.stages]
    seeds = listed([str(seed) for seed in page.seeds])
    with_seeds = f", with seed{'s' if len(page.seeds) > 1 else ''} {seeds}" if seeds else ""
    took = "" if page.seconds is None else f", whose times add up to {format_seconds(page.seconds)}"
    which = f": {listed(names)}" if 0 < len(names) <= _MOST_NAMED else ""
    return f"A run of the DeepSeek-R1 pipeline through {plural(len(names), 'stage')}{with_seeds}{took}{which}."


def _verdicts(page: Page) -> str:
    if not page.findings:
        return "What the paper found, and whether it shows here."
    held = sum(one.holds is True for one in page.findings)
    failed = sum(one.holds is False for one in page.findings)
    left = len(page.findings) - held - failed
    of = f"Of {plural(len(page.findings), 'finding')}, {held} hold{'s' if held == 1 else ''} here"
    parts = [of, f"{failed} {'does' if failed == 1 else 'do'} not show"] if failed else [of]
    return ", ".join(parts + ([f"{left} {'is' if left == 1 else 'are'} not decided"] if left else [])) + "."


def _footer(page: Page) -> Element:
    configs = [[work.name, work.config] for work in page.works]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest() if configs else ""
    codes = ", ".join(dict.fromkeys(work.code for work in page.works if work.code))
    rows: list[tuple[str, Child]] = [
        ("config digest", el("code", digest) if digest else "none"),
        ("code version", el("code", codes) if codes else "none recorded"),
        ("time", _seconds(page)),
        ("seeds", ", ".join(str(seed) for seed in page.seeds) or "none"),
    ]
    rows += [(f"{name}, sha256", el("code", sha256)) for name, sha256 in page.digests.items()]
    rows.append(("page drawn by", f"r1mega {_version()}"))
    if page.unshown:
        rows.append(("not shown here", ", ".join(page.unshown)))
    return el("footer", definitions(rows))


def _seconds(page: Page) -> Child:
    if page.seconds is None:
        return "none"
    text = f"{page.seconds:,.1f} s"
    return el("data", text, value=repr(page.seconds), title=f"{page.seconds!r} s")


def _version() -> str:
    try:
        return metadata.version("r1mega")
    except metadata.PackageNotFoundError:
        return "(a source tree that is not installed)"
