"""Adding one after another loses what a tree keeps."""

import torch

from warpmap import DEVICE
from warpmap.kernels.data_movement.reduce import total

ones = torch.ones(5000, dtype=torch.float16, device=DEVICE)

running = torch.zeros_like(ones[0])
for one in ones[:3000]:
    running = running + one
print(running.item())  # 2048 + 1 rounds to 2048 in float16
# -> 2048.0
print(total(ones).item())
# -> 5000.0

# the largest float16, and as often its negative but for one
largest = torch.finfo(torch.float16).max
x = torch.full((4001,), largest, dtype=torch.float16, device=DEVICE)
x[2001:] = -largest

print((x[0] + x[1]).item(), total(x).item())
# -> inf 65504.0

x.requires_grad_()
total(x).backward()
print(x.grad.unique().tolist())
# -> [1.0]
