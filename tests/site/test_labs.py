"""Labs: outputs belong to the code, come again, and are linked both ways."""

import importlib.util
import json
import re
import shutil

import pytest
from building import ROOT, Anatomy

from warpmap_site import labs

LABS = labs.load_labs(ROOT)
STALE = "the code has changed since it was executed: make labs"
each_lab = pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.path)
# Triton exists for Linux only
RUNNABLE = [
    lab
    for lab in LABS
    if "warpmap.kernels" not in lab.file.read_text("utf-8")
    or importlib.util.find_spec("triton")
]
each_runnable_lab = pytest.mark.parametrize(
    "lab", RUNNABLE, ids=lambda lab: lab.path
)


@each_lab
def test_outputs_belong_to_the_code(lab):
    assert lab.digest == labs.code_digest(ROOT, lab), f"{lab.path}: {STALE}"


@each_lab
def test_every_output_is_text_or_a_picture(lab):
    assert lab.outputs
    for output in lab.outputs:
        assert output["output_type"] != "error"
        if output["output_type"] == "stream":
            assert output["name"] == "stdout"
        else:
            kinds = {"text/plain", "image/svg+xml", "image/png"}
            assert set(output["data"]) <= kinds


@each_lab
def test_a_lab_is_small(lab):
    assert lab.file.stat().st_size < 300_000


@pytest.mark.slow
@each_runnable_lab
def test_running_it_again_changes_no_byte(lab):
    assert labs.run(ROOT, lab) == lab.file.read_text("utf-8")


@each_lab
def test_lab_and_topics_are_linked_both_ways(lab, site):
    def links(url):
        return Anatomy(site / url / "index.html").links

    name = lab.file.stem
    assert f"{name}/" in links("labs")
    assert lab.topics
    for topic in lab.topics:
        assert f"../../../labs/{name}/" in links(topic)
        assert f"../../{topic}/" in links(lab.path)


@each_lab
def test_page_is_the_notebook_in_the_look_of_the_site(lab, site):
    html = (site / lab.path / "index.html").read_text("utf-8")
    drawn = [o for o in lab.outputs if "image/svg+xml" in o.get("data", {})]
    assert html.count('<svg class="wm-plot"') == len(drawn) > 0
    assert html.count('class="wm-output"') == len(lab.outputs) - len(drawn)
    for theirs in ("jp-", "mermaid", "mathjax", "<style", "cdn"):
        assert theirs not in html.lower()
    assert len(html) < 200_000


# -- what the hash sees --------------------------------------------------------

CODE = """
from warpmap.area.one import thing
print(open("docs/records/h200/area/one.json").read())
"""


