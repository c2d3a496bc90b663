"""One column too many nearly halves the speed of a matrix product.

Its output is cut into tiles, a block each. An H200 has 132 SMs, and this
kernel fits once on each: what is left after 132 tiles takes a wave more.
"""

from warpmap.hardware.performance.occupancy_and_tail_effect import (
    gemm_tiles,
    launch,
)

print("columns  tiles  waves  last  efficiency")
# -> columns  tiles  waves  last  efficiency
for columns in (2816, 2817, 5632, 5633, 45056, 45057):
    tiles = gemm_tiles(1536, columns, tile_m=128, tile_n=256)
    run = launch(blocks=tiles, sms=132)
    print(
        f"{columns:7}{tiles:7}{run.waves:7}{run.last_wave_blocks:6}"
        f"{run.efficiency_percent:11.1f}%"
    )
# ->    2816    132      1   132      100.0%
# ->    2817    144      2    12       54.5%
# ->    5632    264      2   132      100.0%
# ->    5633    276      3    12       69.7%
# ->   45056   2112     16   132      100.0%
# ->   45057   2124     17    12       94.7%
