"""What an algorithm did, step by step, as plain data that a page plays.

A traced function takes ``record``, a callable that receives each
:class:`Frame`; without it the function does the same and says nothing. Frames
have one of four forms: a grid of cells, lanes over time, a tree, a ring. All
frames of a trace have the same form. What keeps its place, or its key, from
one frame to the next is the same thing, and moves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Mark = Literal["", "on", "new", "gone", "wait"]
"""How a part stands out: in use, just made, just removed, not ready."""


@dataclass(frozen=True)
class Cell:
    """A square with a short text.

    Attributes:
        text: A word, a number; long texts are cut.
        mark: How it stands out.
        key: A name of its own, for a cell that moves to other places.
    """

    text: str = ""
    mark: Mark = ""
    key: str = ""


@dataclass(frozen=True)
class Grid:
    """Rows of cells: memory, blocks, a matrix.

    Attributes:
        rows: Each row's name and its cells. A long row is broken, unless the
            columns have names.
        columns: Names of the columns, if they have any.
    """

    rows: Sequence[tuple[str, Sequence[Cell]]]
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Span:
    """Something that lasts, on a lane."""

    start: float
    end: float
    text: str = ""
    mark: Mark = ""


@dataclass(frozen=True)
class Lanes:
    """Who does what when: requests, SMs, pipeline stages.

    Attributes:
        lanes: Each lane's name and its spans.
        unit: Unit of the time axis.
        end: End of the axis, the same in every frame.
        now: The moment of this frame; a line marks it.
    """

    lanes: Sequence[tuple[str, Sequence[Span]]]
    unit: str
    end: float
    now: float | None = None


@dataclass(frozen=True)
class TreeNode:
    """A node, named by a key that stays its own from frame to frame.

    Attributes:
        key: Its name; never shown.
        text: What it holds.
        parent: Key of the node above; None for a root.
        mark: How it stands out.
        note: A second line, in small print.
    """

    key: str
    text: str
    parent: str | None = None
    mark: Mark = ""
    note: str = ""


@dataclass(frozen=True)
class Tree:
    """Nodes, each after its parent."""

    nodes: Sequence[TreeNode]


@dataclass(frozen=True)
class Arrow:
    """A message from one node of a ring to another, by their positions."""

    source: int
    target: int
    text: str = ""
    mark: Mark = "on"


@dataclass(frozen=True)
class Ring:
    """Nodes on a circle, the cells that each holds, and what they send."""

    nodes: Sequence[tuple[str, Sequence[Cell]]]
    arrows: Sequence[Arrow] = ()


Picture = Grid | Lanes | Tree | Ring


@dataclass(frozen=True)
class Frame:
    """One step: a sentence that says what happened, and how things stand.

    Attributes:
        caption: The sentence.
        picture: How things stand after it.
        below: A second picture, for example the memory under a tree.

    Examples:
        >>> Frame("slot 0 taken", Grid([("pool", [Cell("hi", "new")])])).caption
        'slot 0 taken'
    """

    caption: str
    picture: Picture
    below: Picture | None = None


Trace = list[Frame]
