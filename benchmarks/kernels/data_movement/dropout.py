"""Dropout without a mask in memory, beside PyTorch's with one."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from warpmap.kernels.data_movement._philox import philox4x32
from warpmap.kernels.data_movement.dropout import dropout, threshold
from warpmap_site.harness import Case, compiled, gradient

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LENGTHS = {"2^20": 2**20, "2^24": 2**24, "2^28": 2**28}
P = 0.1


def exact(x: Tensor, seed: Tensor) -> Tensor:
    """In float64, drawn by PyTorch's integers on the GPU."""
    counter = torch.arange(x.numel() // 8, device=x.device)
    zero = torch.zeros_like(counter)
    words = philox4x32(
        (counter, zero, zero, zero), (seed & 0xFFFFFFFF, seed >> 32)
    )
    halves = [half for w in words for half in (w & 0xFFFF, w >> 16)]
    keep = torch.stack([half >= threshold(P) for half in halves], dim=1)
    return x.double() * keep.flatten() * (2**16 / (2**16 - threshold(P)))


def ours(x: Tensor, seed: Tensor) -> Tensor:
    """Draws again in its gradient."""
    return dropout(x, P, seed)


def torchs(x: Tensor, seed: Tensor) -> Tensor:
    """Draws from PyTorch's generator, and keeps a mask."""
    return F.dropout(x, P)


def cases() -> Iterator[Case]:
    """Forward and backward at three lengths."""
    for dtype, kind in DTYPES.items():
        for name, n in LENGTHS.items():

            def random(n: int = n, kind: torch.dtype = kind) -> Tensor:
                return torch.randn(n, device="cuda", dtype=kind)

            def seed() -> Tensor:
                return torch.randint(2**63 - 1, (1,), device="cuda")

            labels = {"dtype": dtype, "elements": name}
            yield Case(
                labels={"pass": "forward", **labels},
                inputs=lambda random=random: (random(), seed()),
                ours=ours,
                peers={"torch": torchs, "torch.compile": compiled(torchs)},
                exact=exact,
                moved=2 * n * kind.itemsize,
                same=False,
                memory=True,
            )
            yield Case(
                labels={"pass": "backward", **labels},
                inputs=lambda random=random: (random(), seed(), random()),
                ours=gradient(ours),
                peers={
                    "torch": gradient(torchs),
                    "torch.compile": gradient(compiled(torchs)),
                },
                exact=lambda x, seed, dy: (exact(dy, seed),),
                moved=2 * n * kind.itemsize,
                same=False,
            )
