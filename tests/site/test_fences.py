"""The fences: code by symbol, snippets as cells, figures."""

import json

import pytest
import report
from made_up import write_repository

from warpmap_site.fences import Fences
from warpmap_site.references import load_references, render
from warpmap_site.reports import last_passes, passed_digest
from warpmap_site.sources import Files, find_symbol

PATH = "kernels/basics/softmax"
DOTTED = "warpmap.kernels.basics.softmax"


@pytest.fixture
def repository(tmp_path):
    write_repository(tmp_path, {PATH: {}})
    return tmp_path


def test_symbol_comes_with_its_decorators(repository):
    module = Files(repository, PATH).module
    module.write_text(
        "import x\n\n\n@x.jit\n@x.fast\ndef f():\n    pass\n\n\nA = 1\n"
    )
    symbol = find_symbol(repository, f"{DOTTED}.f")
    assert (symbol.first_line, symbol.last_line) == (4, 7)
    assert symbol.code == "@x.jit\n@x.fast\ndef f():\n    pass"
    assert find_symbol(repository, f"{DOTTED}.A").code == "A = 1"


def test_docstring_is_cut_to_its_first_paragraph(repository):
    module = Files(repository, PATH).module
    module.write_text(
        'class A:\n    """One.\n\n    More.\n    """\n\n'
        '    def f(self):\n        """Two\n        lines.\n\n        More."""\n'
        "        return 1\n"
    )
    assert find_symbol(repository, f"{DOTTED}.A").code == (
        'class A:\n    """One."""\n\n'
        '    def f(self):\n        """Two\n        lines."""\n'
        "        return 1"
    )


def test_method_is_shown_without_its_indent(repository):
    module = Files(repository, PATH).module
    module.write_text(
        "class A:\n    x: int = 1\n\n    @property\n    def f(self):\n"
        "        return 1\n"
    )
    method = find_symbol(repository, f"{DOTTED}.A.f")
    assert (method.first_line, method.last_line) == (4, 6)
    assert method.code == "@property\ndef f(self):\n    return 1"
    with pytest.raises(LookupError, match="defines x, f"):
        find_symbol(repository, f"{DOTTED}.A.g")
    with pytest.raises(LookupError, match="no such module"):
        find_symbol(repository, "nowhere.f")


CUDA = """#include <cuda_fp16.h>

// Doubles a number.
__device__ float twice(float x) {
  return 2 * x;
}

__device__ float thrice(float x) { return 3 * x; }

// Copies,
// a number a thread.
extern "C" __global__ void copy(
    const float* x, float* y, long long n) {
  for (long long i = threadIdx.x; i < n; i += blockDim.x) {
    y[i] = twice(x[i]);
  }
}

extern "C" __global__ void __launch_bounds__(256)
    bounded(float* y) {
  y[0] = twice(1);
}
"""


def test_cuda_beside_a_module_is_shown_with_its_comment(repository):
    cuda = Files(repository, PATH).cuda
    cuda.write_text(CUDA)
    symbol = find_symbol(repository, f"{DOTTED}.cu:copy")
    assert (symbol.first_line, symbol.last_line) == (10, 17)
    assert symbol.code.startswith("// Copies,\n// a number a thread.\nextern")
    assert symbol.code.endswith("  }\n}")
    bounded = find_symbol(repository, f"{DOTTED}.cu:bounded")
    assert bounded.code.count("\n") == 3
    one_line = find_symbol(repository, f"{DOTTED}.cu:thrice")
    assert one_line.code == "__device__ float thrice(float x) { return 3 * x; }"
    shown = Fences(repository).source(f"{DOTTED}.cu:twice")
    assert f"src/warpmap/{PATH}.cu, lines 3 to 6" in shown
    assert "href" not in shown  # the reference does not have it
    with pytest.raises(
        LookupError, match="defines twice, thrice, copy, bounded"
    ):
        find_symbol(repository, f"{DOTTED}.cu:other")
    with pytest.raises(LookupError, match="no such file"):
        find_symbol(repository, "warpmap.nowhere.cu:copy")


