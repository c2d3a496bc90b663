"""Move two tokens together: their score must stay. With bf16 angles it goes."""

import torch

from warpmap import DEVICE
from warpmap.kernels.fused.rope import rope

x = torch.ones(1, 2, 1, 64, device=DEVICE)  # query and key of both tokens
pairs = torch.arange(32, dtype=torch.float64, device=DEVICE)
turns = 10000 ** (-pairs / 32)  # radians a token


def score(first, dtype):
    """Of a token and the third after it, from angles in ``dtype``."""
    positions = torch.tensor([first, first + 3], device=DEVICE)
    angles = torch.outer(positions.to(dtype), turns.to(dtype)).double()
    q, k = rope(x, x, angles.cos().float(), angles.sin().float())
    return round((q[0, 1] @ k[0, 0].T).item())


for dtype in (torch.float64, torch.bfloat16):
    print([score(first, dtype) for first in (0, 100, 1000, 10000)])
# -> [51, 51, 51, 51]
# -> [51, 52, 53, 64]
