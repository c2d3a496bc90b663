"""One line more than fits, and a loop that always hit never hits again.

The least recently used line is the one that a loop wants next. With few ways,
lines that lie badly drop each other long before the cache is full.
"""

from warpmap.hardware.gpu.memory_hierarchy import LINE_BYTES, Cache, chase


def show(lines, ways, stride=1):
    cache = Cache(64 * LINE_BYTES, ways)
    addresses = [n * stride * LINE_BYTES for n in range(lines)]
    hits, _ = chase([cache], addresses)
    print(f"{lines:2} lines, {stride:2} apart: {hits:2} of {lines:2} hit")


print("room for 64 lines, anywhere")
show(lines=64, ways=64)
show(lines=65, ways=64)
# -> room for 64 lines, anywhere
# -> 64 lines,  1 apart: 64 of 64 hit
# -> 65 lines,  1 apart:  0 of 65 hit

print("room for 64 lines, in 16 sets of 4")
show(lines=65, ways=4)
show(lines=8, ways=4)
show(lines=8, ways=4, stride=16)
# -> room for 64 lines, in 16 sets of 4
# -> 65 lines,  1 apart: 60 of 65 hit
# ->  8 lines,  1 apart:  8 of  8 hit
# ->  8 lines, 16 apart:  0 of  8 hit
