"""What the harness compared, drawn: shares of the ceiling, and a scoreboard."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from warpmap_site.charts import (
    AREA,
    GROUND,
    INK,
    LINE,
    MUTED,
    ROW,
    WIDTH,
    drawing,
    number,
    tag,
    text_width,
    word,
)

OURS = "warpmap"
CEILINGS = ("copy", "read", "matmul")
RADIUS = 6.0

Row = Mapping[str, Any]


def _shape(n: int, x: float, y: float) -> str:
    """The mark of the n-th peer: a form that no other has."""
    r = RADIUS
    forms = [
        "M-{r},0 A{r},{r} 0 1 0 {r},0 A{r},{r} 0 1 0 -{r},0 Z",  # circle
        "M-{q},-{q} H{q} V{q} H-{q} Z",  # square
        "M0,-{r} L{r},{q} H-{r} Z",  # triangle
        "M0,-{r} L{r},0 L0,{r} L-{r},0 Z",  # diamond
        "M-{q},-{q} L{q},{q} M-{q},{q} L{q},-{q}",  # cross
        "M-{r},0 H{r} M0,-{r} V{r}",  # plus
        "M0,{r} L{r},-{q} H-{r} Z",  # triangle, upside down
        "M0,-{r} V{r}",  # bar
    ]
    path = forms[n % len(forms)].format(r=r, q=round(r * 0.78, 2))
    return tag(
        "path",
        d=path,
        transform=f"translate({x:.1f} {y:.1f})",
        fill=GROUND,
        stroke=INK,
        stroke_width="1.5",
        stroke_opacity="0.75",
    )


def _disc(x: float, y: float) -> str:
    return tag("circle", cx=x, cy=y, r=RADIUS + 1.5, fill=AREA)


def _implementations(rows: Sequence[Row]) -> list[str]:
    """Ours, then the peers, in the order of the benchmark."""
    names = dict.fromkeys(row["implementation"] for row in rows)
    return [name for name in names if name not in CEILINGS]


def _by_shape(rows: Sequence[Row], key: str) -> dict[Any, dict[str, Row]]:
    found: dict[Any, dict[str, Row]] = {}
    for row in rows:
        if key not in row:
            raise LookupError(f"no row has {key}; they have {', '.join(row)}")
        shape = found.setdefault(row[key], {})
        if row["implementation"] in shape:
            raise LookupError(
                f"two rows of {row['implementation']} have {key}={row[key]}: "
                "choose one kind of case"
            )
        shape[row["implementation"]] = row
    return found


def strips(rows: Sequence[Row], key: str, heading: str) -> str:
    """Shares of the ceiling: a line for each shape, a mark for each peer.

    Args:
        rows: Of a record that the harness made, for one kind of case.
        key: The label that tells the shapes apart.
        heading: What it is called.
    """
    shapes = _by_shape(rows, key)
    names = _implementations([row for row in rows if "share" in row])
    ceiling = next(n for n in CEILINGS if n in next(iter(shapes.values())))
    most = max((r["share"] for r in rows if "share" in r), default=1.0)
    right = WIDTH - max(14.0, text_width(ceiling) / 2 + 2)
    left = max(text_width(t) for t in [heading, *map(number, shapes)]) + 14
    scale = (right - left) / max(1.0, most)

    parts, x, y = [], 0.0, ROW / 2 + 3
    for n, name in enumerate(names):  # the legend
        wide = 2 * RADIUS + 10 + text_width(name) + 14
        if x + wide > WIDTH and x:
            x, y = 0.0, y + ROW + 3
        mark = _disc if name == OURS else lambda a, b, n=n: _shape(n - 1, a, b)
        parts.append(mark(x + RADIUS + 2, y))
        shown = {"fill": INK, "font_weight": 600} if name == OURS else {}
        parts.append(word(name, x + 2 * RADIUS + 8, y + 5, **shown))
        x += wide
    top = y + ROW + 12
    parts.append(word(heading, 0, top))
    end = left + scale
    parts.append(word(ceiling, end, top, text_anchor="middle"))
    parts.append(word("0", left, top, text_anchor="middle"))
    step = 32.0
    bottom = top + 12 + step * len(shapes)
    for share in (0.0, 0.5, 1.0):
        at = left + share * scale
        parts.append(
            tag(
                "line",
                x1=at,
                x2=at,
                y1=top + 8,
                y2=bottom,
                stroke=MUTED if share == 1 else LINE,
                stroke_dasharray="" if share == 1 else "2 4",
            )
        )
    for i, (label, found) in enumerate(shapes.items()):
        y = top + 12 + step * (i + 0.5)
        parts.append(word(number(label), 0, y + 5, fill=INK))
        parts.append(tag("line", x1=left, x2=right, y1=y, y2=y, stroke=LINE))
        for n, name in enumerate(names):  # peers first: ours lies on top
            row = found.get(name, {})
            if name != OURS and "share" in row:
                parts.append(_shape(n - 1, left + row["share"] * scale, y))
        parts.append(_disc(left + found[OURS]["share"] * scale, y))
    title = f"Share of a {ceiling} by {heading}"
    return drawing(title, bottom + 4, *parts)


def _cell(row: Row, unit: str) -> str:
    if "missing" in row:
        return "–"
    if "failed" in row:
        return "wrong" if row["failed"].startswith("wrong") else "failed"
    return number(row.get(unit, ""))


def comparison_html(rows: Sequence[Row], key: str, heading: str) -> str:
    """Rows of one kind of case: the drawing, and the numbers beneath.

    Raises:
        LookupError: If a row has no such label, two rows are of one case, or
            the record is no comparison.
    """
    if not all("implementation" in row for row in rows):
        raise LookupError("the record compares no implementations")
    shapes = _by_shape(rows, key)
    names = _implementations(rows)
    unit = "tflop_s" if any("tflop_s" in row for row in rows) else "gb_s"
    called = {"tflop_s": "TFLOP/s", "gb_s": "GB/s"}[unit]
    ceiling = next(n for n in CEILINGS if n in next(iter(shapes.values())))
    memory = any("peak_mib" in row for row in rows)
    peers = [name for name in names if name != OURS]
    head = [
        heading,
        "ms",
        called,
        f"share of {ceiling}",
        "against the best peer",
        "control",
        "error",
        f"error of {peers[0]}" if peers else "",
        *(f"{name}, {called}" for name in [*peers, ceiling]),
    ]
    if memory:
        head += [f"{name}, peak MiB" for name in names]
    body = []
    for label, found in shapes.items():
        ours = found[OURS]
        first = found.get(peers[0], {}) if peers else {}
        best = ours.get("best_peer", "")
        cells = [
            number(label),
            number(ours["ms"]),
            number(ours[unit]),
            f"{ours['share']:.2f}",
            f"{ours['ratio_to_best']:.2f} × {best}" if best else "",
            f"±{ours['control']:.3f}",
            number(ours.get("error", "")),
            number(first.get("error", "")),
            *(_cell(found.get(name, {}), unit) for name in [*peers, ceiling]),
        ]
        if memory:
            cells += [number(found[n].get("peak_mib", "")) for n in names]
        body.append(cells)
    written = "".join(
        "<tr>"
        + "".join(f"<td class=wm-n>{html.escape(c)}</td>" for c in cells)
        + "</tr>"
        for cells in body
    )
    heads = "".join(f"<th class=wm-n>{html.escape(c)}</th>" for c in head)
    return (
        strips(rows, key, heading)
        + '<div class="wm-record-table" tabindex=0 role="group" '
        'aria-label="Measured"><table class="wm-rows"><thead><tr>'
        f"{heads}</tr></thead><tbody>{written}</tbody></table></div>"
        + _silent(rows, key, heading)
    )


def _silent(rows: Sequence[Row], key: str, heading: str) -> str:
    """Peers that were not measured, and why."""
    said: dict[tuple[str, str], list[str]] = {}
    reasons: dict[tuple[str, str], str] = {}
    for row in rows:
        for how in ("missing", "failed"):
            if how in row:
                # the numbers in a reason differ from shape to shape
                who = f"{row['implementation']} {how}"
                kind = who, row[how].partition(":")[0]
                said.setdefault(kind, []).append(number(row[key]))
                reasons.setdefault(kind, row[how])
    if not said:
        return ""
    shapes = len({row[key] for row in rows})
    lines = ""
    for kind, where in said.items():
        who = kind[0]
        if len(where) < shapes:
            who += f" ({heading} {', '.join(where)})"
        lines += f"<li>{html.escape(f'{who}: {reasons[kind]}')}</li>"
    return f'<ul class="wm-record-silent">{lines}</ul>'


def _scores(record: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Worst cases of one record: of each pass and dtype its name and cells."""
    kinds: dict[str, list[Row]] = {}
    for row in record["rows"]:
        if row.get("implementation") == OURS and "share" in row:
            kind = " ".join(str(row[k]) for k in ("pass", "dtype") if k in row)
            kinds.setdefault(kind, []).append(row)
    for kind, rows in kinds.items():
        ratios = [r for r in rows if "ratio_to_best" in r]
        slowest = min(rows, key=lambda r: r["share"])
        errors = [r["error"] for r in rows if "error" in r]
        peer = _score("")
        if ratios:
            worst = min(ratios, key=lambda r: r["ratio_to_best"])
            ratio = f"{worst['ratio_to_best']:.3g} ± {worst['control']:.1g}"
            peer = _score(f"{ratio} × {worst['best_peer']}", _shape_of(worst))
        share = _score(f"{slowest['share']:.3g}", _shape_of(slowest))
        yield kind, peer + share + _score(number(max(errors)) if errors else "")


