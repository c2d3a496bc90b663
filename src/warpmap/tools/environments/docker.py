"""Which layers of a Docker image are built again after a change.

A builder goes through the Dockerfile from the top and takes a layer from its
cache as long as nothing that went into it has changed. After the first miss
it builds every layer below again.

    COPY      misses when a file that it copies was added, edited or removed
    the rest  miss when their text changes; RUN does not look at the outside

Understood: one stage; COPY of files, folders and the wildcards ``*`` and ``?``
with ``--chown`` and ``--chmod``; RUN with a cache mount. What would need other
rules (ADD, ``--from``, ``--link``, heredocs, bind mounts) is refused. The base
image is taken as unchanged.

Rules: Docker, https://docs.docker.com/build/cache/invalidation/
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

KEYWORDS = (
    *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM"),
    *("HEALTHCHECK", "LABEL", "RUN", "SHELL", "STOPSIGNAL", "USER"),
    *("VOLUME", "WORKDIR"),
)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile.

    Args:
        line: Where it starts, counted from 1.
        keyword: In capital letters, for example ``"RUN"``.
        arguments: All that follows, continuation lines joined.
    """

    line: int
    keyword: str
    arguments: str

    @property
    def text(self) -> str:
        """The instruction in one line."""
        return f"{self.keyword} {self.arguments}"


def parse(dockerfile: str) -> list[Instruction]:
    r"""The instructions of a Dockerfile, without comments.

    Args:
        dockerfile: Its text.

    Raises:
        ValueError: If it does not start with FROM, has several stages, or
            uses what this module does not model; the message names the line.

    Examples:
        >>> [i.text for i in parse("FROM debian:12\n# why\nRUN a \\\n&& b")]
        ['FROM debian:12', 'RUN a && b']
    """
    found: list[Instruction] = []
    start, words = 0, ""
    for number, line in enumerate(dockerfile.splitlines(), start=1):
        if re.match(r"\s*(#|$)", line):  # between the parts of one, too
            if re.match(r"#\s*escape\s*=\s*[^\\]", line, re.I):
                raise ValueError(
                    f"line {number}: expected escape=\\, got {line}"
                )
            continue
        start = start or number
        words += re.sub(r"\\\s*$", "", line)
        if not re.search(r"\\\s*$", line):
            found.append(_instruction(start, words.strip()))
            start, words = 0, ""
    if words:
        raise ValueError(f"line {start}: nothing follows the last backslash")

    # only ARG may stand before FROM
    keywords = [i.keyword for i in found if i.keyword != "ARG"]
    if keywords[:1] != ["FROM"]:
        raise ValueError("expected a Dockerfile that starts with FROM")
    if keywords.count("FROM") > 1:
        raise ValueError("expected one stage, got several FROM")
    return found


def rebuilt(
    dockerfile: str,
    changed: Iterable[str] = (),
    dockerignore: str = "",
    before: str | None = None,
) -> list[Instruction]:
    r"""The instructions that run again, in order.

    Args:
        dockerfile: The Dockerfile as it is now.
        changed: Files added, edited or removed since the last build, relative
            to the build context, with forward slashes. A new time stamp alone
            is no change.
        dockerignore: The text of ``.dockerignore``.
        before: The Dockerfile of the last build, if it was another.

    Returns:
        From the first miss to the end; empty if all layers are reused.

    Raises:
        ValueError: As ``parse``, or if a path does not lie in the context.

    Examples:
        >>> late = "FROM python:3.12\nRUN pip install torch\nCOPY . ."
        >>> [i.text for i in rebuilt(late, ["src/model.py"])]
        ['COPY . .']
    """
    now = parse(dockerfile)
    then = parse(before) if before is not None else now
    seen = [p for p in map(_clean, changed) if not excluded(p, dockerignore)]
    for index, instruction in enumerate(now):
        same = index < len(then) and instruction.text == then[index].text
        copied = sources(instruction) if instruction.keyword == "COPY" else []
        if not same or any(_covers(s, p) for s in copied for p in seen):
            return now[index:]
    return []


