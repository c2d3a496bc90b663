"""Records are written by a benchmark, and shown only while they exist."""

import json
import sys

import pytest

from warpmap_site import records
from warpmap_site.records import load_record, measure, record_html

TOPIC = "kernels/basics/double"
ABOUT = {
    "gpu": "NVIDIA H200",
    "python": "3.12.3",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "cuda": "13.0",
    "driver": "580.1",
}
BENCHMARK = """
def rows():
    return [
        {"size": 1024, "measured_gb_s": 123.456, "kind": "copy"},
        {"size": 4096, "measured_gb_s": 2345.6, "kind": "copy"},
        {"size": 4096, "measured_gb_s": 99.5, "kind": "<b>"},
    ]
"""


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A repository with one measured topic, as if it had a GPU."""
    monkeypatch.setattr(records, "machine", lambda: ABOUT)
    monkeypatch.setenv("WARPMAP_COMMIT", "abc123")
    for file, text in (
        (f"src/warpmap/{TOPIC}.py", "x = 1\n"),
        (f"benchmarks/{TOPIC}.py", BENCHMARK),
    ):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(text)
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget_benchmarks()
    measure(tmp_path, TOPIC)
    yield tmp_path
    forget_benchmarks()


def forget_benchmarks():
    for name in [n for n in sys.modules if n.split(".")[0] == "benchmarks"]:
        del sys.modules[name]


def test_record_carries_machine_commit_and_rows(measured):
    file = measured / "docs/records/h200" / f"{TOPIC}.json"
    written = json.loads(file.read_text())
    assert written["commit"] == "abc123"
    assert written["machine"] == ABOUT
    assert written["command"] == f"warpmap bench {TOPIC}"
    assert [row["size"] for row in written["rows"]] == [1024, 4096, 4096]


@pytest.mark.parametrize(
    "file", [f"src/warpmap/{TOPIC}.py", f"benchmarks/{TOPIC}.py"]
)
def test_record_turns_stale_when_its_code_changes(measured, file):
    assert not load_record(measured, f"h200/{TOPIC}").stale
    with (measured / file).open("a") as code:
        code.write("# another\n")
    assert load_record(measured, f"h200/{TOPIC}").stale


def test_fence_shows_the_chosen_rows_and_where_they_come_from(measured):
    shown = record_html(
        measured,
        f"h200/{TOPIC} kind=copy\n"
        "table: size = Elements, measured_gb_s = GB/s\n"
        "What a copy reaches.",
    )
    assert "<th class=wm-n>Elements</th><th class=wm-n>GB/s</th>" in shown
    assert "<td class=wm-n>4,096</td><td class=wm-n>2,346</td>" in shown
    assert "99.5" not in shown
    assert "What a copy reaches." in shown
    for fact in ("NVIDIA H200", "torch 2.11.0", "abc123", "warpmap bench"):
        assert fact in shown


def test_fence_escapes_what_a_benchmark_wrote(measured):
    shown = record_html(measured, f"h200/{TOPIC}\ntable: kind = Kind\n")
    assert "<b>" not in shown
    assert "&lt;b&gt;" in shown


@pytest.mark.parametrize(
    ("fence", "says"),
    [
        (f"h100/{TOPIC}\ntable: size = N", "there is no record h100"),
        (f"h200/{TOPIC}\ntable: speed = N", "no row has speed"),
        (f"h200/{TOPIC} kind=none\ntable: size = N", "no row of the record"),
        (f"h200/{TOPIC}\ntable: size", "expected 'key = heading'"),
        (f"h200/{TOPIC}\nchart: size", "expected title"),
    ],
)
def test_authors_mistake_is_named(measured, fence, says):
    with pytest.raises(LookupError, match=says):
        record_html(measured, fence)


def test_nothing_is_written_without_a_gpu_or_when_a_check_fails(
    measured, monkeypatch
):
    file = measured / "docs/records/h200" / f"{TOPIC}.json"
    before = file.read_text()
    wrong = "def rows():\n    raise AssertionError('wrong result')\n"
    (measured / f"benchmarks/{TOPIC}.py").write_text(wrong)
    forget_benchmarks()
    with pytest.raises(AssertionError, match="wrong result"):
        measure(measured, TOPIC)
    monkeypatch.setattr(records, "machine", lambda: {**ABOUT, "gpu": ""})
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        measure(measured, TOPIC)
    with pytest.raises(LookupError, match="has no benchmark"):
        measure(measured, "kernels/basics/other")
    assert file.read_text() == before


def test_committed_records_are_whole(pytestconfig):
    root = pytestconfig.rootpath
    for file in (root / "docs/records").glob("*/*/*/*.json"):
        name = file.relative_to(root / "docs/records").with_suffix("")
        record = load_record(root, name.as_posix())
        assert record.rows
        assert record.machine["gpu"]
        assert set(record.machine) >= {"cuda", "driver", "python", "torch"}
