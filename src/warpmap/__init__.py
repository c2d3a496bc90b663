"""The code that Warpmap's pages teach: one module a topic.

Importing this package imports nothing else; ``DEVICE`` is looked up on use.
"""

from typing import Any

__version__ = "0.1.0"

DEVICE: str
"""``"cuda"`` where PyTorch sees a GPU, else ``"cpu"``."""


def __getattr__(name: str) -> Any:
    if name == "DEVICE":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
