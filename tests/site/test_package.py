"""The package: imports cost what they need, functions show an example."""

import ast
import subprocess
import sys

import pytest
from made_up import ROOT

from warpmap_site.loading import load_atlas
from warpmap_site.sources import Files

TOPICS = load_atlas(ROOT).topics.values()
PURE = [t.path for t in TOPICS if "browser" in t.meta.runs_on]


def python(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


BLOCK = "import sys; sys.modules.update(torch=None, numpy=None, triton=None);"


@pytest.mark.parametrize("path", PURE)
def test_browser_topic_is_pure_python(path):
    snippet = Files(ROOT, path).snippet
    done = python(f"{BLOCK} exec(open({str(snippet)!r}).read())")
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_no_torch():
    done = python("import sys, warpmap; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_torch_topics_import_no_triton():
    module = "warpmap.models.attention.grouped_query_attention"
    done = python(f"import sys, {module}; assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_missing_triton_is_said_in_one_line():
    done = python(
        "import sys; sys.modules['triton'] = None;"
        "import warpmap.kernels.normalization.softmax"
    )
    assert done.stderr.strip().splitlines()[-1] == (
        "ModuleNotFoundError: Triton kernels need Linux, or WSL2 on Windows: "
        "pip install 'warpmap[gpu]' there"
    )


@pytest.mark.parametrize(
    "path", [t.path for t in TOPICS if t.meta.kind != "survey"]
)
def test_every_public_function_shows_an_example(path):
    tree = ast.parse(Files(ROOT, path).module.read_text("utf-8"))
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    silent = [
        f.name for f in public if ">>>" not in (ast.get_docstring(f) or "")
    ]
    assert silent == []
