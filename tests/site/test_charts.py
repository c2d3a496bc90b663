"""Charts: where things stand, read back from the SVG that was drawn."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise

import pytest

from warpmap.chart import Axis, Bar, BarChart, Line, LineChart, Point
from warpmap_site.axes import Scale, domain, short, ticks
from warpmap_site.charts import (
    ROW,
    TEXT,
    WIDTH,
    spread,
    svg,
    table,
    text_width,
    wrap,
)

SVG = "{http://www.w3.org/2000/svg}"
RAISED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")


def read(label):
    """The number that a tick's label stands for."""
    power = re.fullmatch(r"(?:([\d.]+)·)?10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)", label)
    if power:
        return float(power[1] or 1) * 10.0 ** int(power[2].translate(RAISED))
    scale = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(label[-1])
    return float(label[:-1]) * scale if scale else float(label)


def parsed(chart):
    return ET.fromstring(svg(chart))


def marked(root, name, tag="text"):
    return [e for e in root.iter(SVG + tag) if e.get("class") == name]


def places(root, axis):
    """Value and place of each tick of an axis."""
    name = f"wm-plot-tick-{axis}"
    shift = TEXT * 0.35 if axis == "y" else 0
    return [
        (read(e.text), float(e.get(axis)) - shift) for e in marked(root, name)
    ]


def drawn_points(root, index=0):
    path = marked(root, "wm-plot-line", "path")[index].get("d")
    return [
        tuple(map(float, pair.split()))
        for pair in re.findall(r"[ML]([^MLh]+)", path)
    ]


def mapping(root, axis, log):
    """From a value to its place, from the axis' first and last tick alone."""
    of = math.log if log else float
    (v0, p0), *_, (v1, p1) = places(root, axis)
    return lambda v: p0 + (of(v) - of(v0)) / (of(v1) - of(v0)) * (p1 - p0)


def box(text):
    """About where a text stands: left, top, right, bottom."""
    wide = text_width(text.text)
    x, y = float(text.get("x")), float(text.get("y"))
    left = x - {"middle": wide / 2, "end": wide}.get(text.get("text-anchor"), 0)
    return left, y - TEXT * 0.8, left + wide, y + TEXT * 0.2


