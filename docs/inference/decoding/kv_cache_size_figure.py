"""Draw kv_cache_size.svg: bytes a token, from the module's own models.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.inference.decoding.kv_cache_size import MODELS, kv_cache_size

BARS = {
    "Llama 2 7B": "MHA",
    "Llama 3 70B": "GQA",
    "Llama 3 8B": "GQA",
    "DeepSeek-V3": "MLA, 671B parameters",
    "DeepSeek-V2": "MLA, 236B parameters",
}
LEFT, WIDTH, ROW = 20, 540, 88


def svg() -> str:
    """The figure; each bar's length is its bytes a token."""
    sizes = {n: kv_cache_size(**MODELS[n]).bytes_per_token for n in BARS}
    largest = max(sizes.values())
    height = ROW * len(BARS) + 16
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 720 {height}" role="img" font-family="inherit" '
        'fill="currentColor">',
        "  <title>Cached bytes a token of five models</title>",
    ]
    for row, (name, size) in enumerate(sizes.items()):
        y = 16 + ROW * row
        length = WIDTH * size / largest
        kind = BARS[name]
        lines += [
            f'  <text x="{LEFT}" y="{y + 18}" font-size="22">{name}'
            f'<tspan dx="12" fill="var(--wm-muted)">{kind}</tspan></text>',
            f'  <rect x="{LEFT}" y="{y + 30}" width="{length:.1f}" '
            'height="28" rx="3" fill="var(--wm-area)"/>',
            f'  <text x="{LEFT + length + 12:.1f}" y="{y + 52}" '
            f'font-size="22">{size / 1024:.3g} KiB</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("kv_cache_size.svg").write_bytes(svg().encode())
