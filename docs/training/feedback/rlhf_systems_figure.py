"""Draw rlhf_systems.svg: three placements of one run, by the simulator.

Run it with Python after any change; a test compares the two.
"""

from pathlib import Path

from warpmap.training.feedback.rlhf_systems import (
    Cluster,
    Run,
    draw_lengths,
    simulate,
)

FIGURE = Path(__file__).with_name("rlhf_systems.svg")
LEFT, RIGHT, LANE, GAP = 20, 700, 30, 6
GPUS, BATCH, SEED = 4, 8, 3
FILLS = {
    "generate": 'fill="var(--wm-area)" fill-opacity="0.3"',
    "score": 'fill="var(--wm-area)"',
    "actor": 'fill="var(--wm-area)"',
    "sync": 'fill="currentColor"',
}


def runs() -> dict[str, Run]:
    """The same kind of answers under each placement, on invented speeds."""
    lengths = draw_lengths(20 * BATCH, 100, 1.0, 400, SEED)
    shared = Cluster(GPUS, GPUS, True, 0.1, 0.02, 60.0, 2.0, "GRPO")
    apart = Cluster(GPUS, 2, False, 0.1, 0.02, 60.0, 2.0, "GRPO")
    return {
        "colocated": simulate(lengths, BATCH, 2, shared),
        "split": simulate(lengths, BATCH, 3, apart),
        "asynchronous": simulate(lengths, BATCH, 12, apart, ahead=1),
    }


def svg() -> str:
    """The figure: as long as two colocated steps, each begun by an update."""
    found = runs()
    seconds = found["colocated"].updates[-1]

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 676" '
        'role="img" font-family="inherit" font-size="26" '
        'fill="currentColor">',
        "  <title>What four GPUs do under three placements</title>",
    ]
    top = 34
    for name, run in found.items():
        # the first asynchronous updates learn from short answers only
        start = run.updates[4] if name == "asynchronous" else 0.0
        end = start + seconds
        done = sum(start < update <= end + 1e-9 for update in run.updates)
        parts += [
            f'  <text x="{LEFT}" y="{top}" font-weight="600">{name}</text>',
            f'  <text x="{RIGHT}" y="{top}" text-anchor="end" '
            f'fill="var(--wm-muted)">{done} update{"s" * (done > 1)}</text>',
        ]
        for gpu in range(GPUS):
            y = top + 16 + gpu * (LANE + GAP)
            parts.append(
                f'  <rect x="{LEFT}" y="{y}" width="{RIGHT - LEFT}" '
                f'height="{LANE}" fill="var(--wm-panel)"/>'
            )
            spans: list[tuple[str, float, float]] = []
            for w in run.works:
                if gpu not in w.gpus or not (w.start < end and w.end > start):
                    continue
                fill = FILLS[w.stage]
                a, b = max(w.start, start) - start, min(w.end, end) - start
                if spans and spans[-1][::2] == (fill, a):
                    spans[-1] = (fill, spans[-1][1], b)
                else:
                    spans.append((fill, a, b))
            unit = (RIGHT - LEFT) / seconds
            parts += [
                f'  <rect x="{LEFT + unit * a:.1f}" y="{y}" '
                f'width="{unit * (b - a):.1f}" height="{LANE}" {fill}/>'
                for fill, a, b in spans
            ]
        top += 16 + GPUS * (LANE + GAP) + 52
    top -= 4
    at = LEFT
    for text, fill, width in (
        ("generate", FILLS["generate"], 186),
        ("score, train", FILLS["actor"], 222),
        ("sync", FILLS["sync"], 132),
        (
            "idle",
            'fill="var(--wm-panel)" stroke="var(--wm-muted)" '
            'stroke-width="1.5"',
            0,
        ),
    ):
        parts += [
            f'  <rect x="{at}" y="{top - 22}" width="26" height="26" '
            f'rx="3" {fill}/>',
            f'  <text x="{at + 36}" y="{top}">{text}</text>',
        ]
        at += width
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FIGURE.write_bytes(svg().encode())