def overlaps(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def lines(n, name="line {}", top=1000):
    points = [
        [(x, top * (i + 1) / n * x / 9) for x in range(10)] for i in range(n)
    ]
    return [Line(name.format(i), p) for i, p in enumerate(points)]


def one_line(points, log="", title="T"):
    x, y = Axis("x", log="x" in log), Axis("y", log="y" in log)
    return LineChart(title, x, y, [Line("a", points)])


CHARTS = {
    "linear": LineChart("T", Axis("x"), Axis("y"), lines(3)),
    "log": LineChart(
        "T",
        Axis("x", log=True),
        Axis("y", log=True),
        [Line("a", [(2.0**i, 3.0**i) for i in range(20)])],
        [Point("here", 64, 729)],
    ),
    "close": LineChart(
        "A rather long title of a chart that needs a second row of words",
        Axis("elements of a row", log=True),
        Axis("GB/s"),
        [
            Line(f"implementation number {i}", [(1, i), (1000, 4000 + i)])
            for i in range(8)
        ],
    ),
    "wide": one_line([(0, -5e6), (3e9, 12345678)]),
    "tiny": one_line([(1e-9, 1e-7), (1e9, 1e20)], log="xy"),
    "narrow": one_line([(3, 31), (4, 32)], log="xy"),
    "constant": one_line([(1, 3), (2, 3)]),
    "one point": one_line([(7, 3)], log="x"),
    "zero": one_line([(0, 0)]),
    "empty": LineChart("T", Axis("x", True), Axis("y"), []),
    "crowd": LineChart(
        "T",
        Axis("x"),
        Axis("y"),
        [Line("", [(0, 0), (10, 10)])],
        [Point(f"point {i}", 5 + i / 3, 5 + i / 3) for i in range(4)],
    ),
    "bars": BarChart(
        "T", Axis("GB/s"), [Bar("a", [("", 3)]), Bar("b", [("", 6)])]
    ),
    "stacked": BarChart(
        "T",
        Axis("GiB"),
        [
            Bar("whole", [("weights", 15), ("gradients", 15), ("Adam", 90)]),
            Bar("sharded", [("weights", 2), ("Adam", 11.25)]),
        ],
    ),
    "no bars": BarChart("T", Axis("GiB"), []),
    "zero bar": BarChart("T", Axis("GiB"), [Bar("a", [("", 0)])]),
}
EVERY = pytest.mark.parametrize("chart", CHARTS.values(), ids=CHARTS)
LINES = pytest.mark.parametrize(
    "chart",
    [c for c in CHARTS.values() if isinstance(c, LineChart) and c.lines],
    ids=[k for k, c in CHARTS.items() if isinstance(c, LineChart) and c.lines],
)


# -- what every chart keeps to -------------------------------------------------


@EVERY
def test_chart_is_an_image_with_a_title(chart):
    root = parsed(chart)
    assert (root.tag, root.get("role")) == (f"{SVG}svg", "img")
    assert root[0].tag == f"{SVG}title"
    assert root[0].text == chart.title
    assert root.get("viewBox").startswith(f"0 0 {WIDTH} ")


@EVERY
def test_colours_are_those_of_the_page(chart):
    for element in parsed(chart).iter():
        style = element.get("style", "")
        for colour in (
            element.get("fill"),
            element.get("stroke"),
            style.removeprefix("fill:"),
        ):
            if colour and colour not in ("none", "currentColor"):
                bare = re.sub(
                    r"var\(--wm-(area|muted|line|card)\)|currentColor|"
                    r"color-mix\(in srgb, | \d+%|, |\)",
                    "",
                    colour,
                )
                assert bare == "", colour
        assert element.get("id") is None


@EVERY
def test_words_lie_inside_and_none_over_another(chart):
    root = parsed(chart)
    height = float(root.get("viewBox").split()[-1])
    boxes = [(e.text, box(e)) for e in root.iter(f"{SVG}text")]
    for text, (left, top, right, bottom) in boxes:
        assert left >= -1, text
        assert right <= WIDTH + 1, text
        assert top >= 0, text
        assert bottom <= height, text
    for (text, a), (other, b) in combinations(boxes, 2):
        assert not overlaps(a, b), (text, other)


def test_text_is_escaped():
    name = "<script>alert('&')</script>"
    chart = LineChart(
        name,
        Axis(name),
        Axis(name),
        [Line(name, [(0, 1), (1, 2)])],
        [Point(name, 1, 2)],
    )
    drawn = svg(chart)
    assert "<script" not in drawn
    assert parsed(chart)[0].text == name
    assert "<script" not in svg(
        BarChart(name, Axis(name), [Bar(name, [(name, 1)])])
    )


# -- axes ----------------------------------------------------------------------


@LINES
def test_ticks_are_few_and_stand_where_their_numbers_belong(chart):
    root = parsed(chart)
    for axis, log in (("x", chart.x.log), ("y", chart.y.log)):
        at = places(root, axis)
        assert 2 <= len(at) <= 8
        of = math.log if log else float
        place = mapping(root, axis, log)
        for value, where in at:
            assert where == pytest.approx(place(value), abs=0.6), (axis, value)
        steps = [of(b[0]) - of(a[0]) for a, b in pairwise(at)]
        assert all(step > 0 for step in steps)
        if not log:
            assert steps == pytest.approx([steps[0]] * len(steps))


@LINES
def test_points_stand_where_the_ticks_say(chart):
    root = parsed(chart)
    to_x, to_y = (
        mapping(root, "x", chart.x.log),
        mapping(root, "y", chart.y.log),
    )
    for i, line in enumerate(chart.lines):
        got = drawn_points(root, i)
        assert len(got) == len(line.points)
        for (x, y), (at_x, at_y) in zip(line.points, got, strict=True):
            assert at_x == pytest.approx(to_x(x), abs=0.6)
            assert at_y == pytest.approx(to_y(y), abs=0.6)
    for point, circle in zip(
        chart.points, marked(root, "wm-plot-point", "circle"), strict=True
    ):
        assert float(circle.get("cx")) == pytest.approx(to_x(point.x), abs=0.6)
        assert float(circle.get("cy")) == pytest.approx(to_y(point.y), abs=0.6)


def test_linear_axis_of_sizes_begins_at_zero():
    chart = one_line([(5, 90), (6, 99)])
    values = [value for value, _ in places(parsed(chart), "y")]
    assert values == [0, 20, 40, 60, 80, 100]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_ticks_are_round_and_within(log, seed):
    low = 10 ** (seed % 9 - 4) * (1 + seed / 7)
    high = low * (1.3 + seed**2)
    found = ticks(low, high, log)
    assert 2 <= len(found) <= 13
    assert found == sorted(set(found))
    for value in found:
        assert low * (1 - 1e-6) <= value <= high * (1 + 1e-6)
    if log and high / low > 1e4:
        assert all(f"{v:.6e}".startswith("1.000000") for v in found)


@pytest.mark.parametrize("log", [False, True])
def test_scale_keeps_the_order(log):
    scale = Scale(1, 500, 20, 400, log)
    at = [scale(v) for v in (1, 1.5, 20, 21, 499, 500)]
    assert at == sorted(at)
    assert (at[0], at[-1]) == (20, 400)


def test_equal_ratios_are_equally_far_on_a_log_axis():
    scale = Scale(1, 1000, 0, 300, True)
    assert [scale(10.0**e) for e in range(4)] == pytest.approx(
        [0, 100, 200, 300]
    )


@pytest.mark.parametrize("values", [[3], [0], [-2], [1e-300], [5, 5], [-1, 4]])
def test_domain_holds_its_values(values):
    low, high = domain(values, log=False, whole=True)
    assert low < high
    assert low <= min(values)
    assert max(values) <= high


@pytest.mark.parametrize(
    "value",
    [0, 1, 0.5, 20, 999, 1000, 1500, 2e7, 3e9, 1e12, 1e15, 2e15, 1e-9, -4000],
)
def test_short_names_are_read_back(value):
    name = short(value)
    assert len(name) <= 6
    sign = -1 if name.startswith("-") else 1
    assert sign * read(name.lstrip("-")) == pytest.approx(value)


# -- lines ---------------------------------------------------------------------


def test_lines_differ_in_colour_or_dash():
    root = parsed(LineChart("T", Axis("x"), Axis("y"), lines(8)))
    looks = {
        (e.get("stroke"), e.get("stroke-dasharray"))
        for e in marked(root, "wm-plot-line", "path")
    }
    assert len(looks) == 8


def test_name_stands_at_the_end_of_its_line_in_its_colour():
    root = parsed(LineChart("T", Axis("x"), Axis("y"), lines(4)))
    names = marked(root, "wm-plot-name")
    assert [e.text for e in names] == [f"line {i}" for i in range(4)]
    for i, (name, path) in enumerate(
        zip(names, marked(root, "wm-plot-line", "path"), strict=True)
    ):
        assert name.get("fill") == path.get("stroke")
        end = drawn_points(root, i)[-1]
        assert float(name.get("x")) > end[0]
        assert abs(float(name.get("y")) - TEXT * 0.35 - end[1]) < 3


def test_what_is_not_finite_is_a_gap():
    points = [(0, 1), (1, math.nan), (2, 3), (3, math.inf), (4, 4), (5, 5)]
    chart = LineChart(
        "T",
        Axis("x"),
        Axis("y"),
        [Line("a", points)],
        [Point("p", math.nan, 2)],
    )
    root = parsed(chart)
    path = marked(root, "wm-plot-line", "path")[0].get("d")
    assert path.count("M") == 3
    assert len(drawn_points(root)) == 4
    assert not marked(root, "wm-plot-point", "circle")
    assert "nan" not in svg(chart)
    assert "inf" not in svg(chart).replace("infer", "")


def test_nothing_to_draw_is_said():
    for chart in (
        one_line([(math.nan, 1)]),
        CHARTS["empty"],
        CHARTS["no bars"],
    ):
        assert "no data" in svg(chart)


@pytest.mark.parametrize("bad", [0, -1])
def test_log_axis_refuses_what_has_no_logarithm(bad):
    chart = LineChart(
        "Speed", Axis("x"), Axis("rate", True), [Line("a", [(1, bad)])]
    )
    with pytest.raises(
        ValueError, match=f"'Speed' .* 'rate'.* 'a' meets at {bad}"
    ):
        svg(chart)


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_spread_labels_stay_in_order_and_apart(count):
    wanted = [100 + (i * 7919 % 13) for i in range(count)]
    heights = [10.0 + i % 3 for i in range(count)]
    placed = spread(wanted, heights, 0, 200)
    tops = sorted(
        (p - h / 2, p + h / 2) for p, h in zip(placed, heights, strict=True)
    )
    assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(tops))
    assert tops[0][0] >= -1e-9
    if sum(heights) <= 200:
        assert tops[-1][1] <= 200 + 1e-9


