"""Nearest upsampling, forward and backward, beside PyTorch's."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from warpmap.kernels.data_movement.upsample_nearest import (
    source_index,
    upsample_nearest,
    upsample_nearest_reference,
)
from warpmap_site.harness import Case, compiled, gradient

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {
    "first": torch.contiguous_format,
    "last": torch.channels_last,
}
# the first was measured on an A100 by others; the second fills no cache
SHAPES = {
    "16x32x80x80": (16, 32, 80, 80),
    "32x128x256x256": (32, 128, 256, 256),
    "8x128x256x256": (8, 128, 256, 256),
}
SCALES = {"2": 2.0, "3": 3.0, "1.5": 1.5}
OTHERS = "8x128x256x256"  # for scales other than 2


def random(dtype: str, layout: str, *shape: int) -> Tensor:
    """Normal numbers on the GPU."""
    x = torch.randn(shape, device="cuda", dtype=DTYPES[dtype])
    return x.contiguous(memory_format=LAYOUTS[layout])


def collect(dy: Tensor, size: tuple[int, int]) -> Tensor:
    """The gradient of images ``size``, each pixel a sum in float64."""
    dx = []
    for image in dy:  # one image at a time: float64 takes much memory
        part = image.double()
        for axis in (1, 2):
            index = source_index(size[axis - 1], part.shape[axis])
            shape = list(part.shape)
            shape[axis] = size[axis - 1]
            zeros = torch.zeros(shape, dtype=part.dtype, device=dy.device)
            part = zeros.index_add_(axis, index.to(dy.device), part)
        dx.append(part)
    return torch.stack(dx)


def cases() -> Iterator[Case]:
    """Twice at both shapes and layouts, then other scales."""
    for shape_name, shape in SHAPES.items():
        for scale_name, scale in SCALES.items():
            for layout in LAYOUTS:
                for dtype, kind in DTYPES.items():
                    if (scale != 2) != (shape_name == OTHERS):
                        continue
                    if dtype == "fp32" and (scale != 2 or layout == "last"):
                        continue
                    N, C, H, W = shape
                    size = int(H * scale), int(W * scale)
                    labels = {
                        "dtype": dtype,
                        "shape": shape_name,
                        "scale": scale_name,
                        "layout": layout,
                    }
                    pixels = H * W + size[0] * size[1]

                    def ours(x: Tensor, size: tuple[int, int] = size) -> Tensor:
                        return upsample_nearest(x, size)

                    def torchs(
                        x: Tensor, size: tuple[int, int] = size
                    ) -> Tensor:
                        return F.interpolate(x, size=size, mode="nearest")

                    yield Case(
                        labels={"pass": "forward", **labels},
                        inputs=lambda d=dtype, o=layout, s=shape: (
                            random(d, o, *s),
                        ),
                        ours=ours,
                        peers={
                            "torch": torchs,
                            "torch.compile": compiled(torchs),
                        },
                        # only moved: exact in its own dtype
                        exact=lambda x, size=size: upsample_nearest_reference(
                            x, size
                        ).double(),
                        moved=N * C * pixels * kind.itemsize,
                        rounding=0,
                    )
                    yield Case(
                        labels={"pass": "backward", **labels},
                        inputs=lambda d=dtype, o=layout, s=shape, z=size: (
                            random(d, o, *s),
                            random(d, o, *s[:2], *z),
                        ),
                        ours=gradient(ours),
                        peers={
                            "torch": gradient(torchs),
                            "torch.compile": gradient(compiled(torchs)),
                        },
                        exact=lambda x, dy: (
                            collect(dy, (x.shape[2], x.shape[3])),
                        ),
                        moved=N * C * pixels * kind.itemsize,
                    )
