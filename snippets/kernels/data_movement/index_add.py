"""A thousand ones added to 2048 are nothing at all, unless added up first."""

import torch

from warpmap import DEVICE
from warpmap.kernels.data_movement.index_add import (
    index_add,
    index_add_,
    index_add_sorted_,
)

start = torch.full((3, 8), 2048.0, dtype=torch.float16, device=DEVICE)
ones = torch.ones(1000, 8, dtype=torch.float16, device=DEVICE)
index = torch.full((1000,), 1, device=DEVICE)

# above 2048 float16 knows even numbers only: each 2049 is rounded back
print(index_add_(start.clone(), index, ones)[:, 0].tolist())
# -> [2048.0, 2048.0, 2048.0]

# sorted, the rows are added up in float32 and rounded once
print(index_add_sorted_(start.clone(), index, ones)[:, 0].tolist())
# -> [2048.0, 3048.0, 2048.0]

# the gradient of adding to a row is reading that row
source = torch.zeros(3, 1, device=DEVICE, requires_grad=True)
weight = torch.tensor([[10.0], [20.0]], device=DEVICE)
index = torch.tensor([1, 0, 1], device=DEVICE)
(index_add(torch.zeros_like(weight), index, source) * weight).sum().backward()
print(source.grad.flatten().tolist())
# -> [20.0, 10.0, 20.0]
