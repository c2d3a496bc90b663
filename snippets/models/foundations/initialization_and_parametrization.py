"""Sixteen times wider: how much further does the very same step move?"""

from warpmap.models.foundations._coordinate_check import coordinate_check


def sizes(rule, width):
    """Before one step, and what it changes; means of four networks."""
    checks = [coordinate_check(rule, width, seed=s) for s in range(4)]
    hidden = sum(c.hidden_start for c in checks) / 4
    moved = sum(c.hidden_change for c in checks) / 4
    output = sum(c.output_change for c in checks) / 4
    return hidden, moved, output


for rule in ("standard", "NTK", "muP"):
    pairs = zip(sizes(rule, 16), sizes(rule, 256), strict=True)
    hidden, moved, output = (wide / narrow for narrow, wide in pairs)
    print(f"{rule}: before x{hidden:.1f}")
    print(f"  hidden values move x{moved:.1f}, the output x{output:.1f}")
# -> standard: before x0.9
# ->   hidden values move x9.2, the output x27.0
# -> NTK: before x0.9
# ->   hidden values move x1.6, the output x6.3
# -> muP: before x0.9
# ->   hidden values move x0.9, the output x0.9
