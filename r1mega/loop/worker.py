"""The training processes of a run: `python -m r1mega.loop.worker --config RUN_DIR/config.yaml`, one or all of them."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

from r1mega.config import io
from r1mega.config.choices import EngineKind, Loop
from r1mega.config.schema import Config
from r1mega.loop.stop import STOPPED, Stopped

_LOOPS = {
    Loop.rl: "r1mega.loop.hybrid",
    Loop.sft: "r1mega.loop.sft",
    Loop.reward_model: "r1mega.loop.reward_model",
    Loop.evaluate: "r1mega.loop.evaluate",
    Loop.reject: "r1mega.loop.reject",
}


def main() -> None:
    """Load the resolved configuration and run the loop of its stage.

    Exit code 75 (EX_TEMPFAIL) where the run was asked to stop and has saved where it stands.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the resolved config.yaml of a run directory")
    parser.add_argument("--replay", metavar="ROUND:UPDATE", help="do this update of a past run again, without engines")
    parser.add_argument("--out", type=Path, help="where a replay's result goes")
    args = parser.parse_args()
    config = io.load(args.config)
    # Here and not above: the reward workers import this module again, and they need no torch.
    from r1mega.parallel import device, fork

    # Before the loops are imported: they import Megatron, which binds the device when it is imported.
    device.prepare(str(config.device.type), int(os.environ.get("LOCAL_RANK", "0")), config.device.threads)
    # Megatron warns on every rank that apex and Transformer Engine are absent; `device.layer_spec` says which is meant.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    work = _loop(config) if args.replay is None else _replay(config, args.replay, args.out)
    fork.divide()
    try:
        work()
    except Stopped as stopped:
        from r1mega.parallel import groups

        groups.shutdown()
        print(f"r1mega: stopped after a checkpoint, as asked by {stopped}", file=sys.stderr)
        sys.exit(STOPPED)


def _loop(config: Config) -> Callable[[], None]:
    """The loop of the stage, imported with all that forks should share, ready to be run."""
    if config.rollout.engine is EngineKind.embedded and config.stage.loop in (Loop.rl, Loop.evaluate, Loop.reject):
        importlib.import_module("r1mega.rollout.embedded")
    loop = importlib.import_module(_LOOPS[config.stage.loop])
    return partial(loop.main, config)


def _replay(config: Config, asked: str, out: Path) -> Callable[[], None]:
    from r1mega.loop import replay

    round_number, _, update = asked.partition(":")
    return partial(replay.main, config, int(round_number), int(update), out)


if __name__ == "__main__":
    main()
