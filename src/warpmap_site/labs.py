"""Labs: notebooks with their outputs, tied to the code that gave them.

A lab is ``docs/labs/<name>.ipynb``. Its metadata name its topics, and hold a
hash of its code and of all that this code imports or reads. ``make labs`` runs
the labs and writes both; mkdocs-jupyter shows what is written.
"""

import ast
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warpmap_site.browser import imported, imports
from warpmap_site.notebooks import KERNEL

TEMPLATES = Path(__file__).parent / "lab"
"""How mkdocs-jupyter writes a notebook, in place of its own templates."""


@dataclass(frozen=True)
class Lab:
    """One notebook of ``docs/labs``."""

    file: Path
    notebook: dict[str, Any]

    @property
    def path(self) -> str:
        """``labs/<name>``."""
        return f"labs/{self.file.stem}"

    @property
    def url(self) -> str:
        """Address from the site's root."""
        return f"{self.path}/"

    @property
    def title(self) -> str:
        """The heading of the first cell."""
        return self._first_cell()[0].removeprefix("# ")

    @property
    def description(self) -> str:
        """What follows the heading: one sentence."""
        return self._first_cell()[1]

    def _first_cell(self) -> list[str]:
        text = "".join(self.notebook["cells"][0]["source"])
        return [*text.split("\n\n"), "", ""]

    @property
    def topics(self) -> list[str]:
        """Paths of the topics that it belongs to, the main one first."""
        return list(self.notebook["metadata"]["warpmap"]["topics"])

    @property
    def area(self) -> str:
        """The area whose colour it has."""
        return self.topics[0].split("/")[0]

    @property
    def outputs(self) -> list[dict[str, Any]]:
        """The outputs of all cells."""
        return [
            output
            for cell in self.notebook["cells"]
            for output in cell.get("outputs", [])
        ]

    @property
    def digest(self) -> str:
        """The hash that was written with the outputs, or ""."""
        return str(self.notebook["metadata"]["warpmap"].get("digest", ""))


def load_labs(root: Path) -> list[Lab]:
    """Every lab of the repository, by file name.

    Raises:
        LookupError: If a lab has no heading, sentence or topic.
    """
    labs = []
    for file in sorted((root / "docs/labs").glob("*.ipynb")):
        lab = Lab(file, json.loads(file.read_text("utf-8")))
        about = lab.notebook["metadata"].get("warpmap", {})
        if not (about.get("topics") and lab.title and lab.description):
            raise LookupError(
                f"docs/{lab.path}.ipynb: needs a first cell with '# Title' "
                'and a sentence, and metadata "warpmap": {"topics": [...]}'
            )
        labs.append(lab)
    return labs


def index(labs: list[Lab]) -> str:
    """The page that lists the labs, as Markdown."""
    listed = [
        f"- [{lab.title}]({lab.file.name}). {lab.description}" for lab in labs
    ]
    about = (
        "Longer explorations: notebooks that take one question through "
        "several topics. Their outputs are stored with a hash of the code "
        "that gave them, and a test fails when that code has changed."
    )
    return "\n".join(["---\ntitle: Labs\n---\n", about, "", *listed])


# -- what outputs rest on ------------------------------------------------------


def code_digest(root: Path, lab: Lab) -> str:
    """A short hash of all that a lab's outputs rest on.

    That is its code, the modules of this project that it imports, at whatever
    remove, the JSON files beside them, and the files of the repository that a
    string in its code names.
    """
    code = "\n".join(
        "".join(cell["source"])
        for cell in lab.notebook["cells"]
        if cell["cell_type"] == "code"
    )
    found = hashlib.sha256(code.encode())
    for name, file in sorted(_files(root, code).items()):
        text = file.read_text("utf-8")  # the same with any line ends
        found.update(f"\0{name}\0{text}".encode())
    return found.hexdigest()[:12]


