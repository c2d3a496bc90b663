"""Draw training_memory.svg: what fills one GPU, by the module.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.training.cost.training_memory import GIB, training_memory

ROWS = {
    "nothing shared": {"zero_stage": 0},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 3": {"zero_stage": 3},
    "+ logits in chunks": {"zero_stage": 3, "loss": "fused"},
    "+ layers recomputed": {
        "zero_stage": 3,
        "loss": "fused",
        "recompute": "full",
    },
}
LEFT, WIDTH, TOP, ROW, BAR = 20, 680, 72, 96, 36
STYLES = {
    "states": 'fill="var(--wm-area)"',
    "activations": 'fill="var(--wm-area)" fill-opacity="0.45"',
    "logits": 'fill="currentColor" fill-opacity="0.16"',
}
LIMIT = 80  # GiB of the GPU


def svg() -> str:
    """The figure: Llama 3 8B, a sequence of 8192 tokens, 64 ranks."""
    bars = {}
    for name, arguments in ROWS.items():
        m = training_memory("Llama 3 8B", data=64, **arguments)
        kept = m.weight_bytes + m.gradient_bytes + m.optimizer_bytes
        logits = m.peak_bytes if arguments.get("loss") != "fused" else 0
        rest = m.total_gib * GIB - kept - logits
        bars[name] = {
            "states": kept / GIB,
            "activations": rest / GIB,
            "logits": logits / GIB,
        }
    most = max(sum(parts.values()) for parts in bars.values())
    height = TOP + ROW * len(ROWS) + 4
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 720 {height}" role="img" font-family="inherit" '
        'font-size="26" fill="currentColor">',
        "  <title>Memory of one GPU in five set-ups</title>",
    ]
    x: float = LEFT
    for key, step in (("states", 150), ("activations", 210), ("logits", 0)):
        lines += [
            f'  <rect x="{x:g}" y="12" width="22" height="22" rx="3" '
            f"{STYLES[key]}/>",
            f'  <text x="{x + 30:g}" y="32">{key}</text>',
        ]
        x += step
    for row, (name, parts) in enumerate(bars.items()):
        y = TOP + ROW * row
        total = f"{sum(parts.values()):.0f} GiB"
        lines.append(
            f'  <text x="{LEFT}" y="{y + 28}">{name}</text>\n'
            f'  <text x="{LEFT + WIDTH}" y="{y + 28}" text-anchor="end" '
            f'fill="var(--wm-muted)">{total}</text>'
        )
        x = LEFT
        for key, size in parts.items():
            width = WIDTH * size / most
            if width:
                lines.append(
                    f'  <rect x="{x:.1f}" y="{y + 42}" width="{width:.1f}" '
                    f'height="{BAR}" rx="3" {STYLES[key]}/>'
                )
            x += width
    limit = LEFT + WIDTH * LIMIT / most
    for line in (f"M{limit:.1f} {TOP} V{height - 8}", "M552 8 V38"):
        lines.append(
            f'  <path d="{line}" stroke="currentColor" stroke-width="2" '
            'stroke-dasharray="6 6"/>'
        )
    lines.append(f'  <text x="564" y="32">{LIMIT} GiB</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("training_memory.svg").write_bytes(svg().encode())
