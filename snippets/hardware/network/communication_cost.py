"""The ring is never the fastest all-reduce, unless the wires are a ring too.

Halving and doubling sends as few bytes in far fewer steps. But its partners
are far apart. Wired in a ring, messages share the wires between them.
"""

from warpmap.hardware.network.communication_cost import (
    halving_doubling,
    ring_all_reduce,
)

ALPHA, BANDWIDTH = 10e-6, 423.5e9  # assumed start-up; NVLink 4
TENSOR = 1_000_000_000  # bytes

print("ms for 1 GB           8 ranks  64 ranks")
# -> ms for 1 GB           8 ranks  64 ranks
for network in ("switch", "ring"):
    for algorithm in (ring_all_reduce, halving_doubling):
        row = f"{algorithm.__name__:16}"
        for ranks in (8, 64):
            cost = algorithm(TENSOR, ranks, network)
            row += f"{cost.seconds(ALPHA, BANDWIDTH) * 1e3:10.1f}"
        print(row, "", network)
# -> ring_all_reduce        4.3       5.9  switch
# -> halving_doubling       4.2       4.8  switch
# -> ring_all_reduce        4.3       5.9  ring
# -> halving_doubling      12.5     100.8  ring