@pytest.fixture
def made_up(tmp_path):
    """A repository with one lab."""
    files = {
        "src/warpmap/__init__.py": "",
        "src/warpmap/area/__init__.py": "",
        "src/warpmap/area/one.py": "def thing():\n    import warpmap.two\n",
        "src/warpmap/area/table.json": "[1]",
        "src/warpmap/two.py": "x = 1\n",
        "src/warpmap/three.py": "x = 1\n",
        "docs/records/h200/area/one.json": "{}",
        "docs/labs/a.ipynb": json.dumps(notebook(CODE)),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


def notebook(code, heading="# A\n\nWhat it is about.", topics=("area/b/one",)):
    about = {"metadata": {}, "source": heading, "cell_type": "markdown"}
    cell = {"metadata": {}, "source": code, "cell_type": "code", "outputs": []}
    return {
        "cells": [about, {**cell, "execution_count": None}],
        "metadata": {"warpmap": {"topics": list(topics)}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def digest(root):
    return labs.code_digest(root, labs.load_labs(root)[0])


@pytest.mark.parametrize(
    ("file", "seen"),
    [
        ("src/warpmap/area/one.py", True),
        ("src/warpmap/area/table.json", True),
        ("src/warpmap/area/__init__.py", True),
        ("src/warpmap/two.py", True),  # imported by what it imports
        ("docs/records/h200/area/one.json", True),
        ("src/warpmap/three.py", False),
    ],
)
def test_hash_sees_what_the_outputs_rest_on(made_up, file, seen):
    before = digest(made_up)
    (made_up / file).write_text("# changed\n", "utf-8")
    assert (digest(made_up) != before) == seen


def test_hash_sees_a_new_record_and_the_code_but_not_text(made_up):
    before = digest(made_up)
    lab = made_up / "docs/labs/a.ipynb"
    lab.write_text(json.dumps(notebook(CODE, "# B\n\nOther words.")))
    assert digest(made_up) == before
    lab.write_text(json.dumps(notebook(CODE + "print(1)\n")))
    assert digest(made_up) != before
    lab.write_text(json.dumps(notebook(CODE)))
    (made_up / "docs/records/h200/area/one.json").unlink()
    assert digest(made_up) != before


@pytest.mark.parametrize(
    "wrong", [{"heading": "# No sentence"}, {"topics": ()}]
)
def test_a_lab_without_sentence_or_topic_is_refused(made_up, wrong):
    lab = made_up / "docs/labs/a.ipynb"
    lab.write_text(json.dumps(notebook(CODE, **wrong)))
    with pytest.raises(LookupError, match=re.escape("docs/labs/a.ipynb")):
        labs.load_labs(made_up)


# -- pages ---------------------------------------------------------------------


def test_page_marks_formulas_but_not_in_code():
    html = labs.page_html(
        "<p>$n$ and <code>$x $y</code></p><p>$$a\nb$$</p><pre>$HOME$</pre>",
        str,
    )
    assert '<span class="arithmatex">\\(n\\)</span>' in html
    assert "<code>$x $y</code>" in html
    assert '<div class="arithmatex">\\[a\nb\\]</div>' in html
    assert "<pre>$HOME$</pre>" in html


def test_page_links_to_pages_and_names_headings():
    html = labs.page_html(
        '<h2 id="A-tree">A <em>tree</em><a class="anchor-link" '
        'href="#A-tree">¶</a></h2><a href="../a/b.md#c">b</a>'
        '<a href="https://x.org/y.md">y</a><style>.x {}</style>',
        lambda link: f"<{link}>",
    )
    assert html == (
        '<h2 id="a-tree">A <em>tree</em></h2><a href="<../a/b.md>#c">b</a>'
        '<a href="https://x.org/y.md">y</a>'
    )


# -- the record ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "lab",
    [lab for lab in RUNNABLE if lab.file.stem == "softmax_to_roofline"],
)
def test_softmax_lab_shows_a_record_where_there_is_one(lab, tmp_path):
    """In a copy, with numbers made up here; none of them is kept."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=IGNORED)
    timed = {"ms": 1.0, "gb_s": 1000.0, "share": 0.25}
    checked = {**timed, "error": 1e-9, "ratio": 2.0}
    results = {  # a row of each kind that the harness writes
        "warpmap": {**checked, "launch": "stream", "ratio_to_best": 2.0},
        "torch": checked,
        "step by step": checked,
        "quack": {"missing": "not installed"},
        "liger": {"failed": "AssertionError"},
        "wrong": {**timed, "failed": "error 1 of the largest value"},
        "copy": timed,
    }
    rows = [
        {
            "pass": direction,
            "dtype": dtype,
            "M": 2**27 // n,
            "N": n,
            "implementation": name,
            **result,
        }
        for direction in ("forward", "backward")
        for dtype, n in (("bf16", 1024), ("bf16", 4096), ("fp32", 4096))
        for name, result in results.items()
    ]
    record = {
        "machine": {"gpu": "Made Up 9000", "torch": "0.0"},
        "date": "2000-01-01T00:00",
        "commit": "none",
        "command": "none",
        "rows": rows,
    }
    where = "docs/records/h200/kernels/normalization/softmax.json"
    (tmp_path / where).parent.mkdir(parents=True)
    (tmp_path / where).write_text(json.dumps(record), "utf-8")
    written = labs.run(tmp_path, lab)
    assert "Made Up 9000" in written
    assert "bf16 step by step" in written
    assert not any(f"bf16 {name}" in written for name in ("quack", "wrong"))
    assert written.count('"image/svg+xml": [') == 4
    assert labs.code_digest(tmp_path, lab) != lab.digest


IGNORED = shutil.ignore_patterns("bundle", "__pycache__", "*.egg-info")
