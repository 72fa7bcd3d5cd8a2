"""Rerank N answers by a process reward model: one JSON line for each question, with the answer it thinks best.

--input FILE.jsonl holds {"question", "responses": [...]} a line. --run RUN_DIR takes the kept samples of `r1mega
evaluate` instead, and says at the end how often the best one was right, beside pass@1 and cons@k of the same samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Question:
    """What is reranked. `scores` are those of the benchmark's grader, where there are any."""

    id: str
    prompt: str
    responses: list[str]
    scores: list[float] | None = None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--prm", type=Path, required=True, metavar="DIR", help="checkpoint with a head over tokens")
    source = top.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, metavar="FILE")
    source.add_argument("--run", type=Path, metavar="RUN_DIR")
    top.add_argument("--aggregate", choices=("min", "prod", "mean"), default="min", help="of a response's step scores")
    top.add_argument("--separator", default="\n\n", help="what ends a step (default: a blank line)")
    top.add_argument("--good-label", type=int, default=-1, help="label of a good step (default: the last)")
    top.add_argument("--device", default="cpu")
    return top


def main() -> int:
    """Rerank; 0, or 2 where the model or the input cannot be used."""
    arguments = parser().parse_args()
    from r1mega.rollout.process_reward import ProcessRewardModel, rerank

    try:
        model = ProcessRewardModel(arguments.prm, good_label=arguments.good_label, device=arguments.device)
        questions = of_run(arguments.run) if arguments.run else of_file(arguments.input)
        firsts, chosen = [], []
        for question in questions:
            best, scores, steps = rerank(
                model, question.prompt, question.responses, aggregate=arguments.aggregate, separator=arguments.separator
            )
            line = {"id": question.id, "best": best, "scores": scores, "steps": steps}
            print(json.dumps(line | {"response": question.responses[best]}, ensure_ascii=False))
            if question.scores is not None:
                firsts.append(sum(question.scores) / len(question.scores))
                chosen.append(question.scores[best])
    except (ValueError, OSError) as error:
        print(f"rerank_prm: {error}", file=sys.stderr)
        return 2
    if chosen:
        report = json.loads((arguments.run / "report.json").read_text("utf-8"))
        votes = {name: entry["value"] for name, entry in report["metrics"].items() if name.startswith("cons@")}
        figures = {"pass@1": sum(firsts) / len(firsts), **votes, "reranked": sum(chosen) / len(chosen)}
        print(json.dumps(figures), file=sys.stderr)
    return 0


def of_file(path: Path) -> Iterator[Question]:
    """The questions of a JSONL file. Raises ValueError naming `path:line`."""
    from r1mega.data.jsonl import read_rows

    for line, row in read_rows(path, ("question",)):
        responses = row.get("responses")
        if not isinstance(responses, list) or not responses or not all(isinstance(text, str) for text in responses):
            raise ValueError(f"{path}:{line}: 'responses' must be a list of texts")
        yield Question(str(row.get("id", f"{path}:{line}")), row["question"], responses)


def of_run(run_dir: Path) -> Iterator[Question]:
    """The problems of an evaluation with their kept samples."""
    from r1mega.benchmark.rows import read_problems
    from r1mega.benchmark.samples import SampleFile

    if not (run_dir / "report.json").is_file():
        raise ValueError(f"{run_dir}: no report.json there; name the run.dir of an evaluation that has ended")
    problems = read_problems(run_dir / "benchmark.jsonl")
    with SampleFile(run_dir / "samples.jsonl") as file:
        samples = file.ordered()
    for place, problem in enumerate(problems):
        own = [sample for sample in samples if sample.problem == place]
        yield Question(problem.id, problem.prompt, [s.text for s in own], [s.score for s in own])


if __name__ == "__main__":
    sys.exit(main())
