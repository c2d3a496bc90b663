"""Adding rows to rows, atomically and sorted, beside PyTorch's.

First the large shape in each dtype, each way on its own. Then where the two
ways cross: by the number of rows, and by how many share a destination.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from warpmap.kernels.data_movement.index_add import (
    index_add_,
    index_add_sorted_,
)
from warpmap_site.harness import Case

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
C = 256
ROWS = 2**20
WAYS = {"atomic": index_add_, "sorted": index_add_sorted_}


def inputs(dtype: str, M: int, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Out, an index without order, and the source."""
    made = {"device": "cuda", "dtype": DTYPES[dtype]}
    index = torch.randint(N, (M,), device="cuda")
    return torch.randn(N, C, **made), index, torch.randn(M, C, **made)


def case(dtype: str, M: int, share: int, way: str, sweep: str) -> Case:
    """One comparison; ``share`` rows have the same destination, on average."""
    N = M // share
    peers = {
        "torch": lambda out, index, source: out.index_add_(0, index, source),
        # sorts, and is equal bit for bit from run to run
        "torch index_put_": lambda out, index, source: out.index_put_(
            (index,), source, accumulate=True
        ),
    }
    if sweep != "dtype":
        peers["sorted"] = index_add_sorted_
    return Case(
        labels={
            "sweep": sweep,
            "way": way,
            "dtype": dtype,
            "rows": M,
            "per_row": share,
        },
        inputs=lambda: inputs(dtype, M, N),
        ours=WAYS[way],
        peers=peers,
        exact=lambda out, index, source: out.double().index_add_(
            0, index, source.double()
        ),
        # source and index once, out once in and once out
        moved=M * (C * DTYPES[dtype].itemsize + 8)
        + 2 * N * C * DTYPES[dtype].itemsize,
    )


def cases() -> Iterator[Case]:
    """Both ways in every dtype, then rows and sharing, in bfloat16."""
    for way in WAYS:
        for dtype in DTYPES:
            yield case(dtype, ROWS, 8, way, "dtype")
    for M in (2**10, 2**13, 2**16, 2**18, 2**20):
        yield case("bf16", M, 8, "atomic", "rows")
    for share in (1, 8, 64, 512, 4096):
        yield case("bf16", ROWS, share, "atomic", "per_row")
