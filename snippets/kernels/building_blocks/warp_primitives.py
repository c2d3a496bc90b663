"""Twenty numbers and 32 lanes: naming the right lanes is not enough."""

from warpmap.kernels.building_blocks._warp import (
    FULL,
    WarpError,
    ballot,
    run_warp,
    shfl_xor,
)
from warpmap.kernels.building_blocks.warp_primitives import warp_sum

numbers = [*range(1, 21)] + [0] * 12  # their sum is 210


def only_lanes_with_a_number(lane, x):
    mask = yield ballot(FULL, lane < 20)
    if lane < 20:
        for step in (16, 8, 4, 2, 1):
            x += yield shfl_xor(mask, x, step)
    return x


def mask_too_wide(lane, x):
    if lane < 20:
        x += yield shfl_xor(FULL, x, 16)
    yield ballot(FULL, x)


print(run_warp(only_lanes_with_a_number, numbers)[0])
# -> nan
try:
    run_warp(mask_too_wide, numbers)
except WarpError as error:
    print(error)
# -> no lane can go on
# -> lanes 0-19 wait in shfl_xor(0xffffffff)
# -> lanes 20-31 wait in ballot(0xffffffff)
print(set(run_warp(warp_sum, numbers)))
# -> {210}
