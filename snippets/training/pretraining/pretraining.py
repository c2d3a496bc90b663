"""A loss below the entropy of the text is no triumph, but reciting."""

import random

import torch

from warpmap import DEVICE
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig
from warpmap.training.pretraining._markov import branching_source
from warpmap.training.pretraining.pretraining import Plan, train
from warpmap.training.pretraining.sequence_packing import Packed, pack

torch.set_num_threads(1)  # so little work: more would wait for each other
source = branching_source(branches=3)  # of 9 tokens
print([round(source.best_loss(context=n), 2) for n in (0, 1, 2)])
# -> [2.2, 1.1, 0.53]


def fresh(step):
    draw = random.Random(step)
    rows = pack([source.text(64, draw) for _ in range(8)], capacity=64)
    return Packed(*(x.to(DEVICE) for x in vars(rows).values()))


def losses(batch, steps):
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(9, 32, 1, 4, 4, 64)).to(DEVICE)
    return train(model, batch, Plan(steps, 2e-2, warmup=10, decay=30))


learned = losses(fresh, 120)
by_heart = losses(lambda step: fresh(0), 60)
for name, found in ("fresh", learned), ("repeated", by_heart):
    last = sum(found[-20:]) / 20
    below = last < source.floor(64)
    print(f"{name}: {found[0]:.1f}, then {last:.1f}, too good: {below}")
# -> fresh: 2.2, then 0.6, too good: False
# -> repeated: 2.2, then 0.2, too good: True
