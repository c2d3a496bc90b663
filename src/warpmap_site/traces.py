"""Traces: what a function did, checked, as JSON for the player, as a table.

The build calls this for the frames with a function's defaults. The page calls
the very same code in the reader's browser when an input changes, so only the
standard library is imported.
"""

import ast
import html
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from warpmap.trace import (
    Frame,
    Grid,
    Lanes,
    Mark,
    Picture,
    Tree,
)
from warpmap_site.forms import (
    Form,
    FormError,
    InputError,
    blame,
    describe,
    find,
    form_html,
    read,
)

MOST_FRAMES = 200
SAYS: dict[str, str] = {"new": "new", "gone": "gone", "wait": "waiting"}
"""Marks in words; what is in use is clear from the caption."""


class TraceError(FormError):
    """A function whose frames cannot be played; an author must mend it."""


# -- checking ------------------------------------------------------------------


def check(name: str, trace: Any) -> list[Frame]:
    """The trace, if a page can play it.

    Args:
        name: The function that returned it.
        trace: What it returned.

    Raises:
        TraceError: If it is no list of frames, empty, too long, or a frame
            contradicts itself; says which and how to mend it.
    """
    if not isinstance(trace, list) or not all(
        isinstance(frame, Frame) for frame in trace
    ):
        raise TraceError(
            f"{name} returned no trace but {type(trace).__name__}; mend: "
            "return a list of warpmap.trace.Frame"
        )
    if not trace:
        raise TraceError(
            f"{name} recorded no frame; mend: call record at each step"
        )
    if len(trace) > MOST_FRAMES:
        raise TraceError(
            f"{name} recorded {len(trace)} frames; mend: at most "
            f"{MOST_FRAMES}, of which readers follow 10 to 40"
        )
    forms = _forms(trace[0])
    for number, frame in enumerate(trace, start=1):
        here = f"{name}, frame {number}"
        if _forms(frame) != forms:
            raise TraceError(
                f"{here} shows {', '.join(_forms(frame))} after "
                f"{', '.join(forms)}; mend: keep one form in all frames"
            )
        if not frame.caption.strip():
            raise TraceError(f"{here} has no caption; mend: say what happened")
        for picture in _pictures(frame):
            for problem in _problems(picture):
                raise TraceError(f"{here}: {problem}")
    return trace


def _pictures(frame: Frame) -> list[Picture]:
    return [p for p in (frame.picture, frame.below) if p is not None]


def _forms(frame: Frame) -> list[str]:
    return [type(picture).__name__ for picture in _pictures(frame)]


def _problems(picture: Picture) -> Iterator[str]:
    """What contradicts itself in a picture."""
    marks: list[str] = []
    if isinstance(picture, Grid):
        if not picture.rows:
            yield "a Grid has no rows; mend: keep the rows, with empty cells"
        widest = max((len(cells) for _, cells in picture.rows), default=0)
        if picture.columns and widest > len(picture.columns):
            yield (
                f"a row has {widest} cells under {len(picture.columns)} "
                "columns; mend: name all columns or none"
            )
        marks = [c.mark for _, cells in picture.rows for c in cells]
        yield from _twice([c.key for _, row in picture.rows for c in row])
    elif isinstance(picture, Lanes):
        if not picture.end > 0:
            yield f"Lanes end at {picture.end}; mend: end the axis after 0"
        for lane, spans in picture.lanes:
            for span in spans:
                if not 0 <= span.start <= span.end <= picture.end:
                    yield (
                        f"lane {lane!r} has a span from {span.start} to "
                        f"{span.end} on an axis from 0 to {picture.end}; "
                        "mend: keep spans on the axis"
                    )
                marks.append(span.mark)
    elif isinstance(picture, Tree):
        seen: set[str] = set()
        for node in picture.nodes:
            if node.parent is not None and node.parent not in seen:
                yield (
                    f"node {node.key!r} comes before its parent "
                    f"{node.parent!r}; mend: list parents first"
                )
            seen.add(node.key)
            marks.append(node.mark)
        yield from _twice([node.key for node in picture.nodes])
    else:
        for arrow in picture.arrows:
            for end in (arrow.source, arrow.target):
                if not 0 <= end < len(picture.nodes):
                    yield (
                        f"an arrow touches node {end} of "
                        f"{len(picture.nodes)}; mend: count from 0"
                    )
            marks.append(arrow.mark)
        marks += [c.mark for _, cells in picture.nodes for c in cells]
    for mark in marks:
        if mark not in get_args(Mark):
            known = ", ".join(map(repr, get_args(Mark)))
            yield f"there is no mark {mark!r}; mend: use one of {known}"


def _twice(keys: list[str]) -> Iterator[str]:
    named = [key for key in keys if key]
    for key in named:
        if named.count(key) > 1:
            yield f"key {key!r} is used twice; mend: give each its own"


