"""One rank: scores and gradients of a reward model. `python reward_ranks.py --hf DIR --layout L --out DIR`.

Writes `answer` and, as a Hugging Face checkpoint, `hf`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from r1mega.parallel import groups
from r1mega.parallel.layout import Layout

parser = argparse.ArgumentParser()
parser.add_argument("--hf", type=Path)
parser.add_argument("--layout", default="1")
parser.add_argument("--out", type=Path)
parser.add_argument("--doubled", action="store_true", help="sum hidden gradients over tensor ranks: a known mistake")
args = parser.parse_args()
layout = Layout.parse(args.layout)
world = groups.initialize(layout, "cpu", seed=0, timeout_minutes=3)

import torch

from r1mega.algo.preference import pairwise_loss, pointwise_loss
from r1mega.models import gpt, hf_fields
from r1mega.models.hf_config import ModelOptions
from r1mega.models.hf_io import CheckpointReader, CheckpointWriter, RandomWeights
from r1mega.models.hf_score import classifier_changes
from r1mega.train.batch import PackItem
from r1mega.train.optimizer import AdamSettings
from r1mega.train.reward_model import FrozenRewardModel, MegatronRewardModel, WithNewHead

if args.doubled:
    real = gpt.gather_from_sequence_parallel_region
    gpt.gather_from_sequence_parallel_region = lambda hidden, *, tensor_parallel_output_grad, group: real(
        hidden, tensor_parallel_output_grad=True, group=group
    )

fields = hf_fields.read(args.hf).as_reward_model()
model = MegatronRewardModel(fields, world, ModelOptions(), AdamSettings(lr=1e-3, weight_decay=0.0))
reader = CheckpointReader(args.hf)
source = WithNewHead(reader, RandomWeights(fields, seed=5))
model.load(source)

rng = random.Random(3)
items = []
for _ in range(12):
    length = rng.randint(8, 60)
    items.append(PackItem([rng.randrange(256) for _ in range(length)], rng.randint(2, length - 2)))
labels = torch.tensor([float(rng.random() < 0.5) for _ in items])

answer = {"items": [list(item.tokens) for item in items], "labels": labels}
answer["scores"] = model.scores(items, model.plan(items, 100))


def gradients(plan, loss):
    report = model.forward_backward(items, plan, loss)
    return report, {name: gradient.clone() for name, gradient in model.gradients()}


answer["pairwise"] = gradients(
    model.plan_pairs(items, 150), lambda scores_S, _micro: pairwise_loss(scores_S, len(items) // 2)
)
answer["pointwise"] = gradients(
    model.plan(items, 100), lambda scores_S, micro: pointwise_loss(scores_S, labels[list(micro.samples)], len(items))
)

args.out.mkdir(exist_ok=True)
writer = None
if world.rank == 0:
    changes = classifier_changes(fields.family)
    writer = CheckpointWriter(args.out / "hf", source=args.hf, dtypes=reader.dtypes(), config_changes=changes)
for name, tensor in model.export_hf(wanted=writer is not None):
    writer.add(name, tensor)
if writer:
    writer.close()

# The same scores of a model that is only asked, whose weights lie elsewhere in between.
frozen = FrozenRewardModel(fields, world, ModelOptions())
frozen.load(source)
assert not any(parameter.numel() for chunk in frozen.chunks for parameter in chunk.parameters())
with frozen.present():
    answer["frozen"] = frozen.scores(items, frozen.plan(items, 100))
if world.rank == 0:
    torch.save(answer, args.out / "answer")
groups.shutdown()
