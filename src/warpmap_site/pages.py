"""What the site writes by itself: reference pages, references, map data."""

import json
from pathlib import Path
from typing import Any

from warpmap_site.atlas import Atlas, Topic
from warpmap_site.loading import front_matter
from warpmap_site.references import load_references, render
from warpmap_site.sources import Files


def topic_markdown(root: Path, topic: Topic, markdown: str) -> str:
    """A topic's page with its other names before and its papers after."""
    names = ", ".join(topic.meta.aliases)
    parts = [f'<p class="wm-aliases">Also called: {names}</p>', markdown]
    if topic.meta.papers:
        known = load_references(root / "docs/references.bib")
        papers = "\n".join(
            f"- {render(known[key])}" for key in topic.meta.papers
        )
        parts.append(f"## References\n\n{papers}")
    return "\n\n".join(parts)


def reference_pages(root: Path, atlas: Atlas) -> dict[str, str]:
    """The reference: an index, and one page a public module.

    Returns:
        Markdown by path from ``docs``.
    """
    index = ["---\ntitle: Reference\n---\n"]
    written = {}
    for area in atlas.areas:
        index.append(f"\n## {area.meta.title}\n")
        for topic in area.topics:
            if not Files(root, topic.path).module.exists():
                continue
            dotted = f"warpmap.{topic.path.replace('/', '.')}"
            written[f"reference/{topic.path}.md"] = (
                # JSON is YAML: a title may hold quotes and colons
                f"---\ntitle: {json.dumps(topic.title + ': reference')}\n"
                "search:\n  boost: 0.5\n---\n\n"
                f"`{dotted}`, explained in "
                f"[{topic.title}](../../../{topic.path}.md).\n\n"
                f"::: {dotted}\n"
            )
            index.append(f"- [{topic.title}]({topic.path}.md): `{dotted}`")
    index.append("\n## What topics share\n")
    package = root / "src/warpmap"
    for module in sorted(package.rglob("*.py")):
        path = module.relative_to(package).with_suffix("").as_posix()
        if module.name.startswith("_") or path in atlas.topics:
            continue
        dotted = f"warpmap.{path.replace('/', '.')}"
        written[f"reference/{path}.md"] = (
            f"---\ntitle: {path}\nsearch:\n  boost: 0.5\n---\n\n::: {dotted}\n"
        )
        index.append(f"- [{path}]({path}.md): `{dotted}`")
    return {"reference/index.md": "\n".join(index), **written}


def decision_index(root: Path) -> str:
    """A page that links to every decision record, in order."""
    links = [
        f"1. [{front_matter(file.read_text('utf-8'))['title']}]({file.name})"
        for file in sorted((root / "docs/decisions").glob("*-*.md"))
    ]
    return "\n".join(["---\ntitle: Decisions\n---\n", *links])


def map_data(atlas: Atlas) -> list[dict[str, Any]]:
    """What the script of the map needs: the reading order and the edges."""
    return [
        {
            "path": topic.path,
            "title": topic.title,
            "area": topic.area,
            "before": topic.meta.builds_on,
        }
        for topic in atlas.reading_order
    ]
