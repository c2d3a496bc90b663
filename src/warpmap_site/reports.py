"""When and where a topic's tests last passed, from the committed reports."""

import json
from dataclasses import dataclass
from pathlib import Path

from warpmap_site.sources import Files


@dataclass(frozen=True)
class Pass:
    """One line under a topic's title."""

    where: str
    tests: int
    date: str
    commit: str
    stale: bool


def passed_digest(root: Path, topic: str) -> str:
    """A short hash of what a topic's tests rest on."""
    return Files(root, topic).digest("module", "cuda", "snippet", "test")


def last_passes(root: Path, topic: str) -> list[Pass]:
    """Every machine on which the topic's tests passed, newest first.

    Args:
        root: The repository; reports are ``docs/records/*/tests.json``.
        topic: ``<area>/<section>/<topic>``.

    Returns:
        One entry a machine; ``stale`` where the topic's module, snippet or
        test has changed since.
    """
    passes = []
    for file in (root / "docs/records").glob("*/tests.json"):
        report = json.loads(file.read_text("utf-8"))
        if entry := report["topics"].get(topic):
            run = report["runs"][entry["run"]]
            machine = run["machine"]
            name = machine["gpu"] or "CPU"
            passes.append(
                Pass(
                    where=f"{name}, torch {machine['torch'].split('+')[0]}",
                    tests=entry["passed"],
                    date=entry["run"][:10],
                    commit=run["commit"],
                    stale=entry["source"] != passed_digest(root, topic),
                )
            )
    return sorted(passes, key=lambda p: (p.date, p.where), reverse=True)