def test_results_turn_stale_when_the_cuda_changes(repository):
    before = passed_digest(repository, PATH)
    Files(repository, PATH).cuda.write_text(CUDA)
    assert passed_digest(repository, PATH) != before


def test_results_turn_stale_when_a_private_module_changes(repository):
    files = Files(repository, PATH)
    section = PATH.rpartition("/")[0].replace("/", ".")
    private = files.module.with_name("_shared.py")
    private.write_text("FEW = 3\n")
    alone = passed_digest(repository, PATH)
    files.module.write_text(
        f"from warpmap.{section}._shared import FEW\n"
        + files.module.read_text("utf-8")
    )
    before = passed_digest(repository, PATH)
    assert before != alone
    private.write_text("FEW = 4\n")
    assert passed_digest(repository, PATH) != before


def test_source_links_to_the_repository_or_the_reference(repository):
    inside = Fences(repository).source(f"{DOTTED}.double")
    assert f'href="../../../reference/{PATH}/#{DOTTED}.double"' in inside
    outside = Fences(repository, "https://host/blob/1").source(
        f"{DOTTED}.double"
    )
    assert f'href="https://host/blob/1/src/warpmap/{PATH}.py#L4-L11"' in outside


def test_cell_shows_code_and_output_apart(repository):
    cell = Fences(repository).cell(f"snippets/{PATH}.py")
    code, _, output = cell.partition("wm-output-label")
    assert "# -&gt;" not in cell
    assert "double" in code
    assert ">42</pre>" in output


def test_report_turns_stale_when_the_code_changes(repository):
    files = Files(repository, PATH)
    date, source = "2026-01-02T03:04+00:00", passed_digest(repository, PATH)
    machine = {"gpu": "NVIDIA H200", "torch": "2.11.0+cu130"}
    written = {
        "runs": {date: {"commit": "abc", "machine": machine}},
        "topics": {PATH: {"run": date, "passed": 3, "source": source}},
    }
    file = repository / "docs/records/h200/tests.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(written))
    (fresh,) = last_passes(repository, PATH)
    assert (fresh.where, fresh.tests, fresh.stale) == (
        "NVIDIA H200, torch 2.11.0",
        3,
        False,
    )
    files.snippet.write_text("print(1)\n")
    assert last_passes(repository, PATH)[0].stale
    assert last_passes(repository, "kernels/basics/other") == []


def test_report_of_a_few_topics_keeps_what_it_says_of_others(
    repository, monkeypatch
):
    file = repository / "docs/records/cpu/tests.json"
    monkeypatch.setattr(report, "ROOT", repository)

    def run(date, passed=(), failed=()):
        monkeypatch.setattr(report, "now", lambda: date)
        found = report.Report(file)
        found.passed.update(passed)
        found.failed.update(failed)
        found.pytest_sessionfinish()
        said = json.loads(file.read_text())
        assert [*said["runs"]] == sorted(
            {entry["run"] for entry in said["topics"].values()}
        )
        return {t: (e["run"], e["passed"]) for t, e in said["topics"].items()}

    assert run("1", ["a/b/c", "a/b/d", "a/b/d"]) == {
        "a/b/c": ("1", 1),
        "a/b/d": ("1", 2),
    }
    assert run("2", ["a/b/c"]) == {"a/b/c": ("2", 1), "a/b/d": ("1", 2)}
    assert run("3", failed=["a/b/d"]) == {"a/b/c": ("2", 1)}


def test_paper_is_rendered_with_its_link(tmp_path):
    bib = tmp_path / "references.bib"
    bib.write_text(
        "@article{a2018b, author={Milakov, Maxim and Gimelshein, Natalia},"
        "title={Online {Softmax}}, year={2018}, eprint={1805.02867}}"
    )
    assert render(load_references(bib)["a2018b"]) == (
        "Milakov and Gimelshein, 2018. "
        "[Online Softmax](https://arxiv.org/abs/1805.02867)."
    )
