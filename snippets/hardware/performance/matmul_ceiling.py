"""A chip pays for bits that change, so what you multiply sets its speed."""

import torch

from warpmap.hardware.performance.matmul_ceiling import (
    Shape,
    matrix,
    row_alignment,
    summarize,
    toggled_bits,
    useful_share,
)

torch.manual_seed(0)
for inputs in ("zeros", "constant", "uniform", "normal"):
    x = matrix(inputs, 256, 4096, "bf16", device="cpu")
    print(f"{inputs:8} {toggled_bits(x):.0f} of 16 bits change")
# -> zeros    0 of 16 bits change
# -> constant 0 of 16 bits change
# -> uniform  5 of 16 bits change
# -> normal   6 of 16 bits change

for size in (4096, 4097):
    shape = Shape(size, size, size)
    share = useful_share(shape)
    print(f"{size}: {share:.0%} useful, {row_alignment(size, 2)} bytes a load")
# -> 4096: 97% useful, 16 bytes a load
# -> 4097: 78% useful, 2 bytes a load

# ten calls while the chip warms up, forty after, one disturbed
times = [0.002 - 0.0001 * n for n in range(10)] + 40 * [0.001]
times[30] = 0.02
mean, said = sum(times) / len(times), summarize(times)
print(f"mean {mean * 1e3:.2f} ms, median {said.median_s * 1e3:.2f} ms")
# -> mean 1.49 ms, median 1.00 ms
