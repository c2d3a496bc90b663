"""Draw moe_routing.svg: who runs the tokens, step by step, balanced or not.

Run it with Python after any change; a test compares the two.
"""

from itertools import accumulate
from pathlib import Path

from warpmap.models.experts._balance import TOKENS, Balancing, train

FIGURE = Path(__file__).with_name("moe_routing.svg")
WAYS: list[tuple[str, Balancing, float]] = [
    ("no balancing", "nothing", 0),
    ("Switch loss", "Switch loss", 1),
    ("bias", "bias", 0.003),
]
LEFT, RIGHT, TOP, HEIGHT, STEP = 20, 700, 46, 140, 206
EVERY = 6  # steps between two points
SHADES = (0.9, 0.35, 0.65, 0.2)


def bands(history: list[list[int]], top: float) -> list[str]:
    """A band for each expert, as high as its share of the tokens."""
    seen = history[::EVERY]
    across = (RIGHT - LEFT) / (len(seen) - 1)
    sums = [list(accumulate(load, initial=0)) for load in seen]

    def point(i: int, count: int) -> str:
        x, y = LEFT + across * i, top + HEIGHT * count / TOKENS
        return f"{x:.0f} {y:.0f}"

    lines = []
    for expert in range(len(history[0])):
        upper = [point(i, s[expert]) for i, s in enumerate(sums)]
        lower = [point(i, s[expert + 1]) for i, s in enumerate(sums)]
        path = "L".join(upper + lower[::-1])
        lines.append(
            f'  <path d="M{path}Z" fill="var(--wm-area)" '
            f'fill-opacity="{SHADES[expert % 4]}" '
            'stroke="var(--wm-paper)" stroke-width="1.5"/>'
        )
    return lines


def svg() -> str:
    """The figure: three panels over the steps of one training."""
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 650" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>The share of tokens that each of eight experts runs, over "
        "300 steps: a few experts take all unless loads are balanced</title>",
    ]
    for row, (name, balancing, strength) in enumerate(WAYS):
        top = TOP + STEP * row
        history = train(balancing, strength)
        lines += [
            f'  <text x="{LEFT}" y="{top - 14}">{name}</text>',
            f'  <text x="{RIGHT}" y="{top - 14}" text-anchor="end" '
            f'fill="var(--wm-muted)">busiest at the end: {max(history[-1])} '
            f"of {TOKENS}</text>",
            *bands(history, top),
        ]
    bottom = TOP + STEP * 2 + HEIGHT + 36
    lines += [
        f'  <text x="{LEFT}" y="{bottom}" fill="var(--wm-muted)">step 0</text>',
        f'  <text x="{RIGHT}" y="{bottom}" text-anchor="end" '
        'fill="var(--wm-muted)">300</text>',
    ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
