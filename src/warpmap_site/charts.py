"""Charts as SVG: lines over one quantity, and horizontal bars.

The build and the reader's browser draw with the same code, so only the
standard library is imported. Sizes are in units of a drawing 480 wide, which a
phone shows at about 340 pixels and a desktop at 600.
"""

import html
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from warpmap.chart import BarChart, Chart, LineChart, Point
from warpmap_site.axes import Scale, domain, short

WIDTH = 480
TEXT = 15  # size of all words, and ROW from one row of them to the next
ROW = 19
GAP = 8
LABELS_WIDE = 128  # the most that names at the ends of lines may take

AREA = "var(--wm-area)"
INK = "currentColor"
MUTED = "var(--wm-muted)"
LINE = "var(--wm-line)"
GROUND = "var(--wm-card)"

LINES = [
    (AREA, ""),
    (INK, "7 4"),
    (MUTED, ""),
    (AREA, "2 4"),
    (INK, ""),
    (MUTED, "7 4"),
    (AREA, "9 4 2 4"),
    (INK, "2 4"),
]
"""Colour and dash of each line, in their order."""

PARTS = [
    f"color-mix(in srgb, {colour} {share}%, {GROUND})"
    for colour, share in (
        (AREA, 100),
        (AREA, 55),
        (INK, 70),
        (AREA, 25),
        (INK, 40),
        (INK, 18),
    )
]
"""Fill of each part of a bar, in their order."""


def number(value: object) -> str:
    """A value as tables print it: numbers to four figures.

    Examples:
        >>> number(0.123456), number(12345.678), number(1 << 20), number("x")
        ('0.1235', '12,346', '1,048,576', 'x')
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**18 else f"{value:.4g}"
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def svg(chart: Chart) -> str:
    """A chart as an SVG that takes its colours from the page.

    Args:
        chart: What to draw. Points that are not finite are left out, as a gap.

    Returns:
        One ``<svg>``, well-formed XML, without ids.

    Raises:
        ValueError: If a log axis is given zero or less, or a bar is negative.
    """
    if isinstance(chart, BarChart):
        return _bars(chart)
    return _lines(chart)


def table(chart: Chart) -> list[list[str]]:
    """The numbers of a chart: rows of texts, of which the first is the head."""
    if isinstance(chart, BarChart):
        parts = list(dict.fromkeys(n for b in chart.bars for n, _ in b.parts))
        rows = [["", *(name or chart.x.label for name in parts)]]
        for bar in chart.bars:
            held = dict(bar.parts)
            cells = [number(held[n]) if n in held else "" for n in parts]
            rows.append([bar.name, *cells])
        return rows
    rows = [[chart.x.label, *(line.name for line in chart.lines)]]
    if chart.points:
        rows[0].append("marked")
    columns = [dict(line.points) for line in chart.lines]
    marked: dict[float, str] = {}
    for point in chart.points:
        also = f"{marked[point.x]}, " if point.x in marked else ""
        marked[point.x] = f"{also}{point.name}: {number(point.y)}"
    for x in sorted({x for column in columns for x in column} | set(marked)):
        cells = [number(c[x]) if x in c else "" for c in columns]
        if chart.points:
            cells.append(marked.get(x, ""))
        rows.append([number(x), *cells])
    return rows


# -- SVG -----------------------------------------------------------------------


def tag(name: str, content: str = "", **attributes: object) -> str:
    """An element; ``font_size`` becomes ``font-size``, ``class_`` ``class``."""
    written = ""
    for key, value in attributes.items():
        text = _round(value) if isinstance(value, float) else str(value)
        if text:
            key = key.strip("_").replace("_", "-")
            written += f' {key}="{html.escape(text)}"'
    if content:
        return f"<{name}{written}>{content}</{name}>"
    return f"<{name}{written}/>"


def _round(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def word(text: str, x: float, y: float, **attributes: object) -> str:
    """A text that begins at ``x``, its baseline at ``y``."""
    shown = {"fill": MUTED, **attributes}
    return tag("text", html.escape(text), x=float(x), y=float(y), **shown)


def drawing(title: str, height: float, *parts: str) -> str:
    """A drawing ``WIDTH`` wide, with a title for those who cannot see it."""
    return (
        f'<svg class="wm-plot" xmlns="http://www.w3.org/2000/svg" role="img" '
        f'viewBox="0 0 {WIDTH} {_round(height)}" font-family="inherit" '
        f'font-size="{TEXT}"><title>{html.escape(title)}</title>'
        f"{''.join(parts)}</svg>"
    )


def text_width(text: str) -> float:
    """About how wide a text is, rather too much than too little."""
    wide = dict.fromkeys(" .,:;'|!()[]ijltf", 0.34) | dict.fromkeys(
        "mwMW@%", 0.92
    )
    total = 0.0
    for c in text:
        if ord(c) > 0x2E80:
            total += 1.05
        else:
            total += wide.get(c, 0.72 if c.isupper() else 0.6)
    return total * TEXT


def wrap(text: str, width: float) -> list[str]:
    """A text in rows at most so wide, where its words allow it."""
    rows: list[str] = []
    for part in text.split():
        if rows and text_width(f"{rows[-1]} {part}") <= width:
            rows[-1] += f" {part}"
        else:
            rows.append(part)
    return rows


def _title(title: str) -> tuple[str, float]:
    """The visible title, and where it ends."""
    rows = wrap(title, WIDTH)
    words = "".join(
        word(row, 0, ROW * (i + 1) - 4, fill=INK, font_weight=600)
        for i, row in enumerate(rows)
    )
    return words, ROW * len(rows)


def _finite(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _check_log(chart: LineChart) -> None:
    named = [
        *((line.name, _finite(line.points)) for line in chart.lines),
        *((p.name, _finite([(p.x, p.y)])) for p in chart.points),
    ]
    for name, points in named:
        for at, axis in enumerate((chart.x, chart.y)):
            least = min((p[at] for p in points), default=1)
            if axis.log and least <= 0:
                raise ValueError(
                    f"the chart {chart.title!r} has a log axis "
                    f"{axis.label!r}, which {name!r} meets at {least:g}"
                )


# -- lines ---------------------------------------------------------------------


def spread(
    wanted: Sequence[float], heights: Sequence[float], low: float, high: float
) -> list[float]:
    """Middles of labels near where they want to be, none over another.

    Args:
        wanted: Where each would be if it were alone.
        heights: How much room each needs.
        low: Where the first may begin.
        high: Where the last must end, if there is room for all.

    Examples:
        >>> spread([10, 12, 50], [10, 10, 10], 0, 100)
        [10.0, 20.0, 50.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], i))
    placed = [0.0] * len(wanted)
    end = low
    for i in order:
        placed[i] = max(float(wanted[i]), end + heights[i] / 2)
        end = placed[i] + heights[i] / 2
    end = high
    for i in reversed(order):
        placed[i] = min(placed[i], end - heights[i] / 2)
        end = placed[i] - heights[i] / 2
    if order and end < low:  # too many: from the top, over the end
        placed = [p + low - end for p in placed]
    return placed


