"""One training process: `python -m r1mega.loop.worker --config RUN_DIR/config.yaml`, started once per rank."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

from r1mega.config import io
from r1mega.config.choices import Loop
from r1mega.loop.stop import STOPPED, Stopped


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
    from r1mega.parallel import device

    # Before the loops are imported: they import Megatron, which binds the device when it is imported.
    device.prepare(str(config.device.type), int(os.environ.get("LOCAL_RANK", "0")), config.device.threads)
    # Megatron warns on every rank that apex and Transformer Engine are absent; `device.layer_spec` says which is meant.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    if args.replay:
        from r1mega.loop import replay

        round_number, _, update = args.replay.partition(":")
        replay.main(config, int(round_number), int(update), args.out)
        return
    try:
        if config.stage.loop is Loop.evaluate:
            from r1mega.loop import evaluate

            evaluate.main(config)
        elif config.stage.loop is Loop.reject:
            from r1mega.loop import reject

            reject.main(config)
        elif config.stage.loop is Loop.sft:
            from r1mega.loop import sft

            sft.main(config)
        elif config.stage.loop is Loop.reward_model:
            from r1mega.loop import reward_model

            reward_model.main(config)
        else:
            from r1mega.loop import hybrid

            hybrid.main(config)
    except Stopped as stopped:
        from r1mega.parallel import groups

        groups.shutdown()
        print(f"r1mega: stopped after a checkpoint, as asked by {stopped}", file=sys.stderr)
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
