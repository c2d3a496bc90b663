"""An odd address costs nothing, if both arrays have the same."""

import torch

from warpmap import DEVICE
from warpmap.kernels.building_blocks.vectorized_access import copy_, plan_copy

x = torch.arange(1000, dtype=torch.float16, device=DEVICE)
y = torch.zeros_like(x)

for x_from, y_from in [(0, 0), (1, 1), (9, 1), (4, 0), (1, 0)]:
    source, target = x[x_from:][:900], y[y_from:][:900]
    copy_(target, source)
    assert torch.equal(target, source)

    begins = source.data_ptr(), target.data_ptr()
    plan = plan_copy(*begins, source.nbytes)
    print(f"x[{x_from}:] to y[{y_from}:] in {plan.packs} packs of {plan.width}")
# -> x[0:] to y[0:] in 112 packs of 16
# -> x[1:] to y[1:] in 111 packs of 16
# -> x[9:] to y[1:] in 111 packs of 16
# -> x[4:] to y[0:] in 225 packs of 8
# -> x[1:] to y[0:] in 900 packs of 2
