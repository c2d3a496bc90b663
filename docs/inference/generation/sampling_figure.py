"""Draw sampling.svg: one request, three orders, three distributions.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.inference.generation._step_by_step import LOGITS
from warpmap.inference.generation.sampling import (
    ORDERS,
    Settings,
    probabilities,
    process,
)

FIGURE = Path(__file__).with_name("sampling.svg")
SETTINGS = Settings(temperature=2.0, top_p=0.9, min_p=0.15)
LEFT, WIDTH, HIGH, ROW = 16, 688, 60, 142


def bar(y: int, shares: list[float]) -> list[str]:
    """The unit interval, cut into a stretch for each word."""
    lines, start = [], 0.0
    for i, (word, share) in enumerate(zip(LOGITS, shares, strict=True)):
        x, width = LEFT + WIDTH * start, WIDTH * share
        start += share
        if not share:
            continue
        lines.append(
            f'  <rect x="{x:.1f}" y="{y}" width="{width:.1f}" '
            f'height="{HIGH}" fill="var(--wm-area)" '
            f'fill-opacity="{0.42 - 0.05 * i:.2f}" '
            'stroke="var(--wm-paper)" stroke-width="2"/>'
        )
        if width > 13.5 * len(word) + 4:
            lines.append(
                f'  <text x="{x + width / 2:.1f}" y="{y + 39}" '
                f'text-anchor="middle">{word}</text>'
            )
    return lines


def svg() -> str:
    """The figure: the model's own words, then those of each engine."""
    logits = list(LOGITS.values())
    short = {"temperature": "temperature", "top_p": "top-p", "min_p": "min-p"}
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 574" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>Under the same settings vLLM keeps five words, "
        "Transformers six, llama.cpp four</title>",
        f'  <text x="{LEFT}" y="34" font-weight="600">model</text>',
        *bar(50, probabilities(logits)),
    ]
    for i, (engine, order) in enumerate(ORDERS.items(), start=1):
        kept = process(logits, SETTINGS, order=order)
        steps = " → ".join(short[step] for step in order if step in short)
        y = 50 + ROW * i
        lines += [
            f'  <text x="{LEFT}" y="{y - 16}" font-weight="600">{engine}'
            "</text>",
            f'  <text x="{LEFT + WIDTH}" y="{y - 16}" text-anchor="end" '
            f'fill="var(--wm-muted)">{steps}</text>',
            *bar(y, probabilities(kept)),
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    FIGURE.write_text(svg(), encoding="utf-8")
