"""Draw attention.svg: queries, keys, weights and values of four words.

Run it with Python after any change; a test compares the two.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from warpmap.models.foundations._attention_by_hand import SENTENCE, attend

FIGURE = Path(__file__).with_name("attention.svg")
CELL, GAP, LEFT, TOP = 56, 36, 96, 76
LIT = 1  # chase


def matrix(
    x: float, y: float, rows: Sequence[Sequence[float | None]], digits: int
) -> list[str]:
    """Cells with numbers; what lies in 0 to 1 is shaded, None is empty."""
    lines = []
    for i, row in enumerate(rows):
        for j, number in enumerate(row):
            left, top = x + CELL * j, y + CELL * i
            shade = (number or 0) if digits == 2 else 0
            opacity = shade or (0 if number is None else 1)
            lines.append(
                f'  <rect x="{left}" y="{top}" width="{CELL}" '
                f'height="{CELL}" stroke="var(--wm-line)" stroke-width="1.5" '
                f'fill="var(--wm-{"area" if shade else "panel"})" '
                f'fill-opacity="{opacity:.2f}"/>'
            )
            if number is None:
                continue
            ink = ' fill="var(--wm-paper)"' if shade > 0.6 else ""
            text = f"{number:.{digits}f}"
            if digits == 2:
                text = text.replace("0.", ".")
            lines.append(
                f'  <text x="{left + CELL / 2:g}" y="{top + CELL / 2 + 8:g}" '
                f'font-size="23" text-anchor="middle"{ink}>{text}</text>'
            )
    return lines


def svg() -> str:
    """The figure: Q left, keys and values above, the output at the right."""
    words = list(SENTENCE)
    queries, keys, values = zip(*SENTENCE.values(), strict=True)
    weights, outputs = [], []
    one_hot = [[float(i == j) for j in range(4)] for i in range(4)]
    for i, query in enumerate(queries):
        bias = [0.0 if j <= i else -math.inf for j in range(4)]
        mine = attend(query, keys, one_hot, bias)
        weights.append([w if j <= i else None for j, w in enumerate(mine)])
        outputs.append(attend(query, keys, values, bias))
    x_weights = LEFT + 2 * CELL + GAP
    x_values = x_weights + 4 * CELL + GAP
    y_rows = TOP + 4 * CELL + GAP
    y_keys = TOP + 2 * CELL
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 620" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>Attention as two matrix products: each row of weights is a "
        "query against all keys, and mixes the values into an output</title>",
        *matrix(LEFT, y_rows, queries, 0),
        *matrix(x_weights, y_keys, list(zip(*keys, strict=True)), 0),
        *matrix(x_weights, y_rows, weights, 2),
        *matrix(x_values, TOP, values, 0),
        *matrix(x_values, y_rows, outputs, 1),
    ]
    for x, columns in ((LEFT, 2), (x_weights, 4), (x_values, 2)):
        lines.append(
            f'  <rect x="{x}" y="{y_rows + CELL * LIT}" '
            f'width="{CELL * columns}" height="{CELL}" rx="3" fill="none" '
            'stroke="currentColor" stroke-width="3"/>'
        )
    for i, word in enumerate(words):
        bold = ' font-weight="700"' if i == LIT else ""
        y = CELL * i + CELL / 2 + 9
        lines += [
            f'  <text x="{LEFT - 12}" y="{y_rows + y:g}" '
            f'text-anchor="end"{bold}>{word}</text>',
            f'  <text x="{x_values + 2 * CELL + 12}" y="{TOP + y:g}">'
            f"{word}</text>",
            f'  <text x="{x_weights + CELL * i + CELL / 2:g}" '
            f'y="{y_keys - 12}" font-size="19" text-anchor="middle">'
            f"{word}</text>",
        ]
    below = y_rows + 4 * CELL + 38
    for x, y, columns, name in (
        (LEFT, below, 2, "queries"),
        (x_weights, y_keys - 44, 4, "keys"),
        (x_weights, below, 4, "weights"),
        (x_values, TOP - 14, 2, "values"),
        (x_values, below, 2, "output"),
    ):
        lines.append(
            f'  <text x="{x + CELL * columns / 2:g}" y="{y}" '
            f'text-anchor="middle" fill="var(--wm-muted)">{name}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
