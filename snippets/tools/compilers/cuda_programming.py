"""Each launch touches every element once. Not all of them cost the same."""

from warpmap.hardware.gpu.memory_coalescing import coalesce
from warpmap.tools.compilers.cuda_programming import (
    WARP,
    axpy_once,
    launch,
    touch,
)

SIZE = 32  # rows and columns of a matrix of floats

for block in ((32, 4), (8, 16), (4, 32), (1, 128)):
    owner, visits, steps = [0] * SIZE**2, [0] * SIZE**2, []
    launch(
        touch,
        (2, 2),
        block,
        *(owner, visits, SIZE, SIZE),
        record=lambda block, touched, steps=steps: steps.append(touched),
    )
    warp = [*steps[0].values()][:WARP]  # what the first 32 threads touch
    sectors = coalesce([4 * element for element in warp], element_bytes=4)
    print(f"{block}: visits {set(visits)}, {len(sectors)} sectors")
# -> (32, 4): visits {1}, 4 sectors
# -> (8, 16): visits {1}, 4 sectors
# -> (4, 32): visits {1}, 8 sectors
# -> (1, 128): visits {1}, 32 sectors

y = [0.0] * 1000
launch(axpy_once, 1000 // 256, 256, 1.0, [1.0] * 1000, y, 1000)
print(sum(y))
# -> 768.0