def test_label_that_is_alone_stays():
    assert spread([50], [10], 0, 100) == [50]


# -- bars ----------------------------------------------------------------------


def test_bars_are_as_long_as_their_values():
    root = parsed(CHARTS["bars"])
    a, b = (
        float(e.get("width")) for e in marked(root, "wm-plot-bar-part", "rect")
    )
    assert b / a == pytest.approx(2, rel=0.02)
    assert [e.text for e in marked(root, "wm-plot-value")] == ["3", "6"]


def test_parts_are_stacked_and_named_once():
    root = parsed(CHARTS["stacked"])
    assert [e.text for e in marked(root, "wm-plot-legend")] == [
        "weights",
        "gradients",
        "Adam",
    ]
    parts = marked(root, "wm-plot-bar-part", "rect")
    first = [(float(e.get("x")), float(e.get("width"))) for e in parts[:3]]
    for (x, width), (after, _) in pairwise(first):
        assert 0 <= after - x - width < 3
    # the same part has the same look in both bars
    assert parts[0].get("style") == parts[3].get("style")
    assert parts[2].get("style") == parts[4].get("style")
    assert [e.text for e in marked(root, "wm-plot-value")] == ["120", "13.25"]


def test_bars_below_zero_are_refused():
    with pytest.raises(ValueError, match="'a' of 'T' is negative: b is -1"):
        svg(BarChart("T", Axis("x"), [Bar("a", [("b", -1)])]))
    with pytest.raises(ValueError, match="begin at zero"):
        svg(BarChart("T", Axis("x", log=True), []))


# -- words and tables ----------------------------------------------------------


def test_wrapped_words_fit_and_none_is_lost():
    text = "Bandwidth of softmax over the length of a row, in bf16"
    rows = wrap(text, 150)
    assert " ".join(rows) == text
    assert all(text_width(row) <= 150 for row in rows)
    assert ROW > TEXT


def test_table_has_every_number():
    chart = LineChart(
        "T",
        Axis("n"),
        Axis("y"),
        [Line("a", [(1, 10), (2, 20)]), Line("b", [(2, 2000.4)])],
        [Point("here", 3, 5)],
    )
    assert table(chart) == [
        ["n", "a", "b", "marked"],
        ["1", "10", "", ""],
        ["2", "20", "2,000", ""],
        ["3", "", "", "here: 5"],
    ]
    assert table(CHARTS["stacked"]) == [
        ["", "weights", "gradients", "Adam"],
        ["whole", "15", "15", "90"],
        ["sharded", "2", "", "11.25"],
    ]
