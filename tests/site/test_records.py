"""Records are written by a benchmark, and shown only while they exist."""

import json
import sys

import pytest
from building import ROOT
from pydantic import BaseModel, ConfigDict, Field

from warpmap_site import harness, records
from warpmap_site.comparisons import CEILINGS, scoreboard_html
from warpmap_site.records import (
    load_record,
    measure,
    record_html,
    run_benchmark,
)

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


COMPARED = """
def row(n, who, **more):
    return {"dtype": "bf16", "N": n, "implementation": who, **more}


def rows():
    found = []
    for n in (1024, 4096):
        found += [
            row(n, "warpmap", ms=0.5, gb_s=3900.0, share=0.975, error=1e-3,
                rounds=25, launch="stream", control=0.004,
                best_peer="quack", ratio_to_best=n / 2048),
            row(n, "torch", ms=1.0, gb_s=1950.0, share=0.49, error=2e-3,
                ratio=2.0),
            row(n, "quack", ms=0.51, gb_s=3800.0, share=0.95, ratio=1.02)
            if n == 1024 else row(n, "quack", failed="ValueError: too <long>"),
            row(n, "gone", missing="not installed"),
            row(n, "copy", ms=0.48, gb_s=4000.0, share=1.0),
        ]
    return found
"""


@pytest.fixture
def compared(measured):
    (measured / f"benchmarks/{TOPIC}.py").write_text(COMPARED)
    forget_benchmarks()
    measure(measured, TOPIC)
    return measured


def test_comparison_shows_every_implementation_and_who_is_silent(compared):
    shown = record_html(compared, f"h200/{TOPIC}\ncompare: N = Columns\nBoth.")
    assert shown.count("<circle") == 3  # ours: twice, and in the legend
    for text in (">1,024<", "0.50 × quack", "2.00 × quack", "±0.004"):
        assert text in shown
    assert "gone missing: not installed" in shown
    assert "quack failed (Columns 4,096): ValueError: too &lt;long&gt;" in shown


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("compare: M = Rows", "no row has M"),
        ("compare: dtype = Dtype", "two rows of warpmap"),
    ],
)
def test_comparison_over_a_wrong_label_is_named(compared, line, says):
    with pytest.raises(LookupError, match=says):
        record_html(compared, f"h200/{TOPIC}\n{line}")


def test_only_comparisons_can_be_compared(measured):
    with pytest.raises(LookupError, match="compares no implementations"):
        record_html(measured, f"h200/{TOPIC}\ncompare: size = N")
    with pytest.raises(LookupError, match="no record compares"):
        scoreboard_html(measured, {TOPIC: "Double"})


def test_scoreboard_shows_the_worst_case(compared):
    shown = scoreboard_html(compared, {TOPIC: "Double"})
    assert f'<a href="../{TOPIC}/">Double</a>' in shown
    assert "0.5 ± 0.004 × quack<br><small>N 1,024</small>" in shown
    assert "2 ±" not in shown
    with (compared / f"benchmarks/{TOPIC}.py").open("a") as code:
        code.write("# another\n")
    again = scoreboard_html(compared, {TOPIC: "Double"})
    assert "code has changed" in again


@pytest.mark.parametrize(("quick", "rounds"), [(True, 7), (False, 25)])
def test_cases_go_to_the_harness(measured, monkeypatch, quick, rounds):
    asked = {}
    monkeypatch.setattr(harness, "compare", lambda c, **k: asked.update(k) or c)
    code = "def cases():\n    return ['a case']\n"
    (measured / f"benchmarks/{TOPIC}.py").write_text(code)
    forget_benchmarks()
    assert run_benchmark(measured, TOPIC, quick) == ["a case"]
    assert asked == {"rounds": rounds}


# The schema of a committed record

Strict = ConfigDict(extra="forbid", strict=True)


class Machine(BaseModel):
    model_config = Strict
    gpu: str = Field(min_length=1)
    python: str
    torch: str
    triton: str
    cuda: str
    driver: str
    # a record from before these were asked for has none
    power_limit: str = Field("700.00 W", pattern=r"^[\d.]+ W$")
    card: str = Field("00000000", pattern="^[0-9a-f]{8}$")


class Clocks(BaseModel):
    model_config = Strict
    before: str
    after: str


class Header(BaseModel):
    model_config = Strict
    date: str = Field(pattern=r"^20\d\d-\d\d-\d\dT\d\d:\d\d\+00:00$")
    commit: str = Field(pattern="^[0-9a-f]{7,40}$")  # nothing uncommitted
    command: str = Field(pattern="^warpmap bench [a-z0-9_/]+$")
    digest: str = Field(pattern="^[0-9a-f]{12}$")
    machine: Machine
    clocks: Clocks | None = None
    peers: dict[str, str] = {}
    rows: list[dict[str, str | int | float | bool]] = Field(min_length=1)


COMMITTED = [
    file.relative_to(ROOT / "docs/records").with_suffix("").as_posix()
    for file in sorted((ROOT / "docs/records").glob("*/*/*/*.json"))
]


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_record_is_whole(name):
    file = ROOT / "docs/records" / f"{name}.json"
    header = Header.model_validate_json(file.read_text("utf-8"))
    folder, _, topic = name.partition("/")
    assert folder == records.folder_of(header.machine.gpu)
    assert header.command == f"warpmap bench {topic}"


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_comparison_keeps_its_promises(name):
    """Of every case: ours, each peer or its reason, the ceiling, in order."""
    found = load_record(ROOT, name).rows
    if not any("best_peer" in row or "share" in row for row in found):
        return
    ours = [i for i, r in enumerate(found) if r["implementation"] == "warpmap"]
    for start, end in zip(ours, [*ours[1:], len(found)], strict=True):
        first, *peers, ceiling = found[start:end]
        assert ceiling["implementation"] in CEILINGS
        assert ceiling["share"] == 1
        assert first["rounds"] >= 7
        assert first["launch"] in ("stream", "graph")
        assert 0 <= first["control"] < 0.5
        assert first["error"] >= 0
        right = [p for p in peers if not {"missing", "failed"} & set(p)]
        best = min((p["ratio"] for p in right), default=None)
        assert first.get("ratio_to_best") == best
        for row in (first, *right):
            assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
            assert row["share"] > 0
