"""One tensor, four equal elements, and the ring gives three different sums.

Each rank fills a tensor with one number. Chunk ``c`` of the ring is summed
in the order ``c + 1, c + 2, ...``, and float32 addition cares about order:
2**24 + 1 is 2**24. The tree adds all elements in the same order.

    torchrun --standalone --nproc-per-node 4 THIS_FILE
"""

import torch
import torch.distributed as dist

from warpmap.training._process_group import process_group
from warpmap.training.sharding.collective_operations import (
    ring_all_reduce,
    tree_all_reduce,
)

numbers = [2.0**24, 1.0, -(2.0**24), 1.0]

with process_group() as device:
    rank = dist.get_rank()
    mine = torch.full((4,), numbers[rank], device=device)
    ring, tree = ring_all_reduce(mine), tree_all_reduce(mine)

    of_rank_3 = ring.clone()
    dist.broadcast(of_rank_3, src=3)

    if rank == 0:
        print("exact", sum(numbers))  # Python sums in float64
        # -> exact 2.0
        print("ring ", ring.tolist())
        # -> ring  [2.0, 2.0, 0.0, 1.0]
        print("tree ", tree.tolist())
        # -> tree  [1.0, 1.0, 1.0, 1.0]
        print("rank 3 got the same ring:", torch.equal(ring, of_rank_3))
        # -> rank 3 got the same ring: True
