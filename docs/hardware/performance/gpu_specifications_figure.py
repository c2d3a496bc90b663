"""Draw gpu_specifications.svg: FLOPs a byte of six cards, from the table.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.hardware.gpus import Format, gpu

FIGURE = Path(__file__).with_name("gpu_specifications.svg")

# each card, and the narrowest format that its tensor cores multiply
BARS: dict[str, Format] = {
    "V100 SXM2 32GB": "fp16",
    "A100 80GB SXM": "int8",
    "H100 SXM": "fp8",
    "H200 SXM": "fp8",
    "H20": "fp8",
    "B200": "fp4",
}
LEFT, WIDTH, ROW = 20, 560, 96


def svg() -> str:
    """The figure; a bar's length is the FLOPs that each byte must feed."""
    longest = max(gpu(n).flops_per_byte(f) or 0 for n, f in BARS.items())
    scale = WIDTH / longest
    height = ROW * len(BARS) + 12
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 720 {height}" role="img" font-family="inherit" '
        'font-size="26" fill="currentColor">',
        "  <title>FLOPs a byte from memory of six cards</title>",
    ]
    for row, (name, narrowest) in enumerate(BARS.items()):
        card = gpu(name)
        wide = card.flops_per_byte("fp16") or 0
        narrow = card.flops_per_byte(narrowest) or 0
        y = 12 + ROW * row
        short = name.partition(" ")[0]
        says = f"{wide:.0f} in 16 bits"
        if narrowest != "fp16":
            says += f", {narrow:.0f} in {narrowest}"
        lines += [
            f'  <text x="{LEFT}" y="{y + 24}"><tspan font-weight="600">'
            f'{short}</tspan><tspan dx="14" fill="var(--wm-muted)">{says}'
            "</tspan></text>",
            f'  <rect x="{LEFT}" y="{y + 38}" width="{narrow * scale:.1f}" '
            'height="30" rx="3" fill="var(--wm-area)" opacity="0.35"/>',
            f'  <rect x="{LEFT}" y="{y + 38}" width="{wide * scale:.1f}" '
            'height="30" rx="3" fill="var(--wm-area)"/>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
