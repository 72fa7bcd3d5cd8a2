"""One rank of test_fp8_layouts.py: `python fp8_ranks.py HF LAYOUT OUT OPTIONS`, the last as JSON. See `ranks.build`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from parity import breaks, ranks
from parity.case import random_case
from r1mega.parallel import groups
from r1mega.parallel.layout import Layout

hf, layout, out, told = sys.argv[1:]
options = json.loads(told)
chunk_tokens = options.pop("chunk_tokens", 384)
device = options.pop("device", "cpu")  # on "cuda" all ranks are on one GPU
world = groups.initialize(Layout.parse(layout), device, seed=0, timeout_minutes=3, share_gpu=device == "cuda")

import torch

case = random_case(323, max_length=120, mtp_weight=0.3)
with breaks.broken(options.pop("broken", None)):
    policy = ranks.build(Path(hf), world, case, **options)
    found = ranks.answer(policy, Path(hf), case, chunk_tokens=chunk_tokens)
found["in_fp8"] = sorted(
    name for name, module in policy.chunks[-1].named_modules() if type(module).__name__.startswith("Fp8")
)
found["has_gradient"] = sorted(name for name, value in found["gradients"].items() if bool(value.any()))
if world.rank == 0:
    found["gradients"] = {name: gradient.cpu().float() for name, gradient in found["gradients"].items()}
    torch.save(found, out)
groups.shutdown()
