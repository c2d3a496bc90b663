"""Importing costs only what a topic needs."""

import subprocess
import sys

import pytest
from made_up import ROOT

from warpmap_site.atlas import load_atlas
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


def test_torch_topics_import_no_triton():
    module = "warpmap.models.attention.grouped_query_attention"
    done = python(f"import sys, {module}; assert 'triton' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_missing_triton_is_said_in_one_line():
    done = python(
        "import sys; sys.modules['triton'] = None;"
        "import warpmap.kernels.normalization.softmax"
    )
    assert done.stderr.strip().splitlines()[-1] == (
        "ModuleNotFoundError: Triton kernels need Linux, or WSL2 on Windows: "
        "pip install 'warpmap[gpu]' there"
    )