def _lines(chart: LineChart) -> str:
    _check_log(chart)
    data = [_finite(line.points) for line in chart.lines]
    marked = [p for p in chart.points if _finite([(p.x, p.y)])]
    every = [p for points in data for p in points]
    every += [(p.x, p.y) for p in marked]
    named = [
        (i, wrap(line.name, LABELS_WIDE))
        for i, line in enumerate(chart.lines)
        if line.name and data[i]
    ]
    label_room = max(
        (text_width(row) + 2 * GAP for _, rows in named for row in rows),
        default=12.0,
    )
    heights = [ROW * len(rows) + 3.0 for _, rows in named]

    title, top = _title(chart.title)
    top += ROW + 12
    y_low, y_high = domain([y for _, y in every], chart.y.log, whole=True)
    x_low, x_high = domain([x for x, _ in every], chart.x.log, whole=False)
    bottom = top + max(205.0, sum(heights))
    y = Scale(y_low, y_high, bottom, top, chart.y.log)
    left = max(text_width(short(t)) for t in y.ticks) + GAP
    x = Scale(x_low, x_high, left, WIDTH - label_room, chart.x.log)
    height = bottom + 2 * ROW + 12

    parts = [
        title,
        word(chart.y.label, 0, top - 14, class_="wm-plot-axis"),
        word(
            chart.x.label,
            x.end,
            height - 6,
            class_="wm-plot-axis",
            text_anchor="end",
        ),
        _grid(x, y),
    ]
    if not every:
        middle = (x.start + x.end) / 2, (y.start + y.end) / 2
        parts.append(word("no data", *middle, text_anchor="middle"))
        return drawing(chart.title, height, *parts)

    for i, line in enumerate(chart.lines):
        colour, dash = LINES[i % len(LINES)]
        parts.append(
            tag(
                "path",
                class_="wm-plot-line",
                d=_path(line.points, x, y),
                fill="none",
                stroke=colour,
                stroke_width=2.4,
                stroke_dasharray=dash,
                stroke_linejoin="round",
                stroke_linecap="round",
            )
        )
    ends = [data[i][-1] for i, _ in named]
    wanted = [y(end[1]) for end in ends]
    places = spread(wanted, heights, top - ROW / 2, bottom + ROW / 2)
    for (i, rows), end, place in zip(named, ends, places, strict=True):
        colour, _ = LINES[i % len(LINES)]
        from_x, from_y = x(end[0]), y(end[1])
        to_x = x.end + GAP
        if abs(place - from_y) > 4 or x.end - from_x > 4:
            parts.append(
                tag(
                    "path",
                    d=f"M{_round(from_x)} {_round(from_y)}"
                    f"L{_round(to_x)} {_round(place)}",
                    fill="none",
                    stroke=LINE,
                    stroke_width=1.2,
                )
            )
        first = place - ROW * (len(rows) - 1) / 2 + TEXT * 0.35
        parts += [
            word(
                row,
                to_x + 3,
                first + ROW * n,
                fill=colour,
                class_="wm-plot-name",
                font_weight=600,
            )
            for n, row in enumerate(rows)
        ]
    parts += _marks(chart, marked, x, y)
    return drawing(chart.title, height, *parts)


