"""Draw ``evaluation.svg``: windows that overlap, and what each one scores.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.training.pretraining.evaluation import windows

LENGTH, CONTEXT, STRIDE = 16, 8, 4
LEFT, TOP, COLUMN, ROW, HEIGHT = 16, 84, 43, 64, 40
STYLES = {
    "context": 'fill="var(--wm-panel)" stroke="currentColor" '
    'stroke-opacity="0.4" stroke-width="1.5"',
    "scored": 'fill="var(--wm-area)"',
}


def cell(x: float, y: int, kind: str) -> str:
    """One token of a window."""
    return (
        f'  <rect x="{x:g}" y="{y}" width="{COLUMN - 5}" height="{HEIGHT}" '
        f'rx="3" {STYLES[kind]}/>'
    )


def svg() -> str:
    """The figure: a row for each window."""
    parts = []
    found = list(windows(LENGTH, CONTEXT, STRIDE))
    for row, (begin, first, end) in enumerate(found):
        for i in range(begin, end):
            kind = "scored" if i >= first else "context"
            parts.append(cell(LEFT + COLUMN * i, TOP + ROW * row, kind))
    bottom = TOP + ROW * len(found) + 34
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 '
            f'{bottom + 12}" role="img" font-family="inherit" font-size="26" '
            'fill="currentColor">',
            "  <title>Three windows over 16 tokens: each token but the first "
            "is scored once</title>",
            cell(LEFT, 6, "scored"),
            f'  <text x="{LEFT + 50}" y="35">scored</text>',
            cell(LEFT + 190, 6, "context"),
            f'  <text x="{LEFT + 240}" y="35">only read</text>',
            *parts,
            f'  <text x="{LEFT}" y="{bottom}" fill="var(--wm-muted)">text '
            f"of {LENGTH} tokens, context {CONTEXT}, stride {STRIDE}</text>",
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("evaluation.svg").write_bytes(svg().encode())
