"""Where Triton does not exist, what imports its kernels is left out."""

import importlib.util
import re

WITHOUT_TRITON = importlib.util.find_spec("triton") is None


def pytest_ignore_collect(collection_path):
    """True for such a file; None leaves the choice to pytest."""
    if not WITHOUT_TRITON or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text(encoding="utf-8")
    kernels = re.search(r"^from warpmap\.kernels\b", text, re.MULTILINE)
    return True if kernels else None
