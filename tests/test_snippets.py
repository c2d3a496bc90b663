"""Every snippet runs, and prints what its ``# ->`` lines promise."""

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from warpmap_site.sources import split_snippet

ROOT = Path(__file__).parents[1]
SNIPPETS = sorted((ROOT / "snippets").rglob("*.py"))
if importlib.util.find_spec("triton") is None:  # not on Linux
    SNIPPETS = [s for s in SNIPPETS if "warpmap.kernels" not in s.read_text()]


def runs_on(path):
    page = (ROOT / "docs" / f"{path}.md").read_text(encoding="utf-8")
    return yaml.safe_load(page.split("---")[1])["runs_on"]


def topic(file):
    return file.relative_to(ROOT / "snippets").with_suffix("").as_posix()


def on_four(file):
    return "multi-gpu" in runs_on(topic(file))


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(
            f, id=topic(f), marks=pytest.mark.slow if on_four(f) else ()
        )
        for f in SNIPPETS
    ],
)
def test_snippet_prints_what_it_promises(file, capsys):
    if on_four(file):
        out = run_on_four(file)
    else:
        runpy.run_path(str(file), run_name="__main__")
        out = capsys.readouterr().out
    _, promised = split_snippet(file.read_text(encoding="utf-8"))
    assert promised, f"{file} promises no output: add a '# -> ...' line"
    printed = [line.rstrip() for line in out.splitlines()]
    assert printed == promised.split("\n")


def run_on_four(file):
    """What a snippet prints that needs several processes."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "4", str(file)),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
