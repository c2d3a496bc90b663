"""Draw gradient_checkpointing.svg: what is held as the backward pass begins.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.training.cost._recompute_plan import (
    best_segments,
    calls,
    schedule,
)

FIGURE = Path(__file__).with_name("gradient_checkpointing.svg")
LAYERS, INSIDE, SLOTS = 12, 4, 2  # the inside in units of an input
LEFT, WIDE, HIGH, GAP = 20, 50, 40, 7


def plans() -> list[tuple[str, set[int], set[int], int]]:
    """Name, layers whose inside is held, kept inputs, calls of layers."""
    last = {LAYERS - 1}
    sizes = best_segments([1] * LAYERS, [INSIDE] * LAYERS)
    starts = {sum(sizes[:i]) for i in range(len(sizes))} - last
    kept = set()
    for what, layer in schedule(LAYERS, SLOTS):
        if what == "reverse":
            break
        if what == "keep":
            kept.add(layer)
    once = 2 * LAYERS - 1
    return [
        ("plain", set(range(LAYERS)), set(), LAYERS),
        ("each layer", last, set(range(LAYERS - 1)), once),
        ("shrinking segments", last, starts, once),
        ("segments within segments", last, kept, calls(LAYERS, SLOTS)),
    ]


def svg() -> str:
    """The figure: twelve layers a row, one row a plan."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 488" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>Insides and inputs of twelve layers that four plans hold "
        "as the backward pass begins</title>",
    ]
    top = 0
    for name, inside, kept, number in plans():
        held = INSIDE * len(inside) + len(kept)
        parts += [
            f'  <text x="{LEFT}" y="{top + 36}" font-weight="600">{name}'
            "</text>",
            f'  <text x="{LEFT + LAYERS * (WIDE + GAP) - GAP}" y="{top + 36}" '
            f'text-anchor="end" fill="var(--wm-muted)">holds {held}, '
            f"{number} calls</text>",
        ]
        for layer in range(LAYERS):
            x, y = LEFT + layer * (WIDE + GAP), top + 52
            look = (
                'fill="var(--wm-area)"'
                if layer in inside
                else 'fill="var(--wm-panel)" stroke="var(--wm-muted)" '
                'stroke-opacity="0.5" stroke-width="1.5"'
            )
            parts.append(
                f'  <rect x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" '
                f'rx="3" {look}/>'
            )
            if layer in kept:
                parts.append(
                    f'  <circle cx="{x + 12}" cy="{y + HIGH // 2}" r="7" '
                    'fill="var(--wm-area)"/>'
                )
        top += 122
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
