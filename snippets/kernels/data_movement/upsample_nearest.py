"""The gradient of ones counts how often each pixel was taken."""

import torch

from warpmap import DEVICE
from warpmap.kernels.data_movement.upsample_nearest import upsample_nearest


def counts(width, new_width):
    row = torch.zeros(1, 1, 1, width, device=DEVICE, requires_grad=True)
    upsample_nearest(row, (1, new_width)).sum().backward()
    return [int(count) for count in row.grad.flatten()]


# twice
print(counts(4, 8))
# -> [2, 2, 2, 2]

# one and a half times
print(counts(4, 6))
# -> [2, 1, 2, 1]

# 41 times: in float32, 41 times the nearest number to 1 / 41 is less than 1
print(counts(4, 164))
# -> [42, 41, 40, 41]
