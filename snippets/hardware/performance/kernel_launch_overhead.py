"""A thousand times the work takes no longer: the host sets the pace."""

from warpmap.hardware.performance.kernel_launch_overhead import HOWS, pace

print("elements  launch each  wait each  graphs  GPU busy")
# -> elements  launch each  wait each  graphs  GPU busy
for elements in (2**10, 2**15, 2**20, 2**25):
    each, wait, graph = (pace(elements=elements, **HOWS[how]) for how in HOWS)
    print(
        f"{elements:8}{each.us_per_op:10.1f} us{wait.us_per_op:8.1f} us"
        f"{graph.us_per_op:8.1f}{each.gpu_busy_percent:9.0f}%"
    )
# ->     1024       5.0 us    17.0 us     2.0       40%
# ->    32768       5.0 us    17.1 us     2.1       42%
# ->  1048576       5.0 us    19.6 us     4.6       92%
# -> 33554432      85.9 us   100.9 us    85.9      100%

# a GPU that is ten times as fast in all, at 32768 elements
fast = pace(elements=2**15, bandwidth_gb_s=48000, least_us=0.2)
print(f"{fast.us_per_op:.1f} us, busy {fast.gpu_busy_percent:.0f}%")
# -> 5.0 us, busy 4%
