"""Draw ``tokenization.svg``: a word that training never saw is encoded.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.models.foundations._bpe_trace import _shown
from warpmap.models.foundations.tokenization import _merge, train_bpe

COUNTS = {" low": 5, " lower": 2, " newest": 6, " widest": 3}
WORD, MERGES = " lowest", 5
LEFT, TOP, COLUMN, ROW, HEIGHT = 16, 60, 66, 62, 44


def row(tokens: list[bytes], made: bytes | None, y: int, says: str) -> str:
    """One line of tokens, as wide as their bytes; ``made`` stands out."""
    parts, x = [], LEFT
    for token in tokens:
        width = COLUMN * len(token)
        new = token == made
        style = (
            'fill="var(--wm-area)"'
            if new
            else 'fill="var(--wm-panel)" stroke="currentColor" '
            'stroke-opacity="0.4" stroke-width="1.5"'
        )
        ink = "var(--wm-paper)" if new else "currentColor"
        parts.append(
            f'  <rect x="{x + 2}" y="{y}" width="{width - 4}" '
            f'height="{HEIGHT}" rx="3" {style}/>\n'
            f'  <text x="{x + width / 2:g}" y="{y + 31}" fill="{ink}" '
            f'text-anchor="middle">{_shown(token)}</text>'
        )
        x += width
    parts.append(
        f'  <text x="{x + 16}" y="{y + 31}" fill="var(--wm-muted)">{says}'
        "</text>"
    )
    return "\n".join(parts)


def svg() -> str:
    """The figure: a row for each merge that applies."""
    text = "".join(word * count for word, count in COUNTS.items())
    tokenizer = train_bpe([text], 257 + MERGES)
    ids = list(WORD.encode())
    rows = [row([tokenizer.tokens[i] for i in ids], None, TOP, "bytes")]
    for made, pair in enumerate(tokenizer.merges, start=256):
        merged = _merge(ids, pair, made)
        assert merged != ids  # every merge learned applies here
        ids = merged
        left, right = (_shown(tokenizer.tokens[i]) for i in pair)
        rows.append(
            row(
                [tokenizer.tokens[i] for i in ids],
                tokenizer.tokens[made],
                TOP + ROW * len(rows),
                f"{made - 255}. {left} + {right}",
            )
        )
    assert ids == tokenizer.encode(WORD)
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 '
            f'{TOP + ROW * len(rows)}" role="img" font-family="inherit" '
            'font-size="26" fill="currentColor">',
            "  <title>The word lowest, from seven bytes to two tokens</title>",
            f'  <text x="{LEFT}" y="34">a word that training did not see'
            "</text>",
            *rows,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    Path(__file__).with_name("tokenization.svg").write_bytes(svg().encode())
