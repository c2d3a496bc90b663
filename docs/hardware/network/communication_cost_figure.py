"""Draw communication_cost.svg: the messages of two all-gathers.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

FIGURE = Path(__file__).with_name("communication_cost.svg")
RANKS, LEFT, GAP = 8, 48, 89


def row(top: int, distance: int, chunks: int, label: str) -> list[str]:
    """Eight ranks and, as arcs over them, the messages of one step."""
    lines = [f'  <text x="{LEFT - 28}" y="{top}">{label}</text>']
    height = 30 + 12 * distance
    y = top + height + 12
    for rank in reversed(range(RANKS - distance)):
        a, b = LEFT + GAP * rank, LEFT + GAP * (rank + distance)
        path = f"M{a} {y}C{a} {y - height} {b} {y - height} {b} {y}"
        opacity = "1" if rank == 0 else "0.16"
        lines.append(
            f'  <path d="{path}" fill="none" stroke="var(--wm-area)" '
            f'stroke-width="{4 * chunks}" opacity="{opacity}"/>'
        )
    for rank in range(RANKS):
        x = LEFT + GAP * rank
        lines += [
            f'  <circle cx="{x}" cy="{y}" r="20" fill="var(--wm-paper)" '
            'stroke="currentColor" stroke-width="2"/>',
            f'  <text x="{x}" y="{y + 9}" text-anchor="middle">{rank}</text>',
        ]
    return lines


def svg() -> str:
    """The figure; a line is as thick as its message is large."""
    title = 'font-size="30" font-weight="600"'
    lines = [
        f'  <text x="20" y="36" {title}>ring: 7 steps</text>',
        *row(76, 1, 1, "each step: 1 chunk, to the next rank"),
        f'  <text x="20" y="220" {title}>doubling: 3 steps</text>',
        *row(260, 1, 1, "first: 1 chunk, to the next rank"),
        *row(386, 2, 2, "then: 2 chunks, 2 ranks further"),
        *row(524, 4, 4, "last: 4 chunks, 4 ranks further"),
    ]
    head = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 650" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>Two all-gathers of 8 ranks: seven small messages to the "
        "next rank, or three that double in size and distance</title>",
    ]
    return "\n".join([*head, *lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
