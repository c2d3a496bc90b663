"""Traces: what the build refuses, what it writes, what a reader may ask."""

import html
import json
import re
import sys

import pytest
from building import build
from made_up import write_repository

from warpmap.trace import (
    Arrow,
    Cell,
    Frame,
    Grid,
    Lanes,
    Ring,
    Span,
    Tree,
    TreeNode,
)
from warpmap.training.sharding._ring import ring_trace
from warpmap_site.traces import (
    MOST_FRAMES,
    TraceError,
    check,
    frames,
    frames_json,
    impure_imports,
    in_words,
    replay,
    trace_html,
)

RADIX = "warpmap.inference.kv_cache.radix_attention.radix_trace"
RING = "warpmap.training.sharding._ring.ring_trace"
GRID = Grid([("row", [Cell("a")])])
EMPTY = Tree([])


@pytest.mark.parametrize(
    ("trace", "says"),
    [
        (None, "returned no trace but NoneType"),
        ([1], "returned no trace but list"),
        ([], "recorded no frame"),
        ([Frame("a", GRID)] * (MOST_FRAMES + 1), "recorded 201 frames"),
        ([Frame("a", GRID), Frame("b", EMPTY)], "frame 2 shows Tree after"),
        ([Frame("a", GRID), Frame("b", GRID, GRID)], "shows Grid, Grid after"),
        ([Frame(" ", GRID)], "frame 1 has no caption"),
        ([Frame("a", Grid([]))], "has no rows"),
        ([Frame("a", Grid(GRID.rows, ["x"])), Frame("b", GRID)], ""),
        (
            [Frame("a", Grid([("r", [Cell(), Cell()])], ["x"]))],
            "2 cells under 1 columns",
        ),
        ([Frame("a", Grid([("r", [Cell("a", "red")])]))], "no mark 'red'"),
        (
            [Frame("a", Grid([("r", [Cell(key="k"), Cell(key="k")])]))],
            "key 'k' is used twice",
        ),
        ([Frame("a", Lanes([("l", [Span(2, 1)])], "ms", 4))], "from 2 to 1"),
        ([Frame("a", Lanes([("l", [Span(2, 5)])], "ms", 4))], "from 2 to 5"),
        ([Frame("a", Lanes([], "ms", 0))], "Lanes end at 0"),
        ([Frame("a", Tree([TreeNode("b", "", "a")]))], "before its parent 'a'"),
        ([Frame("a", Tree([TreeNode("b", "")] * 2))], "key 'b' is used twice"),
        ([Frame("a", Ring([("0", [])], [Arrow(0, 1)]))], "touches node 1 of 1"),
    ],
)
def test_what_cannot_be_played_is_refused(trace, says):
    if not says:
        assert check("f", trace) == trace
        return
    with pytest.raises(TraceError, match=re.escape(says)):
        check("f", trace)


def test_data_leaves_out_what_is_empty():
    lanes = Lanes([("GPU", [Span(0, 0.5, mark="on")])], "ms", 2.0, now=1)
    tree = Tree([TreeNode("k", "t"), TreeNode("l", "u", "k", "new", "n")])
    ring = Ring([("0", [Cell("a"), Cell(key="c")])], [Arrow(0, 0)])
    assert [p for f in frames([
        Frame("a", lanes, tree), Frame("b", ring, Grid(GRID.rows, ["x"])),
    ]) for p in f["pictures"]] == [
        {
            "form": "lanes",
            "lanes": [["GPU", [[0, 0.5, "", "on"]]]],
            "unit": "ms",
            "end": 2,
            "now": 1,
        },
        {"form": "tree", "nodes": [["k", "t"], ["l", "u", "k", "new", "n"]]},
        {
            "form": "ring",
            "nodes": [["0", ["a", ["", "", "c"]]]],
            "arrows": [[0, 0, "", "on"]],
        },
        {"form": "grid", "rows": [["row", ["a"]]], "columns": ["x"]},
    ]  # fmt: skip


def test_a_caption_cannot_end_the_script():
    trace = [Frame("</script><b>", GRID)]
    assert "<" not in frames_json(trace)
    assert json.loads(frames_json(trace)) == frames(trace)


def test_every_form_can_be_said_in_words():
    tree = Tree([TreeNode("r", "root"), TreeNode("l", "x", "r", "gone", "n")])
    assert in_words(tree) == ["root", "– x [n] (gone)"]
    ring = Ring([("a", [Cell("1")]), ("b", [])], [Arrow(0, 1, "m")])
    assert in_words(ring) == ["a: 1", "b: –", "a → b: m"]


