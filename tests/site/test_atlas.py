"""The map: what it computes, and every mistake an author can make."""

import pytest
from made_up import ROOT, large_map, write_repository, write_topic

from warpmap_site.loading import AtlasError, load_atlas

CHAIN = {
    "hardware/gpu/memory": {},
    "kernels/basics/reduce": {"builds_on": "hardware/gpu/memory"},
    "kernels/basics/softmax": {"builds_on": "kernels/basics/reduce"},
    "models/attention/flash": {
        "builds_on": "kernels/basics/softmax, hardware/gpu/memory"
    },
}


@pytest.fixture
def repository(tmp_path):
    write_repository(tmp_path, CHAIN)
    return tmp_path


def paths(topics):
    return [topic.path for topic in topics]


def test_this_repository_has_no_problem():
    assert load_atlas(ROOT).topics


def test_path_holds_everything_before_a_topic_in_a_readable_order(repository):
    atlas = load_atlas(repository)
    flash = atlas.topics["models/attention/flash"]
    assert paths(atlas.path_to(flash)) == list(CHAIN)[:-1]


def test_leads_to_mirrors_builds_on(repository):
    atlas = load_atlas(repository)
    memory = atlas.topics["hardware/gpu/memory"]
    assert paths(atlas.leads_to(memory)) == [
        "kernels/basics/reduce",
        "models/attention/flash",
    ]
    assert paths(atlas.builds_on(memory)) == []


def test_reading_order_respects_every_edge_of_a_large_map(tmp_path):
    write_repository(tmp_path, large_map(290))
    atlas = load_atlas(tmp_path)
    place = {t.path: i for i, t in enumerate(atlas.reading_order)}
    assert len(place) == 290
    edges = [
        (b, t.path) for t in atlas.topics.values() for b in t.meta.builds_on
    ]
    assert len(edges) > 290
    assert all(place[before] < place[after] for before, after in edges)


def test_neighbours_walk_the_reading_order(repository):
    atlas = load_atlas(repository)
    first, second, *_, last = atlas.reading_order
    assert atlas.neighbours(first) == (None, second)
    assert atlas.neighbours(last)[1] is None


SOFTMAX = "docs/kernels/basics/softmax.md"


def replace(old, new):
    def edit(root):
        page = root / SOFTMAX
        text = page.read_text("utf-8")
        assert old in text
        page.write_text(text.replace(old, new), "utf-8")

    return edit


def remove(file):
    return lambda root: (root / file).unlink()


MISTAKES = {
    "missing field": (
        replace("kind: implement\n", ""),
        f"{SOFTMAX}: kind: field required",
        "use one of implement",
    ),
    "unknown field": (
        replace("papers:", "paper:"),
        f"{SOFTMAX}: paper: extra inputs are not permitted",
        "use only title",
    ),
    "wrong value": (
        replace("runs_on: [cpu]", "runs_on: [tpu]"),
        f"{SOFTMAX}: runs_on: input should be",
        "use any of cpu",
    ),
    "no YAML": (
        replace("papers: []", "papers: ["),
        f"{SOFTMAX}: front matter:",
        "mend the YAML",
    ),
    "unknown prerequisite": (
        replace("kernels/basics/reduce]", "kernels/basics/nothing]"),
        f"{SOFTMAX}: builds_on: kernels/basics/nothing does not exist",
        "name a topic that is on the map",
    ),
    "circular prerequisite": (
        replace("kernels/basics/reduce]", "models/attention/flash]"),
        "builds_on: goes round in a circle: ",
        "remove one of these",
    ),
    "unknown paper": (
        replace("papers: []", "papers: [nobody2020nothing]"),
        f"{SOFTMAX}: papers: nobody2020nothing is not in docs/references.bib",
        "add its entry",
    ),
    "page without module": (
        remove("src/warpmap/kernels/basics/softmax.py"),
        f"{SOFTMAX}: file: has no src/warpmap/kernels/basics/softmax.py",
        "add that file",
    ),
    "page without snippet": (
        remove("snippets/kernels/basics/softmax.py"),
        f"{SOFTMAX}: file: has no snippets/kernels/basics/softmax.py",
        "add that file",
    ),
    "page without test": (
        remove("tests/kernels/basics/test_softmax.py"),
        f"{SOFTMAX}: file: has no tests/kernels/basics/test_softmax.py",
        "add that file",
    ),
    "module without page": (
        remove("docs/models/attention/flash.md"),
        "src/warpmap/models/attention/flash.py: file: belongs to no page",
        "add docs/models/attention/flash.md",
    ),
    "page that does not show its module": (
        replace(
            "warpmap.kernels.basics.softmax.double", "warpmap.other.double"
        ),
        f"{SOFTMAX}: page: does not show its code",
        "add a ```source fence",
    ),
    "page that does not show its snippet": (
        replace("snippets/kernels/basics/softmax.py", "snippets/other.py"),
        f"{SOFTMAX}: page: does not show its code",
        "add a ```cell fence",
    ),
    "name that is not snake_case": (
        lambda root: write_topic(root, "kernels/basics/Soft-Max"),
        "docs/kernels/basics/Soft-Max.md: path: is not",
        "rename the file",
    ),
    "section without title": (
        lambda root: write_topic(root, "kernels/new/topic"),
        "docs/kernels/index.md: sections: has no title for kernels/new",
        "add 'new: <title>'",
    ),
    "area without index": (
        remove("docs/models/index.md"),
        "docs/models/index.md: file: is missing",
        "add the page",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named_with_its_mend(repository, mistake):
    make, says, mend = MISTAKES[mistake]
    make(repository)
    with pytest.raises(AtlasError) as caught:
        load_atlas(repository)
    assert says in str(caught.value)
    assert mend in str(caught.value)
