"""Draws roofline.svg: six operations under the roof of an H200.

Run it after a change of the module; a test compares the committed figure
with what this script draws.
"""

from math import atan, degrees, log10
from pathlib import Path

from warpmap.hardware.performance.roofline import (
    H200,
    Work,
    attention,
    bound,
    elementwise,
    gemm,
)

FIGURE = Path(__file__).with_name("roofline.svg")

# the plot's corners in the drawing, and the decades they stand for
LEFT, RIGHT, TOP, BOTTOM = 76, 686, 50, 520
X_FROM, X_TO = -1.0, 4.0  # FLOP/byte
Y_FROM, Y_TO = -0.4, 3.3  # TFLOP/s

# label, work, and where the label goes: dx, dy, anchor
POINTS: list[tuple[str, Work, float, float, str]] = [
    ("add two tensors", elementwise(2**26), 15, 8, "start"),
    ("layer, 1 token", gemm(1, 8192, 8192), 15, 8, "start"),
    (
        "decode attention",
        attention(B=64, T=1, S=8192, H=64, Hkv=8, D=128),
        15,
        8,
        "start",
    ),
    ("layer, 64 tokens", gemm(64, 8192, 8192), -15, -6, "end"),
    (
        "prefill",
        attention(B=1, T=2048, S=2048, H=64, Hkv=8, D=128),
        0,
        34,
        "middle",
    ),
    ("layer, 8192 tokens", gemm(8192, 8192, 8192), 68, 68, "end"),
]


def x_of(flops_per_byte: float) -> float:
    """Where an intensity lies, in the drawing's units."""
    share = (log10(flops_per_byte) - X_FROM) / (X_TO - X_FROM)
    return round(LEFT + share * (RIGHT - LEFT), 1)


def y_of(tflops: float) -> float:
    """Where a rate lies, in the drawing's units."""
    share = (log10(tflops) - Y_FROM) / (Y_TO - Y_FROM)
    return round(BOTTOM - share * (BOTTOM - TOP), 1)


def text(x: float, y: float, words: str, extra: str = "") -> str:
    """A label; ``extra`` holds more attributes."""
    return f'<text x="{x:g}" y="{y:g}" {extra}>{words}</text>'


def degrees_of(slope: float) -> float:
    """The slope of the roof as a rotation, clockwise as SVG has it."""
    return round(degrees(atan(slope)), 2)


def svg() -> str:
    """The figure as SVG."""
    peak, bandwidth = H200.flops_per_s / 1e12, H200.bytes_per_s / 1e12
    start = 10**X_FROM
    x0, y0 = x_of(start), y_of(start * bandwidth)
    xr, yr = x_of(H200.ridge), y_of(peak)
    muted = 'fill="var(--wm-muted)"'
    middle, end = 'text-anchor="middle"', 'text-anchor="end"'
    bold = f'{middle} font-weight="600"'
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 588" '
        'role="img" font-family="inherit" font-size="20" fill="currentColor">',
        "<title>Roofline of an H200 in bf16: four operations under the "
        "memory wall, two under the compute wall</title>",
        f'<path d="M{x0} {y0}L{xr} {yr}V{BOTTOM}H{x0}Z" '
        'fill="var(--wm-area)" opacity="0.1"/>',
    ]
    for decade in range(5):  # 1 to 10,000 FLOP/byte
        x = x_of(10**decade)
        lines += [
            f'<path d="M{x} {TOP}V{BOTTOM}" stroke="var(--wm-line)"/>',
            text(
                x,
                BOTTOM + 28,
                f"{10**decade:,}",
                f'{muted} text-anchor="middle"',
            ),
        ]
    for decade in range(4):  # 1 to 1,000 TFLOP/s
        y = y_of(10**decade)
        lines += [
            f'<path d="M{LEFT} {y}H{RIGHT}" stroke="var(--wm-line)"/>',
            text(
                LEFT - 10,
                y + 7,
                f"{10**decade:,}",
                f"{muted} {end}",
            ),
        ]
    slope = -(y0 - yr) / (xr - x0)
    xm = x_of(10**0.45)
    ym = y_of(10**0.45 * bandwidth)
    lines += [
        text(12, 24, "TFLOP/s", muted),
        text(RIGHT, BOTTOM + 58, "FLOP per byte", f"{muted} {end}"),
        f'<path d="M{xr} {yr}V{BOTTOM}" stroke="currentColor" '
        'stroke-dasharray="4 5" opacity="0.6"/>',
        f'<path d="M{x0} {y0}L{xr} {yr}" fill="none" '
        'stroke="var(--wm-area)" stroke-width="3" stroke-linecap="round"/>',
        f'<path d="M{xr} {yr}H{RIGHT}" stroke="currentColor" '
        'stroke-width="3" stroke-linecap="round"/>',
        text(
            0,
            -14,
            f"memory wall: {bandwidth:g} TB/s",
            f'{bold} style="fill:var(--wm-area)" '
            f'transform="translate({xm} {ym}) rotate({degrees_of(slope)})"',
        ),
        text(
            (xr + RIGHT) / 2,
            yr - 38,
            "compute wall:",
            bold,
        ),
        text(
            (xr + RIGHT) / 2,
            yr - 13,
            f"{peak:.0f} TFLOP/s",
            bold,
        ),
        text(xr + 10, BOTTOM - 16, f"ridge: {H200.ridge:.0f} FLOP/byte"),
    ]
    for label, work, dx, dy, anchor in POINTS:
        best = bound(work)
        x, y = x_of(work.intensity), y_of(best.flops_per_s / 1e12)
        ink = "var(--wm-area)" if best.wall == "memory" else "currentColor"
        if dy > 20:
            lines.append(
                f'<path d="M{x} {y}v{dy - 20}" stroke="currentColor" '
                'opacity="0.4"/>'
            )
        lines += [
            f'<circle cx="{x}" cy="{y}" r="7" fill="{ink}" '
            'stroke="var(--wm-paper)" stroke-width="2"/>',
            text(
                x + dx,
                y + dy,
                label,
                f'text-anchor="{anchor}" paint-order="stroke" '
                'stroke="var(--wm-paper)" stroke-width="4" '
                'stroke-linejoin="round"',
            ),
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_text(svg(), encoding="utf-8", newline="\n")