@pytest.mark.parametrize("name", [RADIX, RING])
def test_the_page_holds_every_step_without_a_script(name):
    figure = trace_html(f"{name}\nWatch <this>.")
    data = re.search(r'wm-trace-data">(.*?)</script>', figure)[1]
    shown = json.loads(data)
    assert shown == replay(name, {})["frames"]
    rows = re.findall(r"<tr><td>(\d+)</td><td>(.*?)</td><td>(.*?)<", figure)
    assert [int(number) for number, _, _ in rows] == list(
        range(1, len(shown) + 1)
    )
    assert [html.unescape(caption) for _, caption, _ in rows] == [
        frame["caption"] for frame in shown
    ]
    assert "Watch &lt;this&gt;." in figure


def test_replay_takes_what_a_reader_wrote():
    got = replay(RING, {"ranks": " 3 ", "elements": "3"})
    assert got["frames"] == frames(ring_trace(ranks=3, elements=3))
    assert len(got["words"]) == len(got["frames"])
    json.dumps(got)


@pytest.mark.parametrize(
    ("given", "field", "says"),
    [
        ({"ranks": "x"}, "ranks", "must be a whole number, got 'x'"),
        ({"ranks": "99"}, "ranks", "ranks must be 2 to 6, got 99"),
        ({"elements": "0"}, "elements", "elements must be 1 to 8, got 0"),
    ],
)
def test_bad_input_names_its_field(given, field, says):
    answer = replay(RING, given)
    assert answer["field"] == field
    assert says in answer["error"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that a fence can name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def written(text):
        (tmp_path / "made_up_trace.py").write_text(text)
        sys.modules.pop("made_up_trace", None)
        return "made_up_trace.f"

    yield written
    sys.modules.pop("made_up_trace", None)


DOC = '    """F.\n\n    Args:\n        n: N.\n    """\n'
HEAD = "from warpmap.trace import Cell, Frame, Grid, Trace\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no f"),
        (f"def f(n: int) -> list:\n{DOC}", "n has no default"),
        (f"def f(n: list = 1) -> list:\n{DOC}", "n is annotated"),
        ("def f(n: int = 1) -> list:\n    '''F.'''\n", "no entry in the doc"),
        (f"def f(n: int = 1) -> list:\n{DOC}    return 5\n", "but int"),
        (
            f"def f(n: int = 1) -> list:\n{DOC}    raise ValueError('n?')\n",
            "refuses its own defaults: n?",
        ),
        ("import numpy\n", "imports numpy, which no browser has"),
        (
            "from warpmap.training.sharding import collective_operations\n",
            "collective_operations.py imports torch",
        ),
    ],
)
def test_authors_mistake_is_named(module, text, says):
    name = module(HEAD + text)
    with pytest.raises(LookupError, match=re.escape(says)):
        trace_html(f"{name}\nWatch.")


def test_fence_needs_a_name_and_a_sentence():
    with pytest.raises(TraceError, match="is no dotted name"):
        trace_html("radix_trace\nWatch.")
    with pytest.raises(TraceError, match="says nothing"):
        trace_html(RADIX)
    with pytest.raises(LookupError, match=r"warpmap\.nowhere"):
        trace_html("warpmap.nowhere.f\nWatch.")


def test_a_function_that_does_too_much_is_refused(module):
    name = module(
        f"{HEAD}def f(n: int = 1) -> Trace:\n{DOC}"
        "    return [Frame('a', Grid([('r', [Cell()])]))] * n\n"
    )
    assert 'class="wm-trace"' in trace_html(f"{name}\nWatch.")
    assert "ask for less" in replay(name, {"n": "201"})["error"]


def test_what_runs_later_does_not_count_as_an_import(module):
    module("import math\n\ndef f():\n    import numpy\n")
    assert impure_imports("made_up_trace") == []


@pytest.mark.slow
def test_fence_fails_the_build_by_name(tmp_path):
    path = "kernels/basics/softmax"
    write_repository(tmp_path, {path: {}})
    page = tmp_path / f"docs/{path}.md"
    dotted = "warpmap.kernels.basics.softmax.double"
    text = page.read_text("utf-8")
    page.write_text(
        text.replace("## Try it", f"```trace\n{dotted}\nW.\n```\n\n## Try it")
    )
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "x has no default" in done.stderr
