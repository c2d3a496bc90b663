"""The site builds strictly, holds no dead link, and refuses what is wrong."""

import json

import pytest
from building import Anatomy, build, dead_links
from made_up import write_repository


@pytest.mark.slow
def test_no_dead_link_or_anchor(site):
    assert dead_links(site) == []


def test_a_dead_link_would_be_found(tmp_path):
    (tmp_path / "index.html").write_text(
        '<a href="there/">a</a><a href="#nowhere">b</a>'
        '<a id="x" href="#x">c</a>'
    )
    assert dead_links(tmp_path) == [
        "/index.html -> #nowhere",
        "/index.html -> there/",
    ]


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        for address in Anatomy(page).loads:
            assert not address.startswith(("http:", "https:", "//")), page


def test_search_knows_titles_aliases_and_symbols(site):
    index = (site / "search/search_index.json").read_text("utf-8")
    texts = [
        (entry["location"], entry["title"] + entry["text"])
        for entry in json.loads(index)["docs"]
    ]

    def places(words):
        return {where.split("#")[0] for where, text in texts if words in text}

    softmax = "kernels/normalization/softmax/"
    assert softmax in places("Softmax")
    assert softmax in places("softargmax")
    assert f"reference/{softmax}" in places("softmax_reference")


@pytest.mark.slow
def test_title_may_hold_quotes_and_a_colon(tmp_path):
    title = json.dumps('A GPU\'s memory: "fast"')  # JSON is YAML
    topics = {"kernels/basics/softmax": {"title": title}}
    write_repository(tmp_path, topics)
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert dead_links(tmp_path / "site") == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("softmax.double\n", "softmax.triple\n", "defines double"),
        (
            "softmax.double\n",
            "softmax.double\nwarpmap.kernels.basics.other.double\n",
            "not of one module",
        ),
        (
            "softmax.double\n",
            "softmax.double\nwarpmap.no.x\n",
            "there is no such module",
        ),
        ("matters.\n", "matters, see [this](gone.md).\n", "gone.md"),
        ("matters.\n", "matters, see [this](#gone).\n", "#gone"),
        (
            "matters.\n",
            "matters.\n\n```figure\ngone.svg\nCaption.\n```\n",
            "gone.svg",
        ),
        ("kind: implement", "kind: poem", "softmax.md: kind:"),
    ],
)
def test_author_mistake_fails_the_build(tmp_path, old, new, says):
    path = "kernels/basics/softmax"
    write_repository(tmp_path, {path: {}, "kernels/basics/other": {}})
    page = tmp_path / f"docs/{path}.md"
    text = page.read_text("utf-8")
    assert old in text
    page.write_text(text.replace(old, new, 1), "utf-8")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert says in done.stderr
