"""A softmax needs its row in no order: cut it, shuffle it, merge the pieces."""

import math
import random
from functools import reduce

import torch

from warpmap import DEVICE
from warpmap.kernels.normalization._online import State, merge
from warpmap.kernels.normalization.online_softmax import online_softmax

random.seed(0)
row = [random.gauss(0, 100) for _ in range(100_000)]

state, records = State(), 0
for score in row:
    records += score > state.max
    state = merge(state, State(score, 1.0))

print("scores that beat all before them:", records, "of", len(row))
# -> scores that beat all before them: 8 of 100000

pieces = [row[i : i + 777] for i in range(0, len(row), 777)]
random.shuffle(pieces)
states = [
    State(max(p), math.fsum(math.exp(x - max(p)) for x in p)) for p in pieces
]
shuffled = reduce(merge, states)
print(shuffled.max == state.max, math.isclose(shuffled.sum, state.sum))
# -> True True

y = online_softmax(torch.tensor([row], device=DEVICE))[0]
print(math.isclose(y.max().item(), 1 / state.sum, rel_tol=1e-5))
# -> True
