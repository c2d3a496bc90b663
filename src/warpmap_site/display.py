"""Charts as the output of a notebook's cell.

Only the standard library: a lab draws with this wherever it runs.
"""

from warpmap.chart import Chart
from warpmap_site.charts import svg

COLOURS = {
    "var(--wm-area)": "var(--wm-area, #2f7fd8)",
    "var(--wm-muted)": "var(--wm-muted, #767a82)",
    "var(--wm-line)": "var(--wm-line, #9aa0aa66)",
    "var(--wm-card)": "var(--wm-card, #fff)",
}
"""Elsewhere than on the site nothing sets the variables."""


class Drawing:
    """A chart that Jupyter shows, and that says what it is in a terminal.

    Args:
        chart: What to draw.

    Examples:
        >>> from warpmap.chart import Axis, Bar, BarChart
        >>> Drawing(BarChart("Memory", Axis("GiB"), [Bar("a", [("", 1)])]))
        Memory: a chart
    """

    def __init__(self, chart: Chart) -> None:
        """Keep the chart; it is drawn when it is shown."""
        self.chart = chart

    def __repr__(self) -> str:
        """The title, the same in every run."""
        return f"{self.chart.title}: a chart"

    def _repr_svg_(self) -> str:
        drawn = svg(self.chart)
        for name, with_default in COLOURS.items():
            drawn = drawn.replace(name, with_default)
        return drawn
