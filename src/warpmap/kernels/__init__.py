"""GPU kernels.

Modules take Triton from here, ``from warpmap.kernels import tl, triton``, for
two reasons: without a GPU Triton must be told to interpret kernels before its
first import, and where Triton does not exist the error says what to do.
"""

import os
import sys
from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("tl", "triton"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    import torch

    if not torch.cuda.is_available() and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        import triton
        import triton.language as tl
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Triton kernels need Linux, or WSL2 on Windows: "
            "pip install 'warpmap[gpu]' there",
            name=error.name,
        ) from None
    return triton if name == "triton" else tl
