"""Draw linear_attention_state.svg: one stack with four kinds of layers.

Run it with Python after any change; a test compares the two.
"""

import math
from pathlib import Path

from warpmap.inference.kv_cache.linear_attention_state import (
    PRESETS,
    linear_attention_state,
)

KIMI = PRESETS["Kimi Linear 48B-A3B"]
GQA = {"kv_lora_rank": 0, "qk_rope_head_dim": 0, "kv_heads": 8, "head_dim": 128}
STACKS = {
    "all GQA": KIMI | GQA | {"linear_layers": 0, "full_layers": 27},
    "all MLA": KIMI | {"linear_layers": 0, "full_layers": 27},
    "20 of 27 KDA": KIMI,
    "all KDA": KIMI | {"linear_layers": 27, "full_layers": 0},
}
STYLES = {
    "all GQA": 'stroke="var(--wm-muted)" stroke-width="3"',
    "all MLA": 'stroke="currentColor" stroke-width="3"',
    "20 of 27 KDA": 'stroke="var(--wm-area)" stroke-width="6"',
    "all KDA": 'stroke="var(--wm-area)" stroke-width="3" '
    'stroke-dasharray="4 8"',
}
X0, X1, Y0, Y1 = 118, 520, 66, 508  # the frame; room for names at its right
TOKENS = {256: "256", 4096: "4k", 65536: "64k", 2**20: "1M"}
BYTES = {
    2**20 * size: name
    for size, name in [
        *((2, "2 MiB"), (32, "32 MiB"), (512, "512 MiB")),
        *((8192, "8 GiB"), (131072, "128 GiB")),
    ]
}


def x_at(tokens: float) -> float:
    """Place of a length, from 256 to 2^20 tokens."""
    return X0 + (X1 - X0) * math.log2(tokens / 256) / 12


def y_at(size: float) -> float:
    """Height of a size, from 2 MiB to 128 GiB."""
    return Y1 - (Y1 - Y0) * math.log2(size / 2**21) / 16


def svg() -> str:
    """The figure; every point comes from the calculator."""
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 600" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>Bytes of a request over its length, by kind of layer</title>",
        '  <text x="20" y="34">One request, 27 layers</text>',
    ]
    for size, name in BYTES.items():
        y = y_at(size)
        lines += [
            f'  <path d="M{X0} {y:.1f}H{X1}" stroke="var(--wm-line)" '
            'stroke-width="1.5"/>',
            f'  <text x="{X0 - 10}" y="{y + 9:.1f}" text-anchor="end" '
            f'fill="var(--wm-muted)" font-size="24">{name}</text>',
        ]
    for tokens, name in TOKENS.items():
        lines.append(
            f'  <text x="{x_at(tokens):.1f}" y="{Y1 + 40}" '
            'text-anchor="middle" fill="var(--wm-muted)" '
            f'font-size="24">{name}</text>'
        )
    lines.append(
        f'  <text x="{(X0 + X1) // 2}" y="{Y1 + 80}" text-anchor="middle" '
        'fill="var(--wm-muted)">tokens</text>'
    )
    ends = {}
    for name, given in STACKS.items():
        points = []
        for step in range(49):
            n = round(256 * 2 ** (step / 4))
            size = linear_attention_state(**given, tokens=n).request_bytes
            points.append((x_at(n), y_at(size)))
        ends[name] = points[-1][1]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        lines.append(f'  <path d="M{path}" fill="none" {STYLES[name]}/>')
    for name, y in ends.items():
        bold = ' font-weight="600"' if name == "20 of 27 KDA" else ""
        lines.append(
            f'  <text x="{X1 + 12}" y="{y + 9:.1f}"{bold}>{name}</text>'
        )
    equal = linear_attention_state(**KIMI).crossover_tokens
    assert equal is not None
    size = linear_attention_state(**KIMI, tokens=equal).request_bytes
    x, y = x_at(equal), y_at(size)
    lines += [
        f'  <circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="var(--wm-paper)" '
        'stroke="var(--wm-area)" stroke-width="3"/>',
        f'  <path d="M{x:.1f} {y + 12:.1f}V{y + 62:.1f}" '
        'stroke="currentColor" stroke-width="1.5"/>',
        f'  <text x="{x:.1f}" y="{y + 88:.1f}" text-anchor="middle">'
        f"{equal:,} tokens</text>",
    ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("linear_attention_state.svg").write_bytes(
        svg().encode()
    )
