"""Ten thousand cents make 32 in half precision; their neighbour stays -0."""

import torch

from warpmap import DEVICE
from warpmap.kernels.building_blocks.fast_atomic_add import add_at, dot

n = 10_000
cents = torch.full((n,), 0.01, dtype=torch.float16, device=DEVICE)
first = torch.zeros(n, dtype=torch.int64, device=DEVICE)

# every addition is packed with one to the neighbour
out = torch.tensor([0.0, -0.0], dtype=torch.float16, device=DEVICE)
print(add_at(out, first, cents).tolist())
# -> [32.0, -0.0]

# what it was packed with is not zero: that would change the neighbour
print((out[1] + 0.0).item(), (out[1] + -0.0).item())
# -> 0.0 -0.0

# from 32 on, a cent is less than half of the gap to the next number
print([32 + step * 2**-5 for step in range(3)])
# -> [32.0, 32.03125, 32.0625]
print((out[0] + cents[0]).item())
# -> 32.0

# the same cents added up in float32, in registers, before they are stored
print(round(dot(cents, torch.ones_like(cents)).item(), 2))
# -> 100.02