def impure_imports(module: str) -> list[str]:
    """What a module imports, directly or not, that browsers do not have.

    Only what runs at import counts. Modules of ``warpmap`` are followed.

    Returns:
        Each as ``<file> imports <module>``.

    Examples:
        >>> impure_imports("warpmap.trace")
        []
    """
    found: list[str] = []
    todo, seen = [module], set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.origin:
            continue
        tree = ast.parse(Path(spec.origin).read_text("utf-8"))
        for used in _imported(tree.body, name):
            if used.split(".")[0] == "warpmap":
                parts = used.split(".")
                todo += [
                    ".".join(parts[:n])
                    for n in range(1, len(parts) + 1)
                    if _is_module(".".join(parts[:n]))
                ]
            elif used.split(".")[0] not in sys.stdlib_module_names:
                where = "src/" + name.replace(".", "/") + ".py"
                found.append(f"{where} imports {used}")
    return found


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _imported(body: list[ast.stmt], module: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")[: -node.level]
                base = ".".join([*package, base]).rstrip(".")
            yield base
            if base.split(".")[0] == "warpmap":
                yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _imported(getattr(node, part, []), module)


# -- as plain data -------------------------------------------------------------


def frames(trace: list[Frame]) -> list[dict[str, Any]]:
    """Frames as the player takes them; what is empty is left out.

    A cell is its text, or a list of text, mark and key.

    Examples:
        >>> from warpmap.trace import Cell
        >>> row = ("pool", [Cell("a", "new"), Cell()])
        >>> frames([Frame("Slot 0 is taken.", Grid([row]))])[0]["pictures"]
        [{'form': 'grid', 'rows': [['pool', [['a', 'new'], '']]]}]
    """
    return [
        {
            "caption": frame.caption,
            "pictures": [_plain(picture) for picture in _pictures(frame)],
        }
        for frame in trace
    ]


def _plain(picture: Picture) -> dict[str, Any]:
    data: dict[str, Any] = {"form": type(picture).__name__.lower()}
    if isinstance(picture, Grid):
        data["rows"] = [[name, _cells(row)] for name, row in picture.rows]
        if picture.columns:
            data["columns"] = list(picture.columns)
    elif isinstance(picture, Lanes):
        data["lanes"] = [
            [name, [_short([_n(s.start), _n(s.end), s.text, s.mark])
                    for s in spans]]
            for name, spans in picture.lanes
        ]  # fmt: skip
        data |= {"unit": picture.unit, "end": _n(picture.end)}
        if picture.now is not None:
            data["now"] = _n(picture.now)
    elif isinstance(picture, Tree):
        data["nodes"] = [
            _short([n.key, n.text, n.parent, n.mark, n.note])
            for n in picture.nodes
        ]
    else:
        data["nodes"] = [[name, _cells(row)] for name, row in picture.nodes]
        data["arrows"] = [
            _short([a.source, a.target, a.text, a.mark]) for a in picture.arrows
        ]
    return data


def _cells(cells: Any) -> list[Any]:
    plain = [_short([cell.text, cell.mark, cell.key]) for cell in cells]
    return [c if len(c) > 1 else "".join(c) for c in plain]


def _short(values: list[Any]) -> list[Any]:
    """The values without the empty ones at their end."""
    kept = list(values)
    while kept and kept[-1] in ("", None):
        kept.pop()
    return kept


def _n(number: float) -> float:
    short = round(float(number), 6)
    return int(short) if short.is_integer() else short


def frames_json(trace: list[Frame]) -> str:
    r"""Frames as compact JSON that may stand inside a script element.

    Examples:
        >>> frames_json([Frame("a<b", Tree([]))])
        '[{"caption":"a\\u003cb","pictures":[{"form":"tree","nodes":[]}]}]'
    """
    text = json.dumps(
        frames(trace),
        ensure_ascii=False,
        allow_nan=False,
        separators=(",", ":"),
    )
    return text.replace("<", "\\u003c")


def replay(name: str, arguments: Mapping[str, str]) -> dict[str, Any]:
    """Call a traced function with what a reader wrote.

    Args:
        name: The function's dotted name.
        arguments: Text by parameter; what is missing takes its default.

    Returns:
        ``frames`` and, for each, how things stand in ``words``; or ``error``
        and the ``field`` that it names, or None.
    """
    function = find(name)
    form = describe(function)
    try:
        trace = function(**read(form, arguments))
        if isinstance(trace, list) and len(trace) > MOST_FRAMES:
            return {
                "error": f"these inputs take {len(trace)} steps, of which "
                f"{MOST_FRAMES} can be shown: ask for less",
                "field": None,
            }
        trace = check(name, trace)
        return {
            "frames": frames(trace),
            "words": [_state(frame) for frame in trace],
        }
    except InputError as error:
        return {"error": str(error), "field": error.field}
    except (ValueError, ArithmeticError) as error:
        says = str(error) or type(error).__name__
        return {"error": says, "field": blame(form, says)}


# -- in words ------------------------------------------------------------------


def in_words(picture: Picture) -> list[str]:
    """How things stand, a line for each row, lane, root or node.

    Examples:
        >>> from warpmap.trace import Cell, Span
        >>> in_words(Grid([("pool", [Cell("a"), Cell("b", "new"), Cell()])]))
        ['pool: a, b (new), –']
        >>> in_words(Lanes([("GPU 0", [Span(0, 2, "F0")])], "ms", 4))
        ['GPU 0: F0 0–2 ms']
    """
    if isinstance(picture, Grid):
        return [_row(name, cells) for name, cells in picture.rows]
    if isinstance(picture, Lanes):
        lines = []
        for name, spans in picture.lanes:
            said = [
                _say(f"{s.text} {_n(s.start)}–{_n(s.end)}".strip(), s.mark)
                + f" {picture.unit}"
                for s in spans
            ]
            lines.append(f"{name}: {', '.join(said) or '–'}")
        return lines
    if isinstance(picture, Tree):
        depth: dict[str | None, int] = {None: -1}
        lines = []
        for node in picture.nodes:
            depth[node.key] = depth[node.parent] + 1
            note = f" [{node.note}]" if node.note else ""
            dashes = "– " * depth[node.key]
            lines.append(dashes + _say(node.text + note, node.mark))
        return lines
    lines = [_row(name, cells) for name, cells in picture.nodes]
    for arrow in picture.arrows:
        source, target = (
            picture.nodes[end][0] for end in (arrow.source, arrow.target)
        )
        text = f": {arrow.text}" if arrow.text else ""
        lines.append(_say(f"{source} → {target}{text}", arrow.mark))
    return lines


def _row(name: str, cells: Any) -> str:
    said = ", ".join(_say(cell.text or "–", cell.mark) for cell in cells)
    said = said or "–"
    return f"{name}: {said}" if name else said


def _say(text: str, mark: str) -> str:
    return f"{text} ({SAYS[mark]})" if mark in SAYS else text


def _state(frame: Frame) -> list[str]:
    return [line for p in _pictures(frame) for line in in_words(p)]


def _table(trace: list[Frame]) -> str:
    rows = []
    for number, frame in enumerate(trace, start=1):
        state = "<br>".join(map(html.escape, _state(frame)))
        rows.append(
            f"<tr><td>{number}</td><td>{html.escape(frame.caption)}</td>"
            f"<td>{state}</td></tr>"
        )
    return (
        "<table><thead><tr><th>Step</th><th>What happens</th>"
        f"<th>State after it</th></tr></thead><tbody>{''.join(rows)}"
        "</tbody></table>"
    )


# -- the fence -----------------------------------------------------------------


def trace_html(text: str) -> str:
    """A trace fence: the function's name, then what to watch.

    Returns:
        A ``<figure class="wm-trace">`` that can be read without a script: the
        sentence, the first caption, all steps as a table. The player takes
        its frames from the script element.

    Raises:
        TraceError: If the function is not there, cannot run in a browser, or
            returns what cannot be played.
    """
    name, _, watch = (part.strip() for part in text.partition("\n"))
    module, _, attribute = name.rpartition(".")
    if not module or not attribute.isidentifier():
        raise TraceError(
            f"{name!r} is no dotted name; mend: begin the fence with "
            "warpmap.<area>.<section>.<module>.<function>"
        )
    if not watch:
        raise TraceError(
            f"{name}: says nothing; mend: add one sentence that says what to "
            "watch"
        )
    try:
        impure = impure_imports(module)
    except ModuleNotFoundError as error:
        raise TraceError(f"{name}: {error}") from error
    if impure:
        raise TraceError(
            f"{impure[0]}, which no browser has; mend: move {attribute} and "
            "what it needs into a module that imports the standard library "
            "only"
        )
    function = find(name)
    form = describe(function)
    try:
        trace = check(name, function())
    except ValueError as error:
        raise TraceError(
            f"{name} refuses its own defaults: {error}; mend: change them"
        ) from error
    return _figure(form, trace, watch)


def _figure(form: Form, trace: list[Frame], watch: str) -> str:
    inputs = ""
    if form.fields:
        inputs = (
            '<details class="wm-trace-inputs wm-js" hidden>'
            "<summary>Change the inputs</summary>"
            f"{form_html(form)}</details>"
        )
    return (
        f'<figure class="wm-trace" data-function="{html.escape(form.function)}"'
        f' aria-label="Trace of {html.escape(form.name)}">'
        f'<p class="wm-trace-watch">{html.escape(watch)}</p>'
        '<div class="wm-trace-player">'
        '<div class="wm-trace-stage"></div>'
        f'<p class="wm-trace-caption">{html.escape(trace[0].caption)}</p>'
        f"</div>{inputs}"
        '<details class="wm-trace-steps" data-search-exclude>'
        f"<summary>All {len(trace)} steps in words</summary>"
        '<div class="wm-trace-table" tabindex=0 role="group" '
        f'aria-label="Steps in words">{_table(trace)}</div></details>'
        '<script type="application/json" class="wm-trace-data">'
        f"{frames_json(trace)}</script></figure>"
    )
