"""A sum of arrays and a product of matrices in Triton, beside PyTorch's."""

from collections.abc import Iterator

import torch

from warpmap.tools.compilers.triton_language import add, matmul, row_max
from warpmap_site.harness import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def cases() -> Iterator[Case]:
    """Sums and row maxima by size; products of square matrices in fp16."""
    for dtype, kind in DTYPES.items():
        for power in (16, 20, 24, 28):
            n = 2**power
            yield Case(
                labels={"op": "add", "dtype": dtype, "elements": n},
                inputs=lambda n=n, kind=kind: tuple(
                    torch.randn(n, device="cuda", dtype=kind) for _ in "xy"
                ),
                ours=add,
                peers={"torch": torch.add},
                exact=lambda x, y: x.double() + y.double(),
                moved=3 * n * kind.itemsize,
            )
    for N in (64, 1024, 4096, 32768):
        M = 2**28 // N
        yield Case(
            labels={"op": "row_max", "dtype": "bf16", "N": N},
            inputs=lambda M=M, N=N: (
                torch.randn(M, N, device="cuda", dtype=torch.bfloat16),
            ),
            ours=row_max,
            peers={"torch": lambda x: x.amax(dim=1)},
            exact=lambda x: x.amax(dim=1).double(),
            moved=(M * N + M) * 2,
            ceiling="read",
        )
    for N in (1024, 2048, 4096, 8192):
        yield Case(
            labels={"op": "matmul", "dtype": "fp16", "N": N},
            inputs=lambda N=N: tuple(
                torch.randn(N, N, device="cuda", dtype=torch.float16)
                for _ in "ab"
            ),
            ours=matmul,
            peers={"torch": torch.matmul},
            exact=lambda a, b: a.double() @ b.double(),
            moved=3 * N * N * 2,
            flops=2 * N**3,
            ceiling="matmul",
        )
