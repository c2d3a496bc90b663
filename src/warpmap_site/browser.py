"""The modules that pages run in the reader's browser, as one archive."""

import ast
import io
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from warpmap_site.atlas import Atlas
from warpmap_site.sources import Files

SITE = Path(__file__).parent
# what every page may call, and what topics return
ALWAYS = [
    "warpmap.chart",
    "warpmap.trace",
    "warpmap_site.charts",
    "warpmap_site.forms",
    "warpmap_site.worker",
    "warpmap_site.traces",
]
CALLED = re.compile(r"^```(?:calculator|trace)\n(\S+)", re.MULTILINE)


def archive(root: Path, atlas: Atlas) -> bytes:
    """Every module that runs in a browser, and the package's JSON files.

    The same sources give the same bytes.

    Args:
        root: The repository.
        atlas: Its map.

    Returns:
        A zip that holds ``warpmap`` and ``warpmap_site``.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        for name, file in sorted(members(root, atlas).items()):
            entry = zipfile.ZipInfo(name)  # dated 1980
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            out.writestr(entry, file.read_bytes())
    return buffer.getvalue()


def members(root: Path, atlas: Atlas) -> dict[str, Path]:
    """What the archive holds: files by their name in it.

    A topic runs in the browser if its front matter says so, or if its page
    has a calculator or a trace. What it imports comes along.
    """
    trees = {"warpmap": root / "src/warpmap", "warpmap_site": SITE}
    found = {
        f"warpmap/{file.relative_to(trees['warpmap']).as_posix()}": file
        for file in trees["warpmap"].rglob("*.json")
        if "house" not in file.parts  # beside weights, which need PyTorch
    }
    todo = list(ALWAYS)
    for topic in atlas.topics.values():
        files = Files(root, topic.path)
        todo += CALLED.findall(files.page.read_text("utf-8"))
        if "browser" in topic.meta.runs_on:
            todo.append(f"warpmap.{topic.path.replace('/', '.')}")
            todo += imports(files.snippet.read_text("utf-8"))
    return {**found, **imported(trees, todo)}


def imported(trees: dict[str, Path], names: Iterable[str]) -> dict[str, Path]:
    """Modules, and what they import, and what that imports.

    Args:
        trees: Folders of the packages that are followed, by name.
        names: Dotted names of modules, or of what is in them.

    Returns:
        Files by their name from above the package.
    """
    found: dict[str, Path] = {}
    todo = list(names)
    while todo:
        package, *parts = todo.pop().split(".")
        if package not in trees:
            continue
        for end in range(len(parts) + 1):  # each package on the way too
            name = "/".join([package, *parts[:end]])
            place = trees[package].joinpath(*parts[:end])
            for file, entry in (
                (place / "__init__.py", f"{name}/__init__.py"),
                (place.with_suffix(".py"), f"{name}.py"),
            ):
                if entry not in found and file.is_file():
                    found[entry] = file
                    todo += imports(file.read_text("utf-8"))
    return found


def imports(code: str) -> Iterator[str]:
    """Dotted names of all that code imports, functions' imports too."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
