"""The same numbers, and the same row, have many sums."""

import random

from warpmap.kernels.building_blocks.deterministic_reduction import (
    float32,
    kahan_sum,
    sequential_sum,
    split_sum,
    splits_for,
)

rng = random.Random(0)
row = [float32(rng.gauss(0, 1)) for _ in range(1000)]

# whoever arrives first is added first: shuffle the arrivals
sums, carried = set(), set()
for _ in range(200):
    arrival = rng.sample(row, len(row))
    sums.add(sequential_sum(arrival))
    carried.add(kahan_sum(arrival))
print(len(sums) > 20, len(carried) < 10)
# -> True True

# nothing is random here, and yet the row's sum depends on its neighbours:
# splits that fill the GPU, then the same 8 for every batch
for choose in (splits_for, lambda rows: 8):
    found = {split_sum(row, choose(rows)) for rows in (1, 2, 4, 8, 16, 32)}
    print(len(found), "from", min(found), "to", max(found))
# -> 4 from 17.84947967529297 to 17.849491119384766
# -> 1 from 17.84947967529297 to 17.84947967529297
