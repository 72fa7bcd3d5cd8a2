#!/usr/bin/env python
"""Convert checkpoints between Hugging Face's format and Megatron's, and between FP8 and BF16, with proof.

    python tools/convert_checkpoint.py hf-to-megatron --hf DIR --out DIR [--workers N]
    python tools/convert_checkpoint.py megatron-to-hf --megatron DIR --out DIR [--dtype bf16|fp8]
    python tools/convert_checkpoint.py hf-to-hf --hf DIR --out DIR --dtype bf16|fp8

Runs on the CPU alone and holds a few tensors at a time. The Megatron side is a distributed checkpoint: every layout
(tp, pp, vpp, ep, etp) loads it, and `model.hf=DIR` trains from it. --megatron takes a converted checkpoint or one that
a run saved (RUN_DIR/checkpoints/update-N). A conversion that was stopped goes on when the same command is given again.
conversion.json in the output says what became of every tensor; tools/verify_checkpoint.py reads both sides again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="hf-to-megatron | megatron-to-hf | hf-to-hf")
    for name, source, help_text in (
        ("hf-to-megatron", "hf", "safetensors, in BF16 or FP8 blocks -> a Megatron distributed checkpoint"),
        ("megatron-to-hf", "megatron", "a Megatron distributed checkpoint -> safetensors"),
        ("hf-to-hf", "hf", "FP8 blocks <-> BF16"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument(f"--{source}", type=Path, required=True, metavar="DIR", dest="source", help="the source")
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="where to; must not exist")
        if name != "hf-to-megatron":
            command.add_argument(
                "--dtype",
                choices=("bf16", "fp8"),
                required=name == "hf-to-hf",
                help="fp8: linear layers in E4M3 blocks of 128 x 128 with fp32 scales, as DeepSeek-V3 is published"
                + (" (default: as they are stored)" if name == "megatron-to-hf" else ""),
            )
        cores = len(os.sched_getaffinity(0))
        command.add_argument("--workers", type=int, default=min(8, cores), help="processes (default: %(default)s)")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="give a field of config.json another value, e.g. max_position_embeddings=131072 or "
            "tie_word_embeddings=false; may be repeated",
        )
        command.add_argument("--tokenizer", type=Path, metavar="DIR", help="take the tokenizer's files from here")
    return top


def main() -> int:
    """Convert; 0 when the output is whole, 1 when the conversion failed on the way, 2 when it could not begin."""
    arguments = parser().parse_args()
    from r1mega.conversion import config_files
    from r1mega.conversion.progress import Bar
    from r1mega.conversion.run import ConversionError, Request, convert

    source_kind, _, to = arguments.command.partition("-to-")
    try:
        request = Request(
            source=arguments.source,
            source_kind=source_kind,
            out=arguments.out,
            to=to,
            dtype=getattr(arguments, "dtype", None),
            workers=arguments.workers,
            changes=config_files.parse_edits(arguments.set),
            tokenizer=arguments.tokenizer,
        )
        with Bar() as bar:
            outcome = convert(request, bar.update)
    except ConversionError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_checkpoint: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    for edit in outcome.edits:
        print(edit)
    if outcome.kept_parts:
        print(f"kept {outcome.kept_parts} of {outcome.parts} parts that were there")
    print(
        f"{outcome.out}: {outcome.tensors:,} source tensors used, {outcome.written_bytes / 1e9:,.2f} GB written; "
        "see conversion.json"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
