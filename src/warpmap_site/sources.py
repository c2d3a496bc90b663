"""A topic's files, their hash, a symbol's source, a snippet's two parts.

Only the standard library: the machines that run the tests use this too.
"""

import ast
import hashlib
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

AREAS = ("hardware", "kernels", "models", "training", "inference", "tools")


@dataclass(frozen=True)
class Files:
    """The files of one topic, one in each tree.

    Args:
        root: The repository.
        path: ``<area>/<section>/<topic>``.
    """

    root: Path
    path: str

    @property
    def page(self) -> Path:
        """The page in ``docs``."""
        return self.root / "docs" / f"{self.path}.md"

    @property
    def module(self) -> Path:
        """The module in ``src/warpmap``."""
        return self.root / "src/warpmap" / f"{self.path}.py"

    @property
    def private(self) -> list[Path]:
        """What the module imports of its folder, ``_name.py``."""
        if not self.module.exists():
            return []
        package = "warpmap." + self.path.rpartition("/")[0].replace("/", ".")
        found = re.findall(
            rf"^ *from {package}(?:\.| import )(_[a-z]\w*)",
            self.module.read_text("utf-8"),
            re.MULTILINE,
        )
        return [self.module.with_name(f"{n}.py") for n in sorted({*found})]

    @property
    def cuda(self) -> Path:
        """CUDA C++ beside the module; few topics have it."""
        return self.module.with_suffix(".cu")

    @property
    def snippet(self) -> Path:
        """The program that a reader runs."""
        return self.root / "snippets" / f"{self.path}.py"

    @property
    def test(self) -> Path:
        """The topic's tests."""
        folder, _, name = self.path.rpartition("/")
        return self.root / "tests" / folder / f"test_{name}.py"

    @property
    def benchmark(self) -> Path:
        """What measures the topic on a GPU; few topics have one."""
        return self.root / "benchmarks" / f"{self.path}.py"

    def digest(self, *parts: str) -> str:
        """A short hash of what a result rests on.

        Args:
            parts: Which files; those that do not exist are left out. With
                the module go the private ones that it imports.

        Examples:
            >>> Files(Path("nowhere"), "a/b/c").digest("module", "test")
            'e3b0c44298fc'
        """
        files = [getattr(self, part) for part in parts]
        if "module" in parts:
            files += self.private
        code = b"\0".join(f.read_bytes() for f in files if f.exists())
        return hashlib.sha256(code).hexdigest()[:12]


def topic_of(file: str) -> str | None:
    """The topic that a file of the repository belongs to.

    Args:
        file: Path from the repository's root, with forward slashes.

    Returns:
        ``<area>/<section>/<topic>``, or None where it belongs to none.

    Examples:
        >>> topic_of("tests/kernels/normalization/test_softmax.py")
        'kernels/normalization/softmax'
        >>> topic_of("src/warpmap/kernels/normalization/softmax.py")
        'kernels/normalization/softmax'
        >>> topic_of("tests/site/test_map.py")
    """
    match = re.fullmatch(
        r"(?:src/warpmap|docs|snippets|tests|benchmarks)/"
        rf"((?:{'|'.join(AREAS)})/[a-z0-9_]+)/(?:test_)?([a-z0-9_]+)\.(?:py|md)",
        file,
    )
    if not match or match[2] == "__init__":
        return None
    return f"{match[1]}/{match[2]}"


def split_snippet(code: str) -> tuple[str, str]:
    r"""A snippet's code and, apart, the output that its comments promise.

    Examples:
        >>> split_snippet("print(1)\n# -> 1\nprint(2)\n# -> 2\n")
        ('print(1)\nprint(2)', '1\n2')
    """
    kept, output = [], []
    for line in code.splitlines():
        if line.strip().startswith("# ->"):
            output.append(line.strip().removeprefix("# ->").removeprefix(" "))
        else:
            kept.append(line)
    return "\n".join(kept).strip("\n"), "\n".join(output)


