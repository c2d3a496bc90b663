"""The map: every topic, read from the front matter of its page.

Nothing else lists topics. Areas and sections come from the path, "leads to"
and the reading order from ``builds_on``.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from warpmap_site.sources import AREAS

KINDS = {
    "implement": "Implementation",
    "calculator": "Calculator",
    "recipe": "Recipe",
    "survey": "Survey",
}
PLACES = {
    "cpu": "CPU",
    "browser": "Browser",
    "gpu": "GPU",
    "multi-gpu": "Several GPUs",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TopicMeta(_Strict):
    """Front matter of a topic's page; a field's description is the mend."""

    title: str = Field(min_length=2, description="name the topic in few words")
    description: str = Field(
        min_length=20, max_length=200, description="say why in one sentence"
    )
    aliases: list[str] = Field(
        min_length=1, description="list other names that people search for"
    )
    kind: Literal["implement", "calculator", "recipe", "survey"] = Field(
        description=f"use one of {', '.join(KINDS)}"
    )
    builds_on: list[str] = Field(
        description="list topics that exist, as <area>/<section>/<topic>; "
        "[] where nothing comes before"
    )
    runs_on: list[Literal["cpu", "browser", "gpu", "multi-gpu"]] = Field(
        description=f"use any of {', '.join(PLACES)}; [] for a survey"
    )
    papers: list[str] = Field(
        description="list keys of docs/references.bib; [] where there are none"
    )


class AreaMeta(_Strict):
    """Front matter of an area's index page."""

    title: str = Field(min_length=2, description="name the area")
    description: str = Field(min_length=20, description="say what it is about")
    question: str = Field(
        min_length=5, description="ask the question that the area answers"
    )
    sections: dict[str, str] = Field(
        description="give each section's folder its title, in reading order"
    )


@dataclass(frozen=True)
class Topic:
    """One page of the map."""

    path: str
    meta: TopicMeta

    @property
    def area(self) -> str:
        """First part of the path."""
        return self.path.split("/")[0]

    @property
    def section(self) -> str:
        """First two parts of the path."""
        return self.path.rpartition("/")[0]

    @property
    def title(self) -> str:
        """As printed on the map."""
        return self.meta.title

    @property
    def url(self) -> str:
        """Address from the site's root."""
        return f"{self.path}/"


@dataclass(frozen=True)
class Section:
    """A column of the map."""

    path: str
    title: str
    topics: list[Topic]


@dataclass(frozen=True)
class Area:
    """A band of the map."""

    path: str
    meta: AreaMeta
    sections: list[Section]

    @property
    def topics(self) -> list[Topic]:
        """All topics, section by section."""
        return [t for section in self.sections for t in section.topics]


@dataclass(frozen=True)
class Atlas:
    """All topics and what follows from their front matter."""

    topics: dict[str, Topic]
    area_meta: dict[str, AreaMeta] = field(default_factory=dict)

    @cached_property
    def reading_order(self) -> list[Topic]:
        """Every topic after all that it builds on; else by area and title."""
        wanted = sorted(
            self.topics.values(),
            key=lambda t: (AREAS.index(t.area), self._column(t), t.title),
        )
        done: dict[str, Topic] = {}

        def visit(topic: Topic) -> None:
            if topic.path in done:
                return
            for before in topic.meta.builds_on:
                visit(self.topics[before])
            done[topic.path] = topic

        for topic in wanted:
            visit(topic)
        return list(done.values())

    @cached_property
    def depths(self) -> dict[str, int]:
        """How many topics the longest chain before each topic has."""
        found: dict[str, int] = {}
        for topic in self.reading_order:
            before = [found[path] for path in topic.meta.builds_on]
            found[topic.path] = 1 + max(before, default=-1)
        return found

    def _column(self, topic: Topic) -> int:
        sections = list(self.area_meta[topic.area].sections)
        return sections.index(topic.section.partition("/")[2])

    @cached_property
    def areas(self) -> list[Area]:
        """Areas with their sections; what needs least comes first in each."""
        areas = []
        for name in AREAS:
            if name not in self.area_meta:
                continue
            meta = self.area_meta[name]
            sections = []
            for folder, title in meta.sections.items():
                path = f"{name}/{folder}"
                topics = sorted(
                    (t for t in self.topics.values() if t.section == path),
                    key=lambda t: (self.depths[t.path], t.title),
                )
                if topics:
                    sections.append(Section(path, title, topics))
            areas.append(Area(name, meta, sections))
        return areas

    def area(self, name: str) -> Area:
        """The area of that name.

        Raises:
            KeyError: If there is none.
        """
        for area in self.areas:
            if area.path == name:
                return area
        raise KeyError(name)

    def builds_on(self, topic: Topic) -> list[Topic]:
        """What must be understood right before."""
        return [self.topics[path] for path in topic.meta.builds_on]

    def leads_to(self, topic: Topic) -> list[Topic]:
        """What builds directly on this, in reading order."""
        return [t for t in self.reading_order if topic.path in t.meta.builds_on]

    def path_to(self, topic: Topic) -> list[Topic]:
        """Everything before this topic, in an order one can read."""
        before: set[str] = set()
        todo = list(topic.meta.builds_on)
        while todo:
            path = todo.pop()
            if path not in before:
                before.add(path)
                todo += self.topics[path].meta.builds_on
        return [t for t in self.reading_order if t.path in before]

    def neighbours(self, topic: Topic) -> tuple[Topic | None, Topic | None]:
        """The topics right before and after this one in reading order."""
        order = self.reading_order
        at = order.index(topic)
        before = order[at - 1] if at else None
        after = order[at + 1] if at + 1 < len(order) else None
        return before, after