def _grid(x: Scale, y: Scale) -> str:
    rules, words = [], []
    for tick in y.ticks:
        at = y(tick)
        rules.append(f"M{_round(x.start)} {_round(at)}H{_round(x.end)}")
        words.append(
            word(
                short(tick),
                x.start - GAP + 1,
                at + TEXT * 0.35,
                class_="wm-plot-tick-y",
                text_anchor="end",
            )
        )
    taken = -math.inf
    for tick in x.ticks:
        at = x(tick)
        rules.append(f"M{_round(at)} {_round(y.end)}V{_round(y.start + 5)}")
        half = text_width(short(tick)) / 2
        middle = min(at, WIDTH - half)
        if middle - half < taken:
            continue  # would touch the one before
        taken = middle + half + GAP
        words.append(
            word(
                short(tick),
                middle,
                y.start + ROW + 3,
                class_="wm-plot-tick-x",
                text_anchor="middle",
            )
        )
    base = f"M{_round(x.start)} {_round(y.start)}H{_round(x.end)}"
    return (
        tag("path", class_="wm-plot-grid", d="".join(rules), stroke=LINE)
        + tag("path", d=base, stroke=MUTED)
        + "".join(words)
    )


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    drawn, pen = [], "M"
    for at_x, at_y in points:
        if math.isfinite(at_x) and math.isfinite(at_y):
            drawn.append(f"{pen}{_round(x(at_x))} {_round(y(at_y))}")
            pen = "L"
        else:
            pen = "M"
    if len(drawn) == 1:
        drawn.append("h0.01")  # a dot, by the round end of the line
    return "".join(drawn)


Box = tuple[float, float, float, float]


def _covers(box: Box, other: Box) -> bool:
    return (
        box[0] < other[2]
        and other[0] < box[2]
        and box[1] < other[3]
        and other[1] < box[3]
    )


def _marks(
    chart: LineChart, marked: Sequence[Point], x: Scale, y: Scale
) -> list[str]:
    """Named points, each name where it hides least."""
    curve: list[tuple[float, float]] = []
    for line in chart.lines:
        places = [(x(a), y(b)) for a, b in _finite(line.points)]
        for (x0, y0), (x1, y1) in pairwise(places):
            n = max(1, int(math.hypot(x1 - x0, y1 - y0) / 6))
            curve += [
                (x0 + (x1 - x0) * i / n, y0 + (y1 - y0) * i / n)
                for i in range(n + 1)
            ]
    dots = [(x(p.x), y(p.y)) for p in marked]
    taken: list[Box] = [(a - 7, b - 7, a + 7, b + 7) for a, b in dots]
    circles, names = [], []
    for point, (at_x, at_y) in zip(marked, dots, strict=True):
        circles.append(
            tag(
                "circle",
                class_="wm-plot-point",
                cx=at_x,
                cy=at_y,
                r=5.5,
                fill=AREA,
                stroke=GROUND,
                stroke_width=2,
            )
        )
        if not point.name:
            continue
        wide = text_width(point.name)
        best: tuple[float, Box] | None = None
        for down in (-14.0, 16.0, 0.0, -32.0, 34.0):
            for move in (0.0, -wide / 2, -wide):
                shift = 10.0 if move == 0 else (-10.0 if move == -wide else 0.0)
                if down == 0 and move == -wide / 2:
                    continue
                start = at_x + move + shift
                middle = at_y + down
                box = (start, middle - ROW / 2, start + wide, middle + ROW / 2)
                cost = abs(down) / 100
                cost += 100 * sum(_covers(box, other) for other in taken)
                cost += sum(
                    box[0] - 3 < a < box[2] + 3 and box[1] - 2 < b < box[3] + 2
                    for a, b in curve
                )
                cost += 50 * (box[0] < x.start + 2) + 50 * (box[2] > x.end)
                cost += 50 * (box[1] < y.end - 6) + 50 * (box[3] > y.start)
                if best is None or cost < best[0]:
                    best = (cost, box)
        assert best is not None
        box = best[1]
        start = min(max(box[0], 0.0), WIDTH - wide)
        taken.append(box)
        names.append(
            word(
                point.name,
                start,
                (box[1] + box[3]) / 2 + TEXT * 0.35,
                class_="wm-plot-point-name",
                fill=INK,
                font_weight=600,
                stroke=GROUND,
                stroke_width=4,
                stroke_linejoin="round",
                paint_order="stroke",
            )
        )
    return circles + names


