"""Two ways around a slow column, and the count that ranks them.

What a warp pays to move 32 floats of a matrix, 4096 wide, to the transposed
one: sectors of memory, then cycles of the banks of shared memory.
"""

from warpmap.hardware.gpu.memory_coalescing import coalesce
from warpmap.kernels.building_blocks.shared_memory_and_bank_conflicts import (
    wavefronts,
)

row = [4 * t for t in range(32)]  # neighbours
far_column = [4 * 4096 * t for t in range(32)]  # of the matrix
near_column = [4 * 32 * t for t in range(32)]  # of a tile of 32 x 32
padded_column = [4 * 33 * t for t in range(32)]
swizzled_row = [4 * (t ^ 5) for t in range(32)]  # row 5
swizzled_column = [4 * (32 * t + (5 ^ t)) for t in range(32)]  # column 5

LADDER = {
    "naive": (far_column, None, None),
    "tiled": (row, row, near_column),
    "padded": (row, row, padded_column),
    "swizzled": (row, swizzled_row, swizzled_column),
}

print("          sectors  bank cycles")
# ->           sectors  bank cycles
for rung, (written, stored, loaded) in LADDER.items():
    sectors = len(coalesce(row, 4)) + len(coalesce(written, 4))
    cycles = sum(wavefronts(a, 4) for a in (stored, loaded) if a)
    print(f"{rung:10}{sectors:7}{cycles:13}")
# -> naive          36            0
# -> tiled           8           33
# -> padded          8            2
# -> swizzled        8            2