def rebuild_cost(
    dockerfile: str,
    costs: Mapping[str, float],
    changed: Iterable[str] = (),
    dockerignore: str = "",
) -> float:
    r"""What a change costs, in the unit of ``costs``: bytes, or seconds.

    Args:
        dockerfile: The Dockerfile.
        costs: Cost of an instruction by the start of its text; what is not
            named costs nothing.
        changed: As in ``rebuilt``.
        dockerignore: As in ``rebuilt``.

    Raises:
        ValueError: As ``rebuilt``, or if a key does not fit one instruction.

    Examples:
        >>> early = "FROM python:3.12\nCOPY . .\nRUN pip install torch"
        >>> rebuild_cost(early, {"RUN pip": 6e9}, changed=["src/model.py"])
        6000000000.0
    """
    for start in costs:
        fits = sum(i.text.startswith(start) for i in parse(dockerfile))
        if fits != 1:
            raise ValueError(f"expected {start!r} to start one, got {fits}")
    return sum(
        cost
        for instruction in rebuilt(dockerfile, changed, dockerignore)
        for start, cost in costs.items()
        if instruction.text.startswith(start)
    )


def excluded(path: str, dockerignore: str) -> bool:
    """Whether a file is kept out of the build context.

    The last pattern that fits decides, and ``!`` takes back an exclusion.

    Args:
        path: Relative to the context, with forward slashes.
        dockerignore: The text of ``.dockerignore``.

    Raises:
        ValueError: If a pattern holds a character class or an escape.

    Examples:
        >>> excluded("src/__pycache__/a.pyc", "**/__pycache__")
        True
    """
    out = False
    for line in map(str.strip, dockerignore.splitlines()):
        if line and not line.startswith("#"):
            pattern = line.lstrip("! ").removeprefix("./").strip("/")
            if pattern and _covers(pattern, path):
                out = not line.startswith("!")
    return out


def sources(copy: Instruction) -> list[str]:
    r"""The patterns of what a COPY reads, relative to the context.

    Args:
        copy: The instruction.

    Raises:
        ValueError: If it is of a form that this module does not model.

    Examples:
        >>> sources(parse("FROM debian:12\nCOPY ./src a.txt /app/")[1])
        ['src', 'a.txt']
    """
    words = copy.arguments.split()
    flags = [w for w in words if w.startswith("--")]
    paths = [w for w in words if not w.startswith("--")]
    known = all(re.match("--(chown|chmod)=", flag) for flag in flags)
    if not known or len(paths) < 2 or re.search(r'[\[$"]|\*\*', copy.text):
        raise ValueError(f"line {copy.line}: {copy.text} is not modelled")
    return [_clean(p) for p in paths[:-1]]


def _instruction(line: int, words: str) -> Instruction:
    keyword, _, arguments = words.partition(" ")
    found = Instruction(line, keyword.upper(), arguments.strip())
    mounts = re.findall(r"--mount=(\S+)", arguments)
    if (
        found.keyword not in KEYWORDS
        or not found.arguments
        or (found.keyword in ("RUN", "COPY") and "<<" in arguments)
        or not all("type=cache" in mount.split(",") for mount in mounts)
    ):
        raise ValueError(f"line {line}: {words} is not modelled")
    if found.keyword == "COPY":
        sources(found)  # refuse unknown forms before any work
    return found


def _clean(path: str) -> str:
    """A path of the context without ``./`` and slashes at its ends."""
    if "\\" in path or ".." in path.split("/") or not path:
        raise ValueError(f"expected a path inside the context, got {path!r}")
    return "/".join(part for part in path.split("/") if part not in ("", "."))


def _covers(pattern: str, path: str) -> bool:
    """Whether a pattern fits a path or one of the folders that hold it."""
    if re.search(r"[\[\\]", pattern):
        raise ValueError(f"pattern {pattern} is not modelled")
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    wild = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = "".join(wild.get(part) or re.escape(part) for part in parts)
    return not pattern or re.fullmatch(f"({regex})(/.*)?", path) is not None
