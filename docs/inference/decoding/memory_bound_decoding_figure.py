"""Draw memory_bound_decoding.svg: what a step waits for, by the module.

Run it with Python after any change; a test compares the two.
"""

import math
from pathlib import Path

from warpmap.inference.decoding.memory_bound_decoding import (
    memory_bound_decoding,
)

FIGURE = Path(__file__).with_name("memory_bound_decoding.svg")
BATCHES, CONTEXTS = (1, 4096), (64, 131072)
LEFT, RIGHT, TOP, BOTTOM = 92, 700, 52, 572
STEPS = 96


def x(batch: float) -> float:
    """Where a batch lies."""
    low, high = map(math.log, BATCHES)
    return LEFT + (RIGHT - LEFT) * (math.log(batch) - low) / (high - low)


def y(context: float) -> float:
    """Where a context lies."""
    low, high = map(math.log, CONTEXTS)
    return BOTTOM - (BOTTOM - TOP) * (math.log(context) - low) / (high - low)


def cache_from(batch: int) -> int:
    """The context from which keys and values take longest."""
    low, high = 1, 1 << 22
    while low < high:
        middle = (low + high) // 2
        step = memory_bound_decoding(batch=batch, context=middle)
        if step.longest == "keys and values":
            high = middle
        else:
            low = middle + 1
    return low


def svg() -> str:
    """The figure: regions of batch and context for Llama 3 8B on an H200."""
    ridge = memory_bound_decoding().critical_batch or BATCHES[1]
    batches = sorted(
        {round(BATCHES[1] ** (k / STEPS)) for k in range(STEPS + 1)} | {ridge}
    )
    edge = [(x(b), min(BOTTOM, max(TOP, y(cache_from(b))))) for b in batches]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in edge)
    corner = edge[batches.index(ridge)][1]
    right = " ".join(
        f"{a:.1f},{b:.1f}" for a, b in edge[batches.index(ridge) :]
    )
    ticks = [1, 16, 256, 4096]
    heights = {128: "128", 1024: "1k", 8192: "8k", 65536: "64k"}
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 668" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>What a decoding step waits for, by batch and context</title>",
        f'  <rect x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" '
        f'height="{BOTTOM - TOP}" fill="currentColor" fill-opacity="0.06"/>',
        f'  <polygon points="{line} {RIGHT},{TOP} {LEFT},{TOP}" '
        'fill="var(--wm-area)" fill-opacity="0.22"/>',
        f'  <polygon points="{right} {RIGHT},{BOTTOM} '
        f'{x(ridge):.1f},{BOTTOM}" fill="var(--wm-area)"/>',
        f'  <polyline points="{line}" fill="none" stroke="var(--wm-area)" '
        'stroke-width="2.5"/>',
    ]
    for batch in ticks:
        anchor = "end" if batch == BATCHES[1] else "middle"
        parts.append(
            f'  <text x="{x(batch):.1f}" y="{BOTTOM + 36}" '
            f'text-anchor="{anchor}" fill="var(--wm-muted)">{batch}</text>'
        )
    for context, label in heights.items():
        parts += [
            f'  <path d="M{LEFT} {y(context):.1f}H{RIGHT}" '
            'stroke="var(--wm-line)"/>',
            f'  <text x="{LEFT - 12}" y="{y(context) + 9:.1f}" '
            f'text-anchor="end" fill="var(--wm-muted)">{label}</text>',
        ]
    parts += [
        f'  <circle cx="{x(ridge):.1f}" cy="{corner:.1f}" r="7" '
        'stroke="var(--wm-paper)" stroke-width="3"/>',
        f'  <text x="{LEFT + 40}" y="{BOTTOM - 150}" font-weight="600">'
        "weights</text>",
        f'  <text x="{LEFT + 300}" y="{TOP + 110}" font-weight="600">'
        "keys and values</text>",
        f'  <text x="{(x(ridge) + RIGHT) / 2:.1f}" y="{BOTTOM - 58}" '
        'text-anchor="middle" font-weight="600" fill="var(--wm-paper)">'
        "arithmetic</text>",
        f'  <text x="{x(ridge) - 14:.1f}" y="{corner + 40:.1f}" '
        f'text-anchor="end">{ridge} requests</text>',
        f'  <text x="{RIGHT}" y="{BOTTOM + 80}" text-anchor="end">'
        "requests in the batch</text>",
        f'  <text x="20" y="{TOP - 20}">tokens of each request</text>',
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
