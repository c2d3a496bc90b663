"""Elementwise products and SiLU beside PyTorch's and the rungs in CUDA C++."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from warpmap.kernels.data_movement.elementwise import (
    RUNGS,
    multiply,
    multiply_cuda,
    silu,
    silu_cuda,
)
from warpmap_site.harness import Case, compiled, gradient

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
LARGE = 2**28  # elements
LENGTHS = {
    "2^20": 2**20,
    "2^24": 2**24,
    "2^28": LARGE,
    "2^28 + 1": LARGE + 1,
}


def random(dtype: str, *shape: int) -> Tensor:
    """Normal numbers on the GPU."""
    return torch.randn(shape, device="cuda", dtype=DTYPES[dtype])


def product(x: Tensor, y: Tensor) -> Tensor:
    """For the compiler."""
    return x * y


def double_product(x: Tensor, y: Tensor) -> Tensor:
    """In float64."""
    return x.double() * y.double()


def products() -> Iterator[Case]:
    """Two arrays of one shape, up the ladder."""
    rungs = {
        f"CUDA {rung.replace('_', '-')}": (
            lambda a, b, r=rung: multiply_cuda(a, b, r)
        )
        for rung in reversed(RUNGS)
    }
    for dtype, kind in DTYPES.items():
        for name, n in LENGTHS.items():
            if dtype == "bf16" and n != LARGE:  # as wide as fp16
                continue
            yield Case(
                labels={"op": "multiply", "dtype": dtype, "elements": name},
                inputs=lambda d=dtype, n=n: (random(d, n), random(d, n)),
                ours=multiply,
                peers={
                    "torch": torch.mul,
                    "torch.compile": compiled(product),
                    **rungs,
                },
                exact=double_product,
                moved=3 * n * kind.itemsize,
            )


def broadcasts() -> Iterator[Case]:
    """A matrix times a row, or a column."""
    for N in (64, 4096):
        M = LARGE // N
        for name, shape in {"row": (N,), "column": (M, 1)}.items():
            peers = {"torch": torch.mul, "torch.compile": compiled(product)}
            if name == "row":
                peers["CUDA packed"] = multiply_cuda
            yield Case(
                labels={"op": name, "dtype": "bf16", "M": M, "N": N},
                inputs=lambda M=M, N=N, shape=shape: (
                    random("bf16", M, N),
                    random("bf16", *shape),
                ),
                ours=multiply,
                peers=peers,
                exact=double_product,
                moved=2 * (2 * M * N + shape[0]),
            )


def unary() -> Iterator[Case]:
    """SiLU and its gradient."""
    for dtype in ("fp32", "bf16"):
        kind = DTYPES[dtype]
        yield Case(
            labels={"op": "silu", "dtype": dtype, "elements": "2^28"},
            inputs=lambda d=dtype: (random(d, LARGE),),
            ours=silu,
            peers={
                "torch": F.silu,
                "torch.compile": compiled(F.silu),
                "CUDA packed": silu_cuda,
            },
            exact=lambda x: F.silu(x.double()),
            moved=2 * LARGE * kind.itemsize,
        )
        yield Case(
            labels={"op": "silu_backward", "dtype": dtype, "elements": "2^28"},
            inputs=lambda d=dtype: (random(d, LARGE), random(d, LARGE)),
            ours=gradient(silu),
            peers={
                "torch": gradient(F.silu),
                "torch.compile": gradient(compiled(F.silu)),
            },
            exact=lambda x, dy: torch.ops.aten.silu_backward(
                dy.double(), x.double()
            ),
            moved=3 * LARGE * kind.itemsize,
        )


def cases() -> Iterator[Case]:
    """The ladder, then broadcasting, then one operand."""
    yield from products()
    yield from broadcasts()
    yield from unary()