def _files(root: Path, code: str) -> dict[str, Path]:
    src = root / "src"
    trees = {name: src / name for name in ("warpmap", "warpmap_site")}
    found = imported(trees, imports(code))
    for folder in {file.parent for file in found.values()}:
        for file in folder.glob("*.json"):
            found[file.relative_to(src).as_posix()] = file
    for text in _strings(code):
        if "/" in text and (root / text).is_file():
            found[text] = root / text
    return found


def _strings(code: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from [node.value] if len(node.value) < 200 else []


# -- running -------------------------------------------------------------------


def run(root: Path, lab: Lab) -> str:
    """Execute a lab from its first cell to its last, on the CPU.

    What differs between two runs of the same code is left out: counts, times,
    and how a stream was cut into pieces.

    Returns:
        The notebook with its new outputs and hash, as it belongs in the file.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell raises.
    """
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.reads(json.dumps(lab.notebook), as_version=4)
    with tempfile.TemporaryDirectory() as empty:
        environment = {
            **os.environ,
            "PYTHONPATH": str(root / "src"),
            "PYTHONHASHSEED": "0",
            "CUDA_VISIBLE_DEVICES": "",
            "IPYTHONDIR": empty,  # nobody's own settings
        }
        NotebookClient(
            nb,
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(root)}},
            coalesce_streams=True,
            extra_arguments=["--log-level=ERROR"],
        ).execute(env=environment)
    for number, cell in enumerate(nb.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
        if cell.cell_type == "code":
            cell.execution_count = None
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
                if "metadata" in output:
                    output.metadata = {}
    about = {"digest": code_digest(root, lab), "topics": lab.topics}
    nb.metadata = nbformat.from_dict({**KERNEL, "warpmap": about})
    nb.nbformat, nb.nbformat_minor = 4, 5
    return str(nbformat.writes(nb)).rstrip("\n") + "\n"


# -- pages ---------------------------------------------------------------------

_MATH = re.compile(
    r"(?P<code><(?:code|pre|svg)\b.*?</(?:code|pre|svg)>)"
    r"|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$",
    re.DOTALL,
)
_HEADING = re.compile(
    r'<h([1-6])[^>]*>(.*?)(?:<a class="anchor.*?</a>)?</h\1>', re.DOTALL
)
_LINK = re.compile(r'href="([^":#]+\.(?:md|ipynb))(#[^"]*)?"')


def page_html(html: str, address: Callable[[str], str]) -> str:
    """What mkdocs-jupyter made of a notebook, as a page of this site.

    Formulas are marked for KaTeX, headings have the ids of the table of
    contents, links between source files lead to pages.

    Args:
        html: Written with ``TEMPLATES``.
        address: The address of a page, from a link to its file.
    """
    from markdown.extensions.toc import slugify

    def math(found: re.Match[str]) -> str:
        if found["code"]:
            return found["code"]
        if found["block"]:
            return f'<div class="arithmatex">\\[{found["block"]}\\]</div>'
        return f'<span class="arithmatex">\\({found["inline"]}\\)</span>'

    def heading(found: re.Match[str]) -> str:
        level, text = found.groups()
        name = slugify(re.sub("<.*?>", "", text), "-")
        return f'<h{level} id="{name}">{text}</h{level}>'

    def link(found: re.Match[str]) -> str:
        return f'href="{address(found[1])}{found[2] or ""}"'

    html = html.partition("<style>")[0]  # of Pygments; ours is in labs.css
    return _LINK.sub(link, _HEADING.sub(heading, _MATH.sub(math, html)))


if __name__ == "__main__":
    here = Path.cwd()
    chosen = [Path(name).stem for name in sys.argv[1:]]
    for lab in load_labs(here):
        if not chosen or lab.file.stem in chosen:
            written = run(here, lab)
            same = written == lab.file.read_text("utf-8")
            lab.file.write_text(written, "utf-8")
            print(f"{lab.path}: {'the same' if same else 'new outputs'}")
