"""Draw sparse_attention.svg: a fixed pattern and a chosen one.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

TOPICS = "ABACDBADCCABDACB"  # a token each
SIDE, PITCH = 17, 20
LEFT, TOP, GAP = 24, 100, 356


def near_and_first(query: int, key: int) -> bool:
    """Blocks of two: the query's own, the one before, and the first."""
    return query // 2 - key // 2 < 2 or key // 2 == 0


def same_topic(query: int, key: int) -> bool:
    """What an indexer would choose for heads that look for a topic."""
    return TOPICS[query] == TOPICS[key]


def panel(
    x: int, name: str, says: str, met: list[tuple[int, int]]
) -> list[str]:
    """A triangle of queries and keys; those that meet are filled."""
    lines = [
        f'  <text x="{x}" y="34" font-weight="600">{name}</text>',
        f'  <text x="{x}" y="66" fill="var(--wm-muted)">{says}</text>',
    ]
    for key, topic in enumerate(TOPICS):
        lines.append(
            f'  <text x="{x + key * PITCH + SIDE / 2}" y="{TOP + 2}" '
            f'font-size="18" text-anchor="middle">{topic}</text>'
        )
    for query in range(len(TOPICS)):
        for key in range(query + 1):
            style = (
                'fill="var(--wm-area)"'
                if (query, key) in met
                else 'fill="currentColor" fill-opacity="0.1"'
            )
            lines.append(
                f'  <rect x="{x + key * PITCH}" '
                f'y="{TOP + 12 + query * PITCH}" width="{SIDE}" '
                f'height="{SIDE}" rx="2" {style}/>'
            )
    return lines


def svg() -> str:
    """The figure; rows are queries, columns are keys."""
    pairs = [(q, k) for q in range(len(TOPICS)) for k in range(q + 1)]
    fixed = [pair for pair in pairs if near_and_first(*pair)]
    chosen = [pair for pair in pairs if same_topic(*pair)]
    height = TOP + 12 + len(TOPICS) * PITCH + 12
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 720 {height}" role="img" font-family="inherit" '
            'font-size="26" fill="currentColor">',
            "  <title>A fixed and a chosen pattern of attention</title>",
            *panel(LEFT, "Fixed", f"{len(fixed)} of {len(pairs)} pairs", fixed),
            *panel(
                LEFT + GAP,
                "Chosen",
                f"{len(chosen)} of {len(pairs)} pairs",
                chosen,
            ),
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    path = Path(__file__).with_name("sparse_attention.svg")
    path.write_bytes(svg().encode())
