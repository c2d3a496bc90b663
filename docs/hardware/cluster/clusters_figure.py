"""Draw clusters.svg: a fat tree of 16 GPUs and one way through it.

Run it with Python after any change; a test compares the two.
"""

from itertools import pairwise
from pathlib import Path

FIGURE = Path(__file__).with_name("clusters.svg")
LEFT, RIGHT, SIDE = 128, 706, 34
ROWS = {"cores": 56, "spines": 186, "leaves": 316, "GPUs": 430}


def across(count: int, which: int) -> float:
    """Middle of one of so many columns."""
    return LEFT + (RIGHT - LEFT) * (which + 0.5) / count


def svg() -> str:
    """The figure: switches with 4 ports, in 4 pods."""
    cables = []  # from (row, column of how many) to the same
    for pod in range(4):
        for i in range(2):
            leaf = ("leaves", 8, 2 * pod + i)
            for j in range(2):
                spine = ("spines", 8, 2 * pod + j)
                cables.append((leaf, spine))
                cables.append((("GPUs", 16, 4 * pod + 2 * i + j), leaf))
                cables.append((("spines", 8, 2 * pod + i),
                               ("cores", 4, 2 * i + j)))  # fmt: skip
    # from the first GPU of pod 1 to the last of pod 3
    way = [
        ("GPUs", 16, 0),
        ("leaves", 8, 0),
        ("spines", 8, 0),
        ("cores", 4, 1),
        ("spines", 8, 4),
        ("leaves", 8, 5),
        ("GPUs", 16, 11),
    ]
    shown = {frozenset(pair) for pair in pairwise(way)}
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 468" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>A fat tree of 16 GPUs: 8 leaves, 8 spines and 4 cores with "
        "4 ports each; one message passes five switches</title>",
    ]
    for start, end in sorted(cables, key=lambda pair: frozenset(pair) in shown):
        style = (
            'stroke="var(--wm-area)" stroke-width="6"'
            if frozenset((start, end)) in shown
            else 'stroke="currentColor" stroke-width="2" opacity="0.28"'
        )
        (a, m, i), (b, n, j) = start, end
        lines.append(
            f'  <path d="M{across(m, i):.1f} {ROWS[a]}'
            f'L{across(n, j):.1f} {ROWS[b]}" {style}/>'
        )
    for row, count in (("cores", 4), ("spines", 8), ("leaves", 8),
                       ("GPUs", 16)):  # fmt: skip
        side = 22 if row == "GPUs" else SIDE
        for i in range(count):
            on = (row, count, i) in way
            fill = "var(--wm-area)" if on else "var(--wm-paper)"
            line = "var(--wm-area)" if on else "currentColor"
            lines.append(
                f'  <rect x="{across(count, i) - side / 2:.1f}" '
                f'y="{ROWS[row] - side / 2:g}" width="{side}" '
                f'height="{side}" rx="3" fill="{fill}" stroke="{line}" '
                'stroke-width="2"/>'
            )
        lines.append(f'  <text x="12" y="{ROWS[row] + 9}">{row}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
