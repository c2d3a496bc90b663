"""Reading the map from the pages, and every mistake that an author can make.

Whatever is missing or contradicts itself is a :class:`Problem` that names the
file, the key and the mend.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from warpmap_site.atlas import AreaMeta, Atlas, Topic, TopicMeta
from warpmap_site.references import load_references
from warpmap_site.sources import AREAS, Files, topic_of

_Meta = TypeVar("_Meta", bound=BaseModel)


@dataclass(frozen=True)
class Problem:
    """Something an author must mend."""

    file: str
    key: str
    says: str
    mend: str

    def __str__(self) -> str:
        """One line: where, what, and the mend."""
        return f"{self.file}: {self.key}: {self.says}; mend: {self.mend}"


class AtlasError(Exception):
    """The map cannot be drawn; holds every problem found."""

    def __init__(self, problems: list[Problem]) -> None:
        """Keep the problems and print one a line."""
        self.problems = problems
        super().__init__(
            "\n".join(["the map has problems:", *map(str, problems)])
        )


def load_atlas(root: Path) -> Atlas:
    """Read and check the whole map.

    Args:
        root: The repository: ``docs``, ``src``, ``snippets``, ``tests``.

    Returns:
        The map.

    Raises:
        AtlasError: If anything is wrong, with every problem found.
    """
    problems: list[Problem] = []
    docs = root / "docs"
    topics: dict[str, Topic] = {}
    area_meta: dict[str, AreaMeta] = {}
    for name in AREAS:
        pages = sorted((docs / name).glob("*/*.md"))
        for page in pages:
            path = topic_of(page.relative_to(root).as_posix())
            if path is None:
                problems.append(
                    Problem(
                        _name(root, page),
                        "path",
                        "is not <area>/<section>/<topic> in snake_case",
                        "rename the file",
                    )
                )
            elif meta := _read(root, page, TopicMeta, problems):
                topics[path] = Topic(path, meta)
        index = docs / name / "index.md"
        if (pages or index.exists()) and (
            about := _read(root, index, AreaMeta, problems)
        ):
            area_meta[name] = about

    atlas = Atlas(topics, area_meta)
    problems += _section_problems(root, atlas)
    problems += _edge_problems(root, atlas)
    problems += _tree_problems(root, atlas)
    if problems:
        raise AtlasError(problems)
    return atlas


def _name(root: Path, file: Path) -> str:
    return file.relative_to(root).as_posix()


def front_matter(text: str) -> dict[str, Any]:
    """The YAML block at the top of a page; empty where there is none.

    Raises:
        yaml.YAMLError: If it is no YAML.
    """
    if not text.startswith("---\n"):
        return {}
    loaded = yaml.safe_load(text[4:].partition("\n---")[0])
    return loaded if isinstance(loaded, dict) else {}


def _read(
    root: Path, page: Path, model: type[_Meta], problems: list[Problem]
) -> _Meta | None:
    file = _name(root, page)
    if not page.exists():
        problems.append(Problem(file, "file", "is missing", "add the page"))
        return None
    try:
        return model.model_validate(front_matter(page.read_text("utf-8")))
    except yaml.YAMLError as error:
        says = " ".join(str(error).split())
        problems.append(Problem(file, "front matter", says, "mend the YAML"))
    except ValidationError as error:
        for detail in error.errors():
            key = str(detail["loc"][0])
            known = model.model_fields.get(key)
            mend = (
                known.description
                if known
                else f"use only {', '.join(model.model_fields)}"
            )
            problems.append(
                Problem(file, key, detail["msg"].lower(), mend or "")
            )
    return None


def _section_problems(root: Path, atlas: Atlas) -> Iterator[Problem]:
    used = {topic.section for topic in atlas.topics.values()}
    for name, meta in atlas.area_meta.items():
        file = f"docs/{name}/index.md"
        titled = {f"{name}/{folder}" for folder in meta.sections}
        for path in sorted({p for p in used if p.startswith(name)} - titled):
            yield Problem(
                file,
                "sections",
                f"has no title for {path}",
                f"add '{path.split('/')[1]}: <title>'",
            )
        for path in sorted(titled - used):
            yield Problem(
                file,
                "sections",
                f"{path} holds no topic",
                "remove it until it does",
            )


def _edge_problems(root: Path, atlas: Atlas) -> Iterator[Problem]:
    for topic in atlas.topics.values():
        file = _name(root, Files(root, topic.path).page)
        for before in topic.meta.builds_on:
            if before not in atlas.topics:
                yield Problem(
                    file,
                    "builds_on",
                    f"{before} does not exist",
                    "name a topic that is on the map, or leave it out",
                )
    if cycle := _cycle(atlas):
        yield Problem(
            f"docs/{cycle[0]}.md",
            "builds_on",
            f"goes round in a circle: {' -> '.join(cycle)}",
            "remove one of these prerequisites",
        )


def _cycle(atlas: Atlas) -> list[str]:
    done: set[str] = set()

    def visit(path: str, trail: list[str]) -> list[str]:
        if path in trail:
            return [*trail[trail.index(path) :], path]
        if path in done or path not in atlas.topics:
            return []
        for before in atlas.topics[path].meta.builds_on:
            if found := visit(before, [*trail, path]):
                return found
        done.add(path)
        return []

    for path in atlas.topics:
        if found := visit(path, []):
            return found
    return []


def _tree_problems(root: Path, atlas: Atlas) -> Iterator[Problem]:
    known = load_references(root / "docs/references.bib")
    for topic in atlas.topics.values():
        files = Files(root, topic.path)
        page = _name(root, files.page)
        for key in topic.meta.papers:
            if key not in known:
                yield Problem(
                    page,
                    "papers",
                    f"{key} is not in docs/references.bib",
                    "add its entry there",
                )
        if topic.meta.kind == "survey":
            continue
        for part in (files.module, files.snippet, files.test):
            if not part.exists():
                yield Problem(
                    page,
                    "file",
                    f"has no {_name(root, part)}",
                    "add that file, or say 'kind: survey'",
                )
        text = files.page.read_text("utf-8")
        if topic.meta.kind == "calculator" and "\n```calculator\n" not in text:
            yield Problem(
                page,
                "kind",
                "is calculator, but the page has no calculator",
                "add a ```calculator fence, or say 'kind: implement'",
            )
        dotted = f"warpmap.{topic.path.replace('/', '.')}."
        for shown, what in (
            (f"\n{dotted}", f"```source fence with {dotted}<name>"),
            (f"\nsnippets/{topic.path}.py", "```cell fence with its snippet"),
        ):
            if shown not in text:
                yield Problem(
                    page, "page", "does not show its code", f"add a {what}"
                )

    trees = ("src/warpmap", "snippets", "tests", "benchmarks")
    for tree in trees:
        for file in sorted((root / tree).rglob("*.py")):
            path = topic_of(_name(root, file))
            private = file.name.startswith("_")
            if path and not private and path not in atlas.topics:
                yield Problem(
                    _name(root, file),
                    "file",
                    "belongs to no page",
                    f"add docs/{path}.md, or remove it",
                )
