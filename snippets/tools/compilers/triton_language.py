"""What lies past the end: two ways to get it wrong without an error."""

import torch

from warpmap import DEVICE
from warpmap.kernels import tl, triton


@triton.jit
def double(x_ptr, n, MASKED: tl.constexpr):
    i = tl.arange(0, 8)
    mask = i < n if MASKED else i < 8
    tl.store(x_ptr + i, 2 * tl.load(x_ptr + i, mask), mask)


@triton.jit
def largest(x_ptr, out_ptr, n, PADDING: tl.constexpr):
    i = tl.arange(0, 8)
    tl.store(out_ptr, tl.max(tl.load(x_ptr + i, i < n, other=PADDING)))


for masked in (True, False):
    memory = torch.ones(8, device=DEVICE)
    mine, neighbours = memory[:5], memory[5:]
    double[(1,)](mine, 5, MASKED=masked)
    print(mine.tolist(), neighbours.tolist())
# -> [2.0, 2.0, 2.0, 2.0, 2.0] [1.0, 1.0, 1.0]
# -> [2.0, 2.0, 2.0, 2.0, 2.0] [2.0, 2.0, 2.0]

x = torch.tensor([-5.0, -3.0, -4.0], device=DEVICE)
for padding in (-float("inf"), 0.0):
    out = torch.empty(1, device=DEVICE)
    largest[(1,)](x, out, 3, PADDING=padding)
    print(out.item())
# -> -3.0
# -> 0.0
