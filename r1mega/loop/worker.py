"""One training process: `python -m r1mega.loop.worker --config RUN_DIR/config.yaml`, started once per rank."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

from r1mega.config import io
from r1mega.config.schema import Loop


def main() -> None:
    """Load the resolved configuration and run the loop of its stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="the resolved config.yaml of a run directory")
    config = io.load(parser.parse_args().config)
    # Here and not above: the reward workers import this module again, and they need no torch.
    from r1mega.parallel import device

    # Before the loops are imported: they import Megatron, which binds the device when it is imported.
    device.prepare(str(config.device.type), int(os.environ.get("LOCAL_RANK", "0")), config.device.threads)
    # Megatron warns on every rank that apex and Transformer Engine are absent; `device.layer_spec` says which is meant.
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    if config.stage.loop is Loop.sft:
        from r1mega.loop import sft

        sft.main(config)
    else:
        from r1mega.loop import hybrid

        hybrid.main(config)


if __name__ == "__main__":
    main()
