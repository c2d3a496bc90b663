"""Draw kv_transfer_vs_recompute.svg: bandwidth from which fetching pays.

Run it with Python after any change; a test compares the two.
"""

import math
from pathlib import Path

from warpmap.inference.kv_cache.kv_transfer_vs_recompute import (
    PATHS,
    PRESETS,
    fetch_or_recompute,
)

NAMES = [
    "Qwen3 0.6B",
    "Qwen3 30B-A3B",
    "Llama 3 8B",
    "Llama 3 70B",
    "DeepSeek-V3",
]
LINKS = {
    "10 Gbit/s": PATHS["network, 10 Gbit/s"],
    "100 Gbit/s": PATHS["network, 100 Gbit/s"],
    "PCIe 5.0": PATHS["PCIe 5.0 x16"],
}
LEFT, RIGHT, TOP, ROW = 20, 700, 70, 94
LEAST, OCTAVES = 0.25, 8  # up to 64 GB/s


def x_at(gb_s: float) -> float:
    """Place of a bandwidth."""
    return LEFT + (RIGHT - LEFT) * math.log2(gb_s / LEAST) / OCTAVES


def svg() -> str:
    """The figure; each bar is parted at the break-even bandwidth."""
    bottom = TOP + ROW * len(NAMES)
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 720 {bottom + 56}" role="img" font-family="inherit" '
        'font-size="26" fill="currentColor">',
        "  <title>Bandwidth from which fetching a cache is faster than "
        "computing it</title>",
        f'  <rect x="{LEFT}" y="12" width="22" height="22" rx="3" '
        'fill="currentColor" fill-opacity="0.12"/>',
        f'  <text x="{LEFT + 32}" y="32">recompute is faster</text>',
        '  <rect x="330" y="12" width="22" height="22" rx="3" '
        'fill="var(--wm-area)"/>',
        '  <text x="362" y="32">fetch is faster</text>',
    ]
    for row, name in enumerate(NAMES):
        y = TOP + ROW * row
        gb_s = fetch_or_recompute(**PRESETS[name]).break_even_gb_s
        assert gb_s is not None
        x = x_at(gb_s)
        lines += [
            f'  <text x="{LEFT}" y="{y + 28}">{name}</text>',
            f'  <text x="{RIGHT}" y="{y + 28}" text-anchor="end" '
            f'fill="var(--wm-muted)">{gb_s:.2g} GB/s</text>',
            f'  <rect x="{LEFT}" y="{y + 40}" width="{x - LEFT:.1f}" '
            'height="30" rx="3" fill="currentColor" fill-opacity="0.12"/>',
            f'  <rect x="{x:.1f}" y="{y + 40}" width="{RIGHT - x:.1f}" '
            'height="30" rx="3" fill="var(--wm-area)"/>',
        ]
    for label, path in LINKS.items():
        x = x_at(path["link_gb_s"])
        last = label == list(LINKS)[-1]
        anchor = ("end", RIGHT) if last else ("middle", round(x, 1))
        for row in range(len(NAMES)):
            y = TOP + ROW * row + 37
            lines.append(
                f'  <path d="M{x:.1f} {y}v36" stroke="currentColor" '
                'stroke-width="3"/>'
            )
        lines.append(
            f'  <text x="{anchor[1]}" y="{bottom + 28}" '
            f'text-anchor="{anchor[0]}">{label}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("kv_transfer_vs_recompute.svg").write_bytes(
        svg().encode()
    )
