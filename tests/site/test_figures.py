"""Figures that show data are what their scripts draw today."""

import importlib.util

import pytest
from building import ROOT

SCRIPTS = sorted((ROOT / "docs").glob("*/*/*_figure.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_figure_is_what_its_script_draws(script):
    spec = importlib.util.spec_from_file_location("figure", script)
    figure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figure)
    drawn = script.with_name(script.stem.removesuffix("_figure") + ".svg")
    assert drawn.read_text("utf-8") == figure.svg(), (
        f"run python {script.relative_to(ROOT)}"
    )
