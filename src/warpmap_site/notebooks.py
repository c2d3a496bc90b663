"""Snippets as notebooks, with the output that the tests compare."""

import ast
import re
from pathlib import Path
from typing import Any

import jupytext
from nbformat.notebooknode import from_dict

from warpmap_site.atlas import Topic
from warpmap_site.sources import Files, split_snippet

KERNEL = {
    "kernelspec": {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    },
    "language_info": {"name": "python"},
}
BY_HAND = "It needs the package: `pip install .` in a clone of the repository."
TORCHRUN = "!torchrun --standalone --nproc-per-node 4"


def notebook(root: Path, topic: Topic, source_url: str = "") -> str:
    """A topic's snippet as a Jupyter notebook.

    The docstring becomes text; a cell ends where an output is promised, and
    shows it. The same snippet gives the same bytes.

    Args:
        root: The repository.
        topic: A topic with a snippet.
        source_url: Where its files can be read on the web, or "".

    Returns:
        The notebook's JSON.
    """
    snippet = Files(root, topic.path).snippet
    docstring, parts = split_cells(snippet.read_text("utf-8"))
    docstring = re.sub(r"(?<=\w)\*\*(?=\w)", r"\*\*", docstring)  # a power
    if "multi-gpu" in topic.meta.runs_on:
        parts = ["".join(parts)]
    install = install_command(source_url)
    text = [f"# {topic.title}", docstring, *([] if install else [BY_HAND])]
    made = jupytext.reads(
        "# %% [markdown]\n"
        + re.sub("^", "# ", "\n\n".join(text), flags=re.MULTILINE)
        + "".join(f"\n# %%\n{split_snippet(part)[0]}" for part in parts),
        fmt="py:percent",
    )
    for cell, part in zip(made.cells[1:], parts, strict=True):
        if output := split_snippet(part)[1]:
            cell.outputs = [_printed(output)]
    if "multi-gpu" in topic.meta.runs_on:  # a program for several processes
        program = made.cells[1]
        torchrun = _code(f"{TORCHRUN} {snippet.name}", program.outputs)
        program.outputs = []
        program.source = f"%%writefile {snippet.name}\n{program.source}"
        made.cells.append(torchrun)
    if install:
        made.cells.insert(1, _code(install, []))
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # else it is drawn at random
        cell.metadata = {}
    made.metadata = KERNEL
    return str(jupytext.writes(made, fmt="ipynb"))


def _printed(text: str) -> Any:
    stream = {"output_type": "stream", "name": "stdout", "text": f"{text}\n"}
    return from_dict(stream)


def _code(source: str, outputs: list[Any]) -> Any:
    cell = {"cell_type": "code", "execution_count": None, "source": source}
    return from_dict({**cell, "metadata": {}, "outputs": outputs})


def split_cells(code: str) -> tuple[str, list[str]]:
    r"""A snippet's docstring, and its code in parts that each end in output.

    Examples:
        >>> split_cells('"Two."\n\nprint(1)\n# -> 1\nif 1:\n    print(2)\n')
        ('Two.', ['print(1)\n# -> 1\n', 'if 1:\n    print(2)\n'])
    """
    tree = ast.parse(code)
    docstring = ast.get_docstring(tree) or ""
    start = tree.body[0].end_lineno or 0 if docstring else 0
    parts, said = [""], False
    for line in code.splitlines(keepends=True)[start:]:
        promise = line.startswith("# ->")
        if said and not promise:
            parts.append("")
        said = promise
        parts[-1] += line
    return docstring, [part for part in map(_trim, parts) if part]


def _trim(part: str) -> str:
    return f"{part.strip(chr(10))}\n" if part.strip() else ""


def install_command(source_url: str) -> str:
    """What installs the package in a notebook, "" where nothing can.

    Examples:
        >>> install_command("https://github.com/a/b/blob/main")
        '%pip install --quiet git+https://github.com/a/b@main'
        >>> install_command("")
        ''
    """
    found = re.fullmatch(r"(https://.+?)(?:/-)?/blob/(.+)", source_url)
    return f"%pip install --quiet git+{found[1]}@{found[2]}" if found else ""