def _score(says: str, below: str = "", link: str = "") -> str:
    """A cell of the scoreboard, with something in small type below."""
    small = f"<br><small>{html.escape(below)}</small>" if below else ""
    return f"<td>{link}{html.escape(says)}{small}</td>"


def _shape_of(row: Row) -> str:
    """The labels of a case that say its shape."""
    shape = []
    for key, value in row.items():
        if key == "implementation":
            break
        if key not in ("pass", "dtype", "predicted", "sweep"):
            shape.append(f"{key} {number(value)}")
    return ", ".join(shape)


def scoreboard_html(root: Path, titles: Mapping[str, str]) -> str:
    """Every compared kernel in its worst case.

    Args:
        root: The repository, whose ``docs/records`` are read.
        titles: Of topics, by path.
    """
    from warpmap_site.records import load_record

    body = ""
    for file in sorted((root / "docs/records").glob("*/*/*/*.json")):
        name = file.relative_to(root / "docs/records").with_suffix("")
        machine, _, path = name.as_posix().partition("/")
        found = json.loads(file.read_text("utf-8"))
        stale = load_record(root, name.as_posix()).stale
        link = f'<a href="../{path}/">{html.escape(titles[path])}</a>'
        if stale:
            link += ' <span class="wm-record-stale">code has changed</span>'
        measured = _score(found["date"][:10], machine)
        for kind, cells in _scores(found):
            body += f"<tr>{_score('', kind, link)}{cells}{measured}</tr>"
    if not body:
        raise LookupError("no record compares implementations")
    heads = "".join(
        f"<th>{h}</th>"
        for h in (
            "Kernel",
            "Best peer",
            "Ceiling",
            "Error",
            "Measured",
        )
    )
    return (
        '<div class="wm-record wm-scores"><div class="wm-record-table" '
        'tabindex=0 role="group" aria-label="Scoreboard">'
        '<table class="wm-rows"><thead>'
        f"<tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )
