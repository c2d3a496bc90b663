"""Finding a topic by its name, and running its snippet.

Only the standard library: a machine with a GPU has PyTorch and little else.
"""

import difflib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from warpmap_site.sources import AREAS, Files, topic_of

RANKS = 4  # processes of a snippet that needs several GPUs
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # what torchrun sets, with a banner


def find_root(start: Path) -> Path | None:
    """The clone that holds a folder, else the one this file belongs to.

    Args:
        start: Where to look, and in every folder above.

    Returns:
        The repository's root; None outside a clone.
    """
    for folder in (start, *start.parents, Path(__file__).parents[2]):
        if (folder / "mkdocs.yml").is_file() and (
            folder / "src/warpmap"
        ).is_dir():
            return folder
    return None


def topics(root: Path) -> list[str]:
    """Every topic that has a page, by path."""
    pages = [p for area in AREAS for p in (root / "docs" / area).glob("*/*.md")]
    paths = [topic_of(p.relative_to(root).as_posix()) for p in sorted(pages)]
    return [path for path in paths if path]


def find_topic(known: list[str], name: str) -> str:
    """The topic that a reader means.

    Args:
        known: Every topic.
        name: Its path, the last parts of it, or one of its files.

    Returns:
        Its path.

    Raises:
        LookupError: If none is meant, or several; the message offers some.

    Examples:
        >>> find_topic(["kernels/basics/softmax"], "softmax")
        'kernels/basics/softmax'
        >>> find_topic(["kernels/basics/softmax"], "sofmax")
        Traceback (most recent call last):
        LookupError: there is no topic 'sofmax'; near: kernels/basics/softmax
    """
    wanted = topic_of(name.removeprefix("./")) or name
    wanted = re.sub(r"[\s-]+", "_", wanted.strip().strip("/").lower())
    meant = [path for path in known if f"/{path}".endswith(f"/{wanted}")]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise LookupError(f"{name!r} may be {' or '.join(meant)}")
    names = [path.rpartition("/")[2] for path in known]
    asked = wanted.rpartition("/")[2]
    near = difflib.get_close_matches(asked, names, 3)
    near += [name for name in names if asked in name]
    offer = [p for p, name in zip(known, names, strict=True) if name in near]
    says = f"near: {', '.join(offer[:5])}" if offer else "see: warpmap list"
    raise LookupError(f"there is no topic {name!r}; {says}")


def ranks_of(root: Path, topic: str) -> int:
    """How many processes run a topic's snippet: 1, or one a GPU."""
    page = Files(root, topic).page.read_text("utf-8")
    front_matter = page.split("\n---")[0]
    return RANKS if "multi-gpu" in front_matter.partition("runs_on:")[2] else 1


def snippet_command(file: Path, ranks: int = 1) -> list[str]:
    """What runs a snippet with this Python: itself, or ``torchrun``."""
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(ranks)]
    return [sys.executable, *(torchrun if ranks > 1 else []), str(file)]


def environment(root: Path) -> dict[str, str]:
    """This process's environment, with the clone's package first."""
    path = [str(root / "src"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}


def run_ranks(code: str, ranks: int = RANKS) -> None:
    """Run code under ``torchrun``; the page asks its kernel for this.

    Args:
        code: A program, which finds its rank in the environment.
        ranks: How many processes run it.

    Raises:
        RuntimeError: If a process fails; what it wrote is printed before.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "cell.py")
        file.write_text(code, "utf-8")
        process = subprocess.Popen(
            snippet_command(file, ranks),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**ONE_THREAD, **os.environ},
        )
        with process:
            try:
                for line in process.stdout or ():
                    print(line, end="", flush=True)
            finally:
                process.terminate()  # torchrun ends its processes
    if process.returncode:
        raise RuntimeError(f"a process failed, exit code {process.returncode}")
