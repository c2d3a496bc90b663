"""PCIe 5.0 x16 is sold as 128 GB/s. Packets of 16 bytes see 25 of them.

Half of the figure is the other direction, and every packet needs a header,
however little it carries. NVLink pays the same way.
"""

from warpmap.hardware.network.interconnects import LINKS, transfer

print("bytes a packet   sold as    256     64     16")
# -> bytes a packet   sold as    256     64     16
for name in ("PCIe 5.0 x16", "NVLink 4, H100 and H200"):
    link = dict(LINKS[name])
    raw = transfer(**link).raw_gb_s
    row = f"{name.partition(',')[0]:12} {2 * raw:6.0f} GB/s"
    for payload in (256, 64, 16):
        link["payload_bytes"] = payload
        row += f"{transfer(**link).payload_gb_s:7.1f}"
    print(row)
# -> PCIe 5.0 x16    128 GB/s   57.6   45.8   25.2
# -> NVLink 4        900 GB/s  423.5  360.0  225.0
