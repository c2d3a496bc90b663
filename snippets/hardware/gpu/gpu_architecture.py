"""A quarter of the warps can hide as much, if each asks for more at once.

Memory answers after 500 cycles. What counts is how many loads wait together,
not how many warps wait for them.
"""

from warpmap.hardware.gpu.gpu_architecture import latency_hiding

print("warps  loads at once   busy  in flight  limit")
# -> warps  loads at once   busy  in flight  limit
for warps, loads in ((16, 1), (4, 1), (4, 4), (16, 4)):
    sm = latency_hiding(warps, loads, math=4 * loads, chains=loads)
    busy, kb = sm.issue_percent, sm.bytes_in_flight / 1000
    print(f"{warps:5}{loads:15}{busy:6.1f}%{kb:8.1f} kB  {sm.limited_by}")
# ->    16              1  15.5%     7.9 kB  latency
# ->     4              1   3.9%     2.0 kB  latency
# ->     4              4  14.8%     7.6 kB  latency
# ->    16              4  17.9%     9.1 kB  memory
