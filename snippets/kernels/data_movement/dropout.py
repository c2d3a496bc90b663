"""The mask of a hundred thousand elements is eight bytes: the seed."""

import torch

from warpmap import DEVICE
from warpmap.kernels.data_movement._philox import philox4x32
from warpmap.kernels.data_movement.dropout import dropout

x = torch.ones(100_000, device=DEVICE, requires_grad=True)
kept = []


def pack(saved):
    kept.append(saved.nbytes)
    return saved


with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
    y = dropout(x, p=0.5, seed=2026)
print("bytes kept for backward:", sum(kept))
# -> bytes kept for backward: 8

y.sum().backward()
print("same mask:", torch.equal(x.grad, y))
# -> same mask: True

# the elements from 80,000 on, without the 80,000 before them
words = philox4x32((80_000 // 8, 0, 0, 0), (2026, 0))
halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
print([2.0 * (half >= 2**15) for half in halves])
# -> [2.0, 0.0, 2.0, 0.0, 2.0, 2.0, 2.0, 2.0]

print(y[80_000:80_008].tolist())
# -> [2.0, 0.0, 2.0, 0.0, 2.0, 2.0, 2.0, 2.0]
