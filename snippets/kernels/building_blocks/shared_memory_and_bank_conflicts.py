"""Of all steps through shared memory, the round ones are the slow ones.

32 threads read floats that lie so many floats apart, at 128 bytes a cycle if
every bank has one word to give.
"""

from warpmap.kernels.building_blocks.shared_memory_and_bank_conflicts import (
    swizzle,
    wavefronts,
)

print("floats apart  cycles")
# -> floats apart  cycles
for stride in (1, 2, 3, 8, 31, 32, 33):
    floats = [4 * stride * thread for thread in range(32)]
    print(f"{stride:12}{wavefronts(floats, access_bytes=4):8}")
# ->            1       1
# ->            2       2
# ->            3       1
# ->            8       8
# ->           31       1
# ->           32      32
# ->           33       1

column = [128 * row for row in range(32)]
moved = [swizzle(address, bits=5, base=2, shift=5) for address in column]
print("swizzled", wavefronts(moved, access_bytes=4), moved[:4])
# -> swizzled 1 [0, 132, 264, 396]
