"""The slowest kernel of a decoding step is not what makes it slow."""

from warpmap.tools.measuring._decode_step import DECODE_BYTES, decode_step
from warpmap.tools.measuring.profiling import (
    kernel_times,
    read_trace,
    summarise,
)

events = read_trace(decode_step(layers=4))
print("kernel     count  share of GPU  of bandwidth")
# -> kernel     count  share of GPU  of bandwidth
for row in kernel_times(events, DECODE_BYTES)[:4]:
    print(
        f"{row.name:10}{row.count:6}{row.share:14.0%}{row.bandwidth_share:14.1%}"
    )
# -> gate_up        4           32%         87.5%
# -> down           4           18%         77.8%
# -> qkv            4            9%         56.7%
# -> add            8            8%          0.1%

for what, change in (
    ("as it is", {}),
    ("twice the bandwidth", {"bandwidth_gb_s": 9600}),
    ("one graph", {"graph": True}),
):
    found = summarise(read_trace(decode_step(layers=4, **change)))
    print(
        f"{what}: {found.span_us:.0f} us, GPU busy {found.busy_percent:.0f}%, "
        f"{found.gaps} gaps"
    )
# -> as it is: 487 us, GPU busy 41%, 43 gaps
# -> twice the bandwidth: 487 us, GPU busy 30%, 47 gaps
# -> one graph: 214 us, GPU busy 93%, 0 gaps
