"""Copies by the width of their packs, by size, and by address.

The copy in packs of 16 bytes is ours; narrower ones, from the same source,
are its peers, beside PyTorch's. A thread has one pack in all of them.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from warpmap.kernels.building_blocks.vectorized_access import copy_, copy_cuda_
from warpmap_site.harness import Case

LANGUAGES = {"CUDA": copy_cuda_, "Triton": copy_}
SIZES = (4, 64, 1024)  # MiB
SHIFTS = ((0, 0), (1, 1), (8, 0), (4, 0), (2, 0), (1, 0))  # bytes, of x and y


def _case(
    labels: dict[str, str | int],
    mib: int,
    ours: Callable[..., Tensor],
    peers: dict[str, Callable[..., Tensor]],
    x_offset: int = 0,
    y_offset: int = 0,
) -> Case:
    n = mib * 2**20

    def inputs() -> tuple[Tensor, Tensor]:
        x = torch.randint(256, (n + 16,), device="cuda", dtype=torch.uint8)
        return x, torch.empty_like(x)

    # whole arrays come in: where a piece begins is a matter of its address
    def on_pieces(copy: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, y: copy(y[y_offset:][:n], x[x_offset:][:n])

    return Case(
        labels=labels,
        inputs=inputs,
        ours=on_pieces(ours),
        peers={
            "torch": on_pieces(torch.Tensor.copy_),
            **{name: on_pieces(peer) for name, peer in peers.items()},
        },
        exact=lambda x, y: x[x_offset:][:n],
        moved=2 * n,
    )


def cases() -> Iterator[Case]:
    """Every size and language, by width; then every pair of addresses."""
    for language, copy in LANGUAGES.items():
        for mib in SIZES:
            yield _case(
                {"by": "size", "language": language, "MiB": mib},
                mib,
                copy,
                {
                    f"{8 * width}-bit": lambda y, x, f=copy, w=width: f(y, x, w)
                    for width in (8, 4, 2, 1)
                },
            )
    for x_offset, y_offset in SHIFTS:
        yield _case(
            {"by": "address", "shift": f"{x_offset} and {y_offset}"},
            1024,
            copy_,
            {"CUDA": copy_cuda_},
            x_offset,
            y_offset,
        )
