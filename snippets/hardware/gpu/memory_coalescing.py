"""Shuffling the threads is free; moving them by one element is not.

What counts is which sectors of 32 bytes a warp touches, not who touches them.
"""

from warpmap.hardware.gpu.memory_coalescing import warp_request

ACCESSES = {
    "in order": {"stride": 1},
    "in random order": {"stride": 1, "shuffled": True},
    "shifted by one": {"stride": 1, "offset": 1},
    "every second": {"stride": 2},
    "every eighth": {"stride": 8},
    "a column of 4096": {"stride": 4096},
}

print("32 floats         sectors  useful")
# -> 32 floats         sectors  useful
for name, access in ACCESSES.items():
    request = warp_request(element_bytes=4, **access)
    print(f"{name:18}{request.sectors:7}{request.efficiency_percent:7.1f}%")
# -> in order                4  100.0%
# -> in random order         4  100.0%
# -> shifted by one          5   80.0%
# -> every second            8   50.0%
# -> every eighth           32   12.5%
# -> a column of 4096       32   12.5%
