"""Draw ``optimizers.svg``: a gradient, and what three rules make of it."""

from pathlib import Path

import torch

from warpmap.training.foundations._newton_schulz import orthogonalize

ROWS, COLUMNS = 4, 6
VALUES = 1.0, 0.35, 0.15, 0.05
NAMES = [("SGD", "as it is"), ("Adam, Lion", "signs"), ("Muon", "directions")]


def gradient() -> torch.Tensor:
    """A matrix with singular values ``VALUES``, of no particular direction."""

    def basis(n: int, phase: float) -> torch.Tensor:
        cells = [[i * j + phase * i for j in range(n)] for i in range(n)]
        waves = torch.tensor(cells, dtype=torch.float64).cos()
        return torch.linalg.qr(waves)[0][:, :ROWS]

    values = torch.tensor(VALUES, dtype=torch.float64)
    return basis(ROWS, 0.7) * values @ basis(COLUMNS, 1.9).T


def bars(numbers: list[float], x: int, width: int, gap: int) -> str:
    """Bars from a line at 0; the largest is 56 high."""
    top = max(map(abs, numbers))
    found = []
    for i, number in enumerate(numbers):
        height = max(1.5, 56 * abs(number) / top)
        y = -height if number > 0 else 0
        found.append(
            f'<rect x="{x + i * (width + gap)}" y="{y:.0f}" '
            f'width="{width}" height="{height:.0f}"/>'
        )
    return "".join(found)


def svg() -> str:
    """The whole figure."""
    g = gradient()
    steps = [g, g.sign(), orthogonalize(g, dtype=None)]
    parts = [
        '<text x="190" y="34" font-size="26">elements</text>',
        '<text x="700" y="34" font-size="26" text-anchor="end">'
        "singular values</text>",
    ]
    for i, (step, (name, what)) in enumerate(zip(steps, NAMES, strict=True)):
        y = 120 + i * 160
        values = torch.linalg.svdvals(step).tolist()
        elements = bars(step.flatten().tolist(), 190, 8, 4)
        drawn = elements + bars(values, 530, 28, 16)
        parts.append(
            f'<g transform="translate(0 {y})">'
            '<text x="10" y="-4" font-size="26" font-weight="600">'
            f"{name}</text>"
            f'<text x="10" y="28" font-size="22" fill="var(--wm-muted)">{what}'
            "</text>"
            '<path d="M190 0H476M530 0H690" stroke="var(--wm-line)" '
            'stroke-width="1.5"/>'
            f'<g fill="var(--wm-area)">{drawn}</g></g>'
        )
    height = 120 + 2 * 160 + 80
    body = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {height}" '
        'role="img" font-family="inherit" fill="currentColor">\n'
        "  <title>SGD keeps the gradient, Adam and Lion level its elements, "
        f"Muon its singular values</title>\n  {body}\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("optimizers.svg").write_text(svg(), "utf-8")