@dataclass(frozen=True)
class Symbol:
    """A function or class as it stands in its file; lines count from 1."""

    file: Path
    first_line: int
    last_line: int
    code: str


def find_symbol(root: Path, name: str) -> Symbol:
    """The source of one symbol of the package, as a page shows it.

    Decorators belong to it. Of a docstring only the first paragraph stays: the
    reference has the rest.

    Args:
        root: The repository.
        name: Dotted name of a function, a class, a method or a variable, for
            example ``warpmap.kernels.fused.rope.rope``; or, for CUDA C++
            beside a module, ``warpmap.kernels.data_movement.reduce.cu:sum``.

    Returns:
        Its lines; a method's without the indent.

    Raises:
        LookupError: If no module or no symbol of that name exists.
    """
    if ".cu:" in name:
        return _find_cuda(root, name)
    parts = name.split(".")
    for at in range(len(parts) - 1, 0, -1):
        file = root.joinpath("src", *parts[:at]).with_suffix(".py")
        if file.is_file():
            break
    else:
        raise LookupError(f"{name}: there is no such module in src")
    text = file.read_text(encoding="utf-8")
    body: list[ast.stmt] = ast.parse(text).body
    for symbol in parts[at:]:
        known = {n: node for node in body for n in _names(node)}
        if symbol not in known:
            there = ", ".join(known) or "nothing"
            where = file.relative_to(root).as_posix()
            raise LookupError(f"{name}: {where} defines {there}")
        found = known[symbol]
        body = found.body if isinstance(found, ast.ClassDef) else []
    first, last = found.lineno, found.end_lineno or found.lineno
    for decorator in getattr(found, "decorator_list", []):
        first = min(first, decorator.lineno)
    code = textwrap.dedent(_brief(text, found, first, last))
    return Symbol(file, first, last, code)


# return type, perhaps launch bounds, the name, parameters, an opening brace
_CUDA_FUNCTION = (
    r'^[\w"][\w"\s*&<>:]*?\s(?:__launch_bounds__\([^)]*\)\s*)?'
    r"(\w+)\([^;{}]*\)\s*\{(?:.*\})?$"
)


def _find_cuda(root: Path, name: str) -> Symbol:
    """A function of a ``.cu`` file, with the comment above it.

    A file is read as it is formatted: a function begins in the first column,
    and so does its closing brace.
    """
    module, _, symbol = name.partition(".cu:")
    file = root.joinpath("src", *module.split(".")).with_suffix(".cu")
    if not file.is_file():
        raise LookupError(f"{name}: there is no such file in src")
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    begins = {
        match[1]: text.count("\n", 0, match.start())
        for match in re.finditer(_CUDA_FUNCTION, text, re.MULTILINE)
    }
    if symbol not in begins:
        raise LookupError(f"{name}: the file defines {', '.join(begins)}")
    first = begins[symbol]
    body = range(first, len(lines))
    last = next(n for n in body if re.match(r"\}|\S.*\{.*\}$", lines[n]))
    while first and lines[first - 1].startswith(("//", "template")):
        first -= 1
    code = "\n".join(lines[first : last + 1])
    return Symbol(file, first + 1, last + 1, code)


def _names(node: ast.stmt) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def _brief(text: str, top: ast.stmt, first: int, last: int) -> str:
    """Lines ``first`` to ``last``, docstrings cut to their first paragraph."""
    lines = dict(enumerate(text.splitlines(), start=1))
    for node in ast.walk(top):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        doc = node.body[0]
        if ast.get_docstring(node) is None or doc.end_lineno is None:
            continue
        whole = range(doc.lineno, doc.end_lineno + 1)
        blank = next((n for n in whole if not lines[n].strip()), None)
        if blank is None:
            continue
        lines[blank - 1] += '"""'
        for n in range(blank, doc.end_lineno + 1):
            del lines[n]
    return "\n".join(lines[n] for n in sorted(lines) if first <= n <= last)
