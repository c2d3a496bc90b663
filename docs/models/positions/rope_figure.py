"""Draw rope.svg: a query's and a key's hands, at two places of a text.

Run it with Python after any change; a test compares the two.
"""

import math
from pathlib import Path

TURNS = [1.0, 1 / 3, 1 / 9]  # radians a token: base 27, three pairs
PLACES = [(4, 2), (9, 7)]  # query and key
RADIUS, LEFT, STEP, TOP, ROW = 84, 140, 220, 190, 270


def tip(x: float, y: float, angle: float, length: float) -> str:
    """Counter-clockwise from the right, as a complex number's angle."""
    dx, dy = length * math.cos(angle), -length * math.sin(angle)
    return f"{x + dx:.1f} {y + dy:.1f}"


def dial(x: float, y: float, query: float, key: float) -> list[str]:
    """One pair: both hands, and the angle between them."""
    arc = f"M{tip(x, y, key, 40)} A40 40 0 0 0 {tip(x, y, query, 40)}"
    return [
        f'  <circle cx="{x}" cy="{y}" r="{RADIUS}" fill="var(--wm-panel)" '
        'stroke="currentColor" stroke-opacity="0.35" stroke-width="1.5"/>',
        f'  <path d="{arc} L{x} {y}Z" fill="var(--wm-area)" '
        'fill-opacity="0.25"/>',
        f'  <path d="M{x} {y}L{tip(x, y, key, RADIUS - 8)}" '
        'stroke="currentColor" stroke-width="3"/>',
        f'  <path d="M{x} {y}L{tip(x, y, query, RADIUS - 8)}" '
        'stroke="var(--wm-area)" stroke-width="5"/>',
        f'  <circle cx="{x}" cy="{y}" r="5"/>',
    ]


def svg() -> str:
    """The figure; a row is a place in the text, a column is a pair."""
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 570" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>Three pairs of a query and a key, turned by their positions"
        "</title>",
    ]
    for i in range(3):
        lines.append(
            f'  <text x="{LEFT + STEP * i}" y="34" text-anchor="middle" '
            f'fill="var(--wm-muted)">pair {i}</text>'
        )
    for row, (query, key) in enumerate(PLACES):
        y = TOP + ROW * row
        lines.append(
            f'  <text x="20" y="{y - 112}">'
            f'<tspan fill="var(--wm-area)" font-weight="600">query at {query}'
            f"</tspan>, key at {key}</text>"
        )
        for i, turn in enumerate(TURNS):
            lines += dial(LEFT + STEP * i, y, query * turn, key * turn)
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("rope.svg").write_bytes(svg().encode())
