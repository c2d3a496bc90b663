"""Draw context_extension.svg: what three rules do to Llama 2, by the module.

Run it with Python after any change; a test compares the two.
"""

import math
from pathlib import Path

from warpmap.models.positions.context_extension import (
    interpolated,
    inverse_frequencies,
    ntk_aware,
    yarn,
)

D, BASE, TRAINED, FACTOR = 128, 10000.0, 4096, 4.0
LEFT, RIGHT, TOP, BOTTOM = 70, 700, 70, 470


def x(pair: float) -> float:
    """Where a pair lies."""
    return LEFT + (RIGHT - LEFT) * pair / (D // 2 - 1)


def y(slower: float) -> float:
    """Where a slow-down lies; equal distances are equal ratios."""
    return BOTTOM - (BOTTOM - TOP) * math.log(slower) / math.log(FACTOR)


def path(angles: list[float]) -> str:
    """One rule, pair by pair."""
    before = inverse_frequencies(D, BASE)
    points = [
        f"{x(i):.1f} {y(b / a):.1f}"
        for i, (a, b) in enumerate(zip(angles, before, strict=True))
    ]
    return "M" + "L".join(points)


def svg() -> str:
    """The figure; the shaded pairs must reach the top."""
    before = inverse_frequencies(D, BASE)
    full = sum(TRAINED * a >= 2 * math.pi for a in before)
    edge = x(full - 0.5)
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 524" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>How much slower three rules turn each pair of Llama 2, for "
        "4 times the length</title>",
        f'  <rect x="{edge:.1f}" y="{TOP - 12}" width="{RIGHT - edge:.1f}" '
        f'height="{BOTTOM - TOP + 12}" rx="3" fill="var(--wm-area)" '
        'fill-opacity="0.12"/>',
        '  <text x="20" y="36">times slower</text>',
        f'  <text x="{RIGHT}" y="36" text-anchor="end" '
        'fill="var(--wm-area)">no full turn in training</text>',
    ]
    for times in (1, 2, 4):
        lines += [
            f'  <path d="M{LEFT} {y(times):.1f}H{RIGHT}" '
            'stroke="var(--wm-line)" stroke-width="1.5"/>',
            f'  <text x="{LEFT - 14}" y="{y(times) + 9:.1f}" '
            f'text-anchor="end" fill="var(--wm-muted)">{times}×</text>',
        ]
    style = 'fill="none" stroke-linejoin="round"'
    lines += [
        f'  <path d="{path(interpolated(D, BASE, FACTOR))}" {style} '
        'stroke="currentColor" stroke-width="3"/>',
        f'  <path d="{path(ntk_aware(D, BASE, FACTOR))}" {style} '
        'stroke="currentColor" stroke-width="3" stroke-dasharray="10 7"/>',
        f'  <path d="{path(yarn(D, BASE, FACTOR, TRAINED))}" {style} '
        'stroke="var(--wm-area)" stroke-width="6"/>',
        f'  <text x="{x(1):.1f}" y="{TOP + 38}">interpolation</text>',
        f'  <text x="{x(3):.1f}" y="{y(1.65):.1f}">NTK-aware</text>',
        f'  <text x="{x(37):.1f}" y="{y(1.5):.1f}" fill="var(--wm-area)" '
        'font-weight="600">YaRN</text>',
        f'  <text x="{LEFT}" y="{BOTTOM + 40}" '
        'fill="var(--wm-muted)">pair 0, fastest</text>',
        f'  <text x="{RIGHT}" y="{BOTTOM + 40}" text-anchor="end" '
        f'fill="var(--wm-muted)">pair {D // 2 - 1}, slowest</text>',
    ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    here = Path(__file__).with_name("context_extension.svg")
    here.write_bytes(svg().encode())
