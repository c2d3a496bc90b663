"""Clocks of what lanes of one warp do together, each step after the last.

One warp runs alone, so nothing hides how long a step takes. Every step needs
the result of the one before it.
"""

import torch

from warpmap.kernels.building_blocks.warp_primitives import gpu_kernel

STEPS = 4096
REPEATS = 5
CASES = {
    "shfl": ("shfl", "lane numbers"),
    "shfl_xor": ("shfl_xor", "lane numbers"),
    "ballot": ("ballot", "lane numbers"),
    "match_all": ("match_all", "zeros"),
    "match_any, one value": ("match_any", "zeros"),
    # each lane's answer is its own bit: 32 values, step after step
    "match_any, 32 values": ("match_any", "lane numbers"),
    "through shared memory": ("shared", "lane numbers"),
    "sum by 5 shuffles": ("sum_shuffles", "lane numbers"),
    "sum through shared memory": ("sum_shared", "lane numbers"),
    "sum by reduce_add": ("sum_redux", "lane numbers"),
}
INPUTS = {
    "zeros": torch.zeros(32, dtype=torch.int32),
    "lane numbers": torch.arange(32, dtype=torch.int32),
}


def rows() -> list[dict]:
    """Time every step; first see that the three sums are right.

    Returns:
        A row for each: clocks of the slowest lane, the least of five runs.

    Raises:
        RuntimeError: If there is no GPU, or a sum is wrong.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    clocks = torch.zeros(32, dtype=torch.int64, device="cuda")
    found = []
    for step, (kernel, values) in CASES.items():
        launch = gpu_kernel(f"clocks_{kernel}")
        if kernel.startswith("sum"):
            x = INPUTS[values].cuda()
            launch(1, 32, x, clocks, 1)
            if x.tolist() != [496] * 32:
                raise RuntimeError(f"{step}: {x.tolist()}, expected 496s")
        spent = []
        for _ in range(REPEATS):
            launch(1, 32, INPUTS[values].cuda(), clocks, STEPS)
            spent.append(clocks.max().item() / STEPS)
        found.append({"step": step, "clocks": round(min(spent), 1)})
    return found
