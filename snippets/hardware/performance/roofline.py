"""One token keeps an H200 as busy as 218 do.

The weights of an 8192 x 8192 layer cross the memory bus once, however many
tokens use them on the way.
"""

from warpmap.hardware.performance.roofline import H200, bound, gemm

print("tokens   at least  of peak  wall")
# -> tokens   at least  of peak  wall
for tokens in (1, 32, 218, 8192):
    best = bound(gemm(M=tokens, N=8192, K=8192))
    time = f"{best.seconds * 1e6:.0f} us"
    share = best.flops_per_s / H200.flops_per_s
    print(f"{tokens:6} {time:>10} {share:8.1%}  {best.wall}")
# ->      1      28 us     0.5%  memory
# ->     32      28 us    15.4%  memory
# ->    218      30 us   100.0%  compute
# ->   8192    1111 us   100.0%  compute