# -- bars ----------------------------------------------------------------------


def _bars(chart: BarChart) -> str:
    if chart.x.log:
        raise ValueError(
            f"the bars of {chart.title!r} begin at zero: no log axis"
        )
    for bar in chart.bars:
        for part, value in bar.parts:
            if value < 0:
                raise ValueError(
                    f"the bar {bar.name!r} of {chart.title!r} is negative: "
                    f"{part or 'value'} is {value:g}"
                )
    title, top = _title(chart.title)
    parts = [title]
    for row in wrap(chart.x.label, WIDTH):
        parts.append(word(row, 0, top + ROW - 4, class_="wm-plot-axis"))
        top += ROW
    legend, top = _legend(chart, top)
    parts += legend
    totals = [
        math.fsum(v for _, v in bar.parts if math.isfinite(v))
        for bar in chart.bars
    ]
    if not totals:
        parts.append(word("no data", 0, top + ROW))
        return drawing(chart.title, top + 2 * ROW, *parts)
    known = [
        not bar.parts or any(math.isfinite(v) for _, v in bar.parts)
        for bar in chart.bars
    ]
    texts = [
        number(t) if k else "no data"
        for t, k in zip(totals, known, strict=True)
    ]
    room = max(text_width(text) for text in texts) + 2 * GAP
    scale = Scale(0, max(totals) or 1, 0, WIDTH - room, False)
    order = _part_names(chart)
    for bar, total, text in zip(chart.bars, totals, texts, strict=True):
        top += 10
        for row in wrap(bar.name, WIDTH):
            top += ROW
            parts.append(word(row, 0, top - 4, fill=INK, class_="wm-plot-name"))
        start = 0.0
        for name, value in bar.parts:
            if math.isfinite(value) and value > 0:
                end = start + scale(value)
                parts.append(
                    tag(
                        "rect",
                        class_="wm-plot-bar-part",
                        x=start,
                        y=top + 2.0,
                        width=max(
                            end - start - (1.5 if start or end else 0), 0.5
                        ),
                        height=16.0,
                        rx=1.5,
                        style=f"fill:{PARTS[order.index(name) % len(PARTS)]}",
                    )
                )
                start = end
        parts.append(
            word(
                text,
                scale(total) + GAP - 2,
                top + 10 + TEXT * 0.35,
                class_="wm-plot-value",
                fill=INK,
                font_weight=600,
            )
        )
        top += 20
    foot = top + 4
    first = foot - sum(30 + ROW * len(wrap(b.name, WIDTH)) for b in chart.bars)
    rule = f"M0 {_round(first + 4)}V{_round(foot)}"
    parts.append(tag("path", d=rule, stroke=LINE))
    return drawing(chart.title, foot + 2, *parts)


def _part_names(chart: BarChart) -> list[str]:
    return list(dict.fromkeys(n for bar in chart.bars for n, _ in bar.parts))


def _legend(chart: BarChart, top: float) -> tuple[list[str], float]:
    names = _part_names(chart)
    if len(names) < 2:
        return [], top
    drawn, at = [], 0.0
    top += 8
    for i, name in enumerate(names):
        wide = 20 + text_width(name) + 14
        if at and at + wide > WIDTH:
            at, top = 0.0, top + ROW + 2
        drawn.append(
            tag(
                "rect",
                x=at,
                y=top + 3.0,
                width=13.0,
                height=13.0,
                rx=2.0,
                style=f"fill:{PARTS[i % len(PARTS)]}",
            )
        )
        drawn.append(
            word(name, at + 20, top + TEXT, class_="wm-plot-legend", fill=INK)
        )
        at += wide
    return drawn, top + ROW
