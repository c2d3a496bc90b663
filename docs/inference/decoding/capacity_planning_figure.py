"""Draw capacity_planning.svg: DeepSeek-V3's bound and its published rate.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.inference.decoding.capacity_planning import (
    SERVERS,
    at_batch,
    capacity_planning,
    server_of,
)
from warpmap.models.configs import config

FIGURE = Path(__file__).with_name("capacity_planning.svg")
LEFT, RIGHT, TOP, BOTTOM = 86, 700, 60, 560
MOST_MS, MOST_RATE = 60, 7000
PUBLISHED = 14.8e3 / 8, 1000 / 21  # tokens a second a GPU; 20 to 22 a user


def x(ms: float) -> float:
    """Where a time per token lies."""
    return LEFT + (RIGHT - LEFT) * ms / MOST_MS


def y(rate: float) -> float:
    """Where a rate lies."""
    return BOTTOM - (BOTTOM - TOP) * rate / MOST_RATE


def line(overlap: bool) -> list[tuple[float, float]]:
    """Time per token and rate, from one request to a full memory."""
    most = capacity_planning(
        **{**SERVERS["DeepSeek-V3 as published"], "tpot_limit_ms": 1000.0}
    ).batch
    server = server_of(
        "H800 SXM",
        "fp8",
        data_parallel=144,
        expert_parallel=True,
        overlap=overlap,
    )
    plans = [
        at_batch(config("DeepSeek-V3"), server, n, 4383, 1211)
        for n in range(1, most + 1, 3)
    ]
    return [(p.tpot_ms, p.decode_tokens_per_s) for p in plans]


def svg() -> str:
    """The figure."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 648" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>DeepSeek-V3 on 144 H800: bounds, and the published rate"
        "</title>",
        '  <text x="20" y="30">output tokens a second, each GPU</text>',
    ]
    for rate in range(0, MOST_RATE + 1, 2000):
        parts += [
            f'  <path d="M{LEFT} {y(rate):.1f}H{RIGHT}" '
            'stroke="var(--wm-line)" stroke-width="1.5"/>',
            f'  <text x="{LEFT - 12}" y="{y(rate) + 9:.1f}" '
            'text-anchor="end" fill="var(--wm-muted)">'
            f"{rate // 1000}{'k' if rate else ''}</text>",
        ]
    parts += [
        f'  <text x="{x(ms):.1f}" y="{BOTTOM + 36}" '
        f'text-anchor="{"end" if ms == MOST_MS else "middle"}" '
        f'fill="var(--wm-muted)">{ms}</text>'
        for ms in range(0, MOST_MS + 1, 20)
    ]
    for overlap in (True, False):
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line(overlap))
        dash = "" if overlap else ' stroke-dasharray="10 7"'
        parts.append(
            f'  <polyline points="{points}" fill="none" '
            f'stroke="var(--wm-area)" stroke-width="4"{dash}/>'
        )
    rate, ms = PUBLISHED
    parts += [
        f'  <text x="{x(27):.1f}" y="{y(6300):.1f}">messages hidden</text>',
        f'  <text x="{RIGHT}" y="{y(3600):.1f}" text-anchor="end">'
        "one after the other</text>",
        f'  <circle cx="{x(ms):.1f}" cy="{y(rate):.1f}" r="10" '
        'stroke="var(--wm-paper)" stroke-width="3"/>',
        f'  <text x="{x(ms):.1f}" y="{y(rate) + 44:.1f}" '
        'text-anchor="middle" font-weight="600">published</text>',
        f'  <text x="{RIGHT}" y="{BOTTOM + 78}" text-anchor="end">'
        "ms per output token</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
