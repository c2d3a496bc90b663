"""A made-up repository, to build the site from: one topic, or hundreds.

Titles, sections and prerequisites look like real ones; nothing in them is.
"""

import random
import re
from pathlib import Path

from warpmap_site.sources import AREAS, Files

ROOT = Path(__file__).parents[2]
WORDS = [
    "attention",
    "cache",
    "kernel",
    "memory",
    "tensor",
    "block",
    "paged",
    "sparse",
    "fused",
    "ring",
    "sharded",
    "quantized",
    "batched",
    "streaming",
    "prefix",
    "latent",
    "gated",
    "rotary",
    "expert",
    "routing",
    "decoding",
    "prefill",
    "pipeline",
    "schedule",
    "reduction",
    "transpose",
    "layout",
    "checkpoint",
    "optimizer",
    "gradient",
    "precision",
    "window",
    "roofline",
    "bandwidth",
    "occupancy",
]
PAGE = """---
title: {title}
description: What this topic is for, and why it matters to you.
aliases: [{alias}]
kind: {kind}
builds_on: [{builds_on}]
runs_on: [{runs_on}]
papers: []
---

{title} matters.

## How it works

```source
{dotted}.double
```

## Try it

```cell
snippets/{path}.py
```
"""
MODULE = '''"""Doubling."""


def double(x: int) -> int:
    """Twice a number.

    Examples:
        >>> double(2)
        4
    """
    return 2 * x
'''
CALCULATOR_FENCE = """
```calculator
{dotted}.double_calculator
Kind: PRESETS
chart: double_chart
```
"""
CALCULATOR = '''

from dataclasses import dataclass
from typing import Literal

from warpmap.chart import Axis, Bar, BarChart


@dataclass(frozen=True)
class Doubled:
    """A number, doubled.

    Attributes:
        result_gib: Twice the number, in GiB.
    """

    result_gib: float | None


def double_calculator(
    x: int = 1, scale: float = 2.0, odd: bool = False, by: Literal["a"] = "a"
) -> Doubled:
    """Twice a number.

    Args:
        x: A number.
        scale: Another.
        odd: Whether it is odd.
        by: By what.
    """
    if x < 0:
        raise ValueError(f"x must be at least 0, got {x}")
    return Doubled(scale * x)


def double_chart(**given):
    return BarChart("Double", Axis("GiB"), [Bar("x", [("", given["x"])])])


PRESETS = {"one": {"x": 1, "odd": True}}
'''


def write_topic(root, path, **front_matter):
    """Write the four files of one topic; returns where they are."""
    values = {
        "title": path.split("/")[-1].replace("_", " ").capitalize(),
        "alias": "名字",
        "kind": "implement",
        "builds_on": "",
        "runs_on": "cpu",
        **front_matter,
    }
    files = Files(root, path)
    dotted = f"warpmap.{path.replace('/', '.')}"
    page, module = PAGE, MODULE
    if values["kind"] == "calculator":
        page, module = page + CALCULATOR_FENCE, module + CALCULATOR
    for file, text in (
        (files.page, page.format(path=path, dotted=dotted, **values)),
        (files.module, module),
        (
            files.snippet,
            f'"""Doubles."""\n\nfrom {dotted} import double\n\n'
            "print(double(21))\n# -> 42\n",
        ),
        (files.test, "def test_double():\n    assert 2 * 2 == 4\n"),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    package = files.module.parent
    while package != root / "src":
        (package / "__init__.py").touch()
        package = package.parent
    return files


def write_repository(root, topics):
    """Write a repository of ``{path: front matter}``, ready to build."""
    for path, front_matter in topics.items():
        write_topic(root, path, **front_matter)
    for area in AREAS:
        folders = dict.fromkeys(
            p.split("/")[1] for p in topics if p.startswith(f"{area}/")
        )
        if not folders:
            continue
        sections = "".join(
            f"  {f}: {f.replace('_', ' ').capitalize()}\n" for f in folders
        )
        (root / "docs" / area / "index.md").write_text(
            f"---\ntitle: {area.capitalize()}\n"
            f"description: All that {area} are about, made up.\n"
            f"question: What are {area}?\nsections:\n{sections}---\n"
        )
    (root / "docs/index.md").write_text(
        (ROOT / "docs/index.md").read_text("utf-8"), "utf-8"
    )
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    theme = "src/warpmap_site/theme"
    config = config.replace(
        f"custom_dir: {theme}", f"custom_dir: {ROOT / theme}"
    )
    # there are no labs here, and importing that plugin takes seconds
    config = re.sub(r"  - mkdocs-jupyter:\n(?:      .*\n)+", "", config)
    assert "jupyter" not in config
    (root / "mkdocs.yml").write_text(config, "utf-8")


def large_map(count=290, seed=0):
    """Front matter of a map as large as Warpmap is meant to grow."""
    draw = random.Random(seed)
    columns = dict(zip(AREAS, (5, 10, 9, 9, 9, 9), strict=True))
    sections = [
        f"{area}/{draw.choice(WORDS)}_{i}"
        for area, n in columns.items()
        for i in range(n)
    ]
    topics = {}
    while len(topics) < count:
        name = "_".join(draw.sample(WORDS, draw.choice((1, 2, 2, 3, 4, 5))))
        section = sections[
            min(len(sections) - 1, len(topics) * len(sections) // count)
        ]
        path = f"{section}/{name}"
        if path in topics:
            continue
        near = list(topics)[-30:]
        before = draw.sample(near, min(len(near), draw.choice((0, 1, 2, 2, 3))))
        if topics and draw.random() < 0.3:
            before.append(draw.choice(list(topics)))
        topics[path] = {
            "kind": draw.choices(
                ("implement", "calculator", "recipe"), (84, 8, 8)
            )[0],
            "builds_on": ", ".join(dict.fromkeys(before)),
            "runs_on": draw.choice(
                ("cpu", "cpu, browser", "cpu, gpu", "cpu, gpu", "multi-gpu")
            ),
        }
    return topics
