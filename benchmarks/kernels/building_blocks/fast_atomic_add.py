"""The ladder of a dot product in float16, and additions that meet.

The first three rungs keep the sum in float16, where it stops growing: their
times are honest, and the record calls their results wrong. The additions that
meet are of 1 and -1, as many of either, so that every sum is exact.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from warpmap.kernels.building_blocks.fast_atomic_add import (
    RUNGS,
    add_at,
    add_at_by,
    dot,
    dot_by,
)
from warpmap_site.harness import Case, Prepared, compiled

HALF = torch.float16
VALUES = 2**16  # so few, since those that meet take microseconds each


def vectors(n: int) -> tuple[Tensor, Tensor]:
    """Positive numbers whose dot product float16 can hold: about n / 2**14."""
    x, y = (torch.rand(n, device="cuda") / 64 for _ in "xy")
    return x.to(HALF), y.to(HALF)


def meeting(addresses: int) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros, where to add, and as many 1 as -1 to be added."""
    value = torch.ones(VALUES, device="cuda", dtype=HALF)
    value[::2] = -1
    order = torch.randperm(VALUES, device="cuda")
    index = torch.randint(addresses, (VALUES,), device="cuda")
    return (
        torch.zeros(addresses, device="cuda", dtype=HALF),
        index,
        value[order],
    )


def exact_dot(x: Tensor, y: Tensor) -> Tensor:
    """In float64, a piece at a time."""
    pieces = zip(x.split(2**26), y.split(2**26), strict=True)
    return torch.stack([a.double() @ b.double() for a, b in pieces]).sum()


def in_float(way) -> Prepared:
    """The same additions, to float32 numbers; the casts are not timed."""
    return Prepared(
        lambda out, index, value: (out.float(), index, value.float()), way
    )


def cases() -> Iterator[Case]:
    """The ladder by length, then the additions by how many numbers they hit."""
    for n in (2**24, 2**26, 2**28):
        yield Case(
            labels={"op": "dot", "dtype": "fp16", "n": n},
            inputs=lambda n=n: vectors(n),
            ours=dot,
            peers={
                "torch": torch.dot,
                "torch.compile": compiled(
                    lambda x, y: (x.float() * y.float()).sum()
                ),
                **{
                    f"CUDA {rung}": lambda x, y, rung=rung: dot_by(rung, x, y)
                    for rung in RUNGS
                },
            },
            exact=exact_dot,
            moved=4 * n,
            ceiling="read",
            # n terms of one sign, and as many roundings as there are programs
            rounding=256,
        )
    for addresses in (1, 2, 32, 1024, 2**15, 2**20):
        yield Case(
            labels={"op": "add", "dtype": "fp16", "addresses": addresses},
            inputs=lambda addresses=addresses: meeting(addresses),
            ours=add_at,
            peers={
                "torch": lambda out, index, value: out.index_add_(
                    0, index, value
                ),
                "CUDA half": lambda *given: add_at_by("half", *given),
                "CUDA padded": lambda *given: add_at_by("padded", *given),
                "CUDA float": in_float(
                    lambda *given: add_at_by("float", *given)
                ),
            },
            exact=lambda out, index, value: out.double().index_add(
                0, index, value.double()
            ),
            moved=10 * VALUES + 4 * addresses,
        )
