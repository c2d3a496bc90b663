"""Two small decoders that come with the package, for pages that need a model.

    target  7 million weights, 8 layers: what most pages read and write with
    draft   1 million, 3 layers, the same tokens: guesses what target will say

They have read Python's standard library and nothing else, and were trained
with this package alone: ``warpmap train house-model``. The files are those of
a Hugging Face Llama. Nothing is read from them before a model is asked for.

Reference: Touvron et al., 2023, https://arxiv.org/abs/2302.13971
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from warpmap.models.foundations.tokenization import BytePairTokenizer

if TYPE_CHECKING:
    from warpmap.models.foundations.decoder_only import Decoder

NAMES = ("target", "draft")
FOLDER = Path(__file__).with_name("house")
"""Weights, tokens, their SHA-256, and what was read."""


def house_model(name: str = "target") -> "Decoder":
    """A trained model, in bf16 as it was trained, on the CPU.

    On most CPUs ``house_model().float()`` is quicker. Each call reads the
    files again, so the caller may change what it gets.

    Args:
        name: ``"target"`` or ``"draft"``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If there is no such model, or one of its files is not the
            one that was shipped.

    Examples:
        >>> sum(weight.numel() for weight in house_model("draft").parameters())
        1078144
    """
    if name not in NAMES:
        raise ValueError(f"name must be one of {NAMES}, got {name!r}")
    # here, since the tokenizer needs no torch
    from warpmap.models.foundations._llama import load_llama

    for file in ("config.json", "model.safetensors"):
        _check(f"{name}/{file}")
    return load_llama(FOLDER / name).eval()


def house_tokenizer() -> BytePairTokenizer:
    """The tokens of both models; pure Python.

    A text starts with ``end_of_text``: so did every file in training.

    Raises:
        ValueError: If its file is not the one that was shipped.

    Examples:
        >>> tokenizer = house_tokenizer()
        >>> [tokenizer.decode([i]) for i in tokenizer.encode("def __init__(")]
        ['def', ' __', 'init', '__(']
    """
    return BytePairTokenizer.load(_check("tokenizer.json"))


def _check(name: str) -> Path:
    """The file of this name, if its bytes are those that were shipped."""
    listed = json.loads((FOLDER / "sha256.json").read_text(encoding="utf-8"))
    found = hashlib.sha256((FOLDER / name).read_bytes()).hexdigest()
    if found != listed[name]:
        raise ValueError(
            f"{FOLDER / name} was changed: its SHA-256 is {found}, not "
            f"{listed[name]}; install warpmap again"
        )
    return FOLDER / name
