"""The Python standard library as a corpus: what the house models read."""

import hashlib
import platform
import sysconfig
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from warpmap.training.pretraining.data_pipeline import clean, held_out

HELD_OUT = 0.05
"""Part of the files that no model is trained on."""


@dataclass(frozen=True)
class Corpus:
    """Files of Python, cleaned and divided.

    Attributes:
        name: Such as "CPython 3.11.7", or that of the folder.
        hashes: SHA-256 of the text of each file read, by path.
        funnel: Characters by what the cleaning did with them.
        training: Texts to train on, by path in the library.
        held_out: Texts to measure on.
    """

    name: str
    hashes: Mapping[str, str]
    funnel: Mapping[str, int]
    training: Mapping[str, str]
    held_out: Mapping[str, str]


def library() -> Path:
    """Where the running Python keeps its standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def read_sources(folder: Path) -> dict[str, str]:
    """Every Python file below a folder that Python itself could read.

    Packages that were installed beside the library are left out, and tests
    of the parser that are no Python on purpose.

    Args:
        folder: Such as the standard library.

    Returns:
        The text of each file, by its path in the folder; in their order.

    Raises:
        ValueError: If there is no Python file.

    Examples:
        >>> "decoder.py" in read_sources(library() / "json")
        True
    """
    texts = {}
    for file in sorted(folder.rglob("*.py")):
        name = file.relative_to(folder).as_posix()
        if "site-packages" in file.parts or "dist-packages" in file.parts:
            continue
        try:
            with tokenize.open(file) as source:
                texts[name] = source.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # a test's bad example: no text
    if not texts:
        raise ValueError(f"{folder} holds no Python files")
    return texts


def corpus(folder: Path | None = None, one_in: int = 1) -> Corpus:
    """Read, clean and divide a library; 20 seconds for all of Python's.

    Args:
        folder: Where the files lie; by default the running Python's library.
        one_in: Read one file in so many, for a trial.

    Raises:
        ValueError: If there is no Python file, or too few to divide.

    Examples:
        >>> found = corpus(library() / "asyncio")
        >>> list(found.held_out)
        ['format_helpers.py', 'proactor_events.py']
    """
    python = f"{platform.python_implementation()} {platform.python_version()}"
    name = python if folder is None else folder.name
    folder = folder or library()
    texts = dict(list(read_sources(folder).items())[::one_in])
    kept, funnel = clean(texts)
    held = {n: t for n, t in kept.items() if held_out(n, HELD_OUT)}
    training = {n: t for n, t in kept.items() if n not in held}
    if not held or not training:
        raise ValueError(
            f"{folder} has {len(kept)} usable files: too few to hold some out"
        )
    hashes = {n: _sha256(text) for n, text in texts.items()}
    return Corpus(name, hashes, funnel, training, held)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
