"""Draw mlp_from_scratch.svg: the plane as a network sees it, three times.

Run it with Python after any change; a test compares the two.
"""

from collections.abc import Sequence
from pathlib import Path

from warpmap.training.foundations._moons import (
    BOTTOM,
    EPOCH,
    LEFT,
    POINTS,
    RIGHT,
    SIZE,
    TOP,
    centres,
    margins,
    moons,
)
from warpmap.training.foundations.mlp_from_scratch import MLP, Adam, train

MOMENTS = [0, 5, 40]  # epochs
WIDTH, GAP = 226, 21
CELL = 4  # units, so 56 by 35 cells
COLUMNS = WIDTH // CELL
ROWS = round(COLUMNS * (TOP - BOTTOM) / (RIGHT - LEFT))
Y = 12


def region(inside: Sequence[bool]) -> str:
    """A path over the cells that are inside, a box for each run in a row."""
    path = ""
    for row in range(ROWS):
        cells = [*inside[row * COLUMNS : (row + 1) * COLUMNS], False]
        start = None
        for i, on in enumerate(cells):
            if on and start is None:
                start = i
            elif not on and start is not None:
                across = (i - start) * CELL
                path += (
                    f"M{start * CELL} {row * CELL}h{across}v{CELL}h-{across}z"
                )
                start = None
    return path


def svg() -> str:
    """The whole figure."""
    examples = moons(POINTS)
    model = MLP([2, 12, 2], seed=0)
    seen: dict[int, list[bool]] = {}
    losses: list[float] = []

    def look() -> None:
        plane = margins(model, centres(COLUMNS, ROWS))
        seen[len(losses) // EPOCH] = [margin > 0 for margin in plane]

    def record(step: int, loss: float) -> None:
        losses.append(loss)
        if step % EPOCH == 0 and step // EPOCH in MOMENTS:
            look()

    look()
    adam = Adam(model.parameters(), 0.05)
    train(model, adam, examples, SIZE, MOMENTS[-1], 0, record)

    points = []
    for (x, y), label in examples:
        at_x = (x - LEFT) / (RIGHT - LEFT) * COLUMNS * CELL
        at_y = (TOP - y) / (TOP - BOTTOM) * ROWS * CELL
        fill = "currentColor" if label else "var(--wm-paper)"
        points.append(
            f'<circle cx="{at_x:.0f}" cy="{at_y:.0f}" r="4" fill="{fill}"/>'
        )
    dots = "".join(points)
    wide, high = COLUMNS * CELL, ROWS * CELL

    parts = []
    for i, epoch in enumerate(MOMENTS):
        last = losses[(epoch - 1) * EPOCH : epoch * EPOCH]
        said = f"loss {sum(last) / EPOCH:.2f}" if epoch else "untrained"
        when = f"{epoch * EPOCH} steps"
        parts.append(
            f'<g transform="translate({i * (WIDTH + GAP)} {Y})">'
            f'<rect width="{wide}" height="{high}" fill="var(--wm-panel)"/>'
            f'<path d="{region(seen[epoch])}" fill="var(--wm-area)" '
            'fill-opacity="0.35" shape-rendering="crispEdges"/>'
            f'<g stroke="currentColor" stroke-width="1.5">{dots}</g>'
            f'<text y="{high + 34}" font-size="26">{when}</text>'
            f'<text y="{high + 66}" font-size="26" fill="var(--wm-muted)">'
            f"{said}</text></g>"
        )
    body = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 '
        f'{Y + high + 80}" role="img" font-family="inherit" '
        'fill="currentColor">\n'
        "  <title>A network of 12 hidden units learns to separate two half "
        f"moons in 160 steps</title>\n  {body}\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("mlp_from_scratch.svg").write_text(svg(), "utf-8")
