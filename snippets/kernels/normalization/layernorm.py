"""Two numbers that lie 3 apart have the variance 2.25, wherever they are."""

import torch

from warpmap import DEVICE
from warpmap.kernels.normalization.layernorm import (
    layernorm,
    naive_variance,
    welford_variance,
)

weight, bias = torch.ones(2, device=DEVICE), torch.zeros(2, device=DEVICE)

for mean in (10, 6_001, 12_345, 200_001):
    x = torch.tensor([[mean - 1.5, mean + 1.5]], device=DEVICE)
    print(mean, naive_variance(x).item(), welford_variance(x).item())
    y = layernorm(x, weight, bias)
    print([round(v, 3) for v in y[0].tolist()])
# -> 10 2.25 2.25
# -> [-1.0, 1.0]
# -> 6001 4.0 2.25
# -> [-1.0, 1.0]
# -> 12345 16.0 2.25
# -> [-1.0, 1.0]
# -> 200001 -4096.0 2.25
# -> [-1.0, 1.0]
