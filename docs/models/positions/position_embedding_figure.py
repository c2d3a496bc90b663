"""Draw position_embedding.svg: what four schemes tell about each pair.

Run it with Python after any change; a test compares the two.
"""

import math
from collections.abc import Callable
from pathlib import Path

from warpmap.models.positions.position_embedding import (
    alibi_slopes,
    shaw_index,
    sinusoidal,
    t5_bucket,
)

FIGURE = Path(__file__).with_name("position_embedding.svg")
TOKENS, SIDE = 16, 312
CELL = SIDE / TOKENS
WIDTH = 8


def sinusoids(query: int, key: int) -> float:
    """Product of the two vectors, 1 for a vector with itself."""
    a, b = sinusoidal(query, WIDTH), sinusoidal(key, WIDTH)
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) * 2 / WIDTH


def shaw(query: int, key: int) -> float:
    """One shade for each of four learned vectors."""
    return 0.1 + 0.9 * shaw_index(key - query, limit=3) / 3


def t5(query: int, key: int) -> float:
    """One shade for each of eight learned numbers."""
    return 1 - 0.9 * t5_bucket(key - query, buckets=8, longest=16) / 7


def alibi(query: int, key: int) -> float:
    """The factor on a weight, in the third of eight heads."""
    return math.exp(alibi_slopes(8)[2] * (key - query))


PANELS: dict[str, Callable[[int, int], float]] = {
    "sinusoids": sinusoids,
    "Shaw, limit 3": shaw,
    "T5, 8 buckets": t5,
    "ALiBi": alibi,
}


def svg() -> str:
    """The figure: four triangles of shades, queries down, keys across."""
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 740" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>Four schemes for 16 tokens: all are constant along the "
        "diagonals, so each sees the distance only</title>",
    ]
    for number, (name, shade) in enumerate(PANELS.items()):
        x = 20 + (number % 2) * (SIDE + 56)
        y = 44 + (number // 2) * (SIDE + 64)
        lines.append(f'  <text x="{x}" y="{y - 14}">{name}</text>')
        lines.append(
            f'  <rect x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" rx="3" '
            'fill="none" stroke="var(--wm-line)" stroke-width="1.5"/>'
        )
        for query in range(TOKENS):
            for key in range(query + 1):
                lines.append(
                    f'  <rect x="{x + CELL * key:g}" y="{y + CELL * query:g}" '
                    f'width="{CELL - 1:g}" height="{CELL - 1:g}" '
                    'fill="var(--wm-area)" '
                    f'fill-opacity="{max(shade(query, key), 0):.2f}"/>'
                )
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
