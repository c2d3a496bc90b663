"""Bandwidth of a link, from its lanes to the bytes that a program sees.

A link is a bundle of lanes, and each lane moves one bit at a time in each
direction. Three things stand between the wires and the data:

    line code     extra bits that keep the two ends in step
    packets       a header on each piece of the data
    start-up      time before the first byte moves

Rates are in one direction and in GB/s of 10^9 bytes. Data sheets of NVLink
add both directions.

References: PCI-SIG, PCI Express Base Specification;
Foley and Danskin, 2017, doi:10.1109/MM.2017.37;
NVIDIA, H100 Tensor Core GPU Architecture, 2022
"""

import math
from dataclasses import dataclass
from typing import Literal, TypedDict

from warpmap.chart import Axis, Bar, BarChart

LineCode = Literal["8b/10b", "128b/130b", "242B/256B", "none"]

DATA_AND_SENT: dict[str, tuple[int, int]] = {
    "8b/10b": (8, 10),
    "128b/130b": (128, 130),
    "242B/256B": (242, 256),  # a flit: the other 14 bytes mend errors
    "none": (1, 1),
}
"""What a line code carries, and what it sends for that."""


class Link(TypedDict):
    """Arguments of ``transfer`` that describe a link."""

    lanes: int
    gbit_s: float
    line_code: LineCode
    payload_bytes: int
    header_bytes: int


def _pcie(gbit_s: float, line_code: LineCode, header_bytes: int) -> Link:
    return Link(
        lanes=16,
        gbit_s=gbit_s,
        line_code=line_code,
        payload_bytes=256,
        header_bytes=header_bytes,
    )


def _nvlink(links: int, lanes: int, gbit_s: float) -> Link:
    return Link(
        lanes=links * lanes,
        gbit_s=gbit_s,
        line_code="none",
        payload_bytes=256,
        header_bytes=16,
    )


# a write with a 64-bit address: 16 bytes of header and, before flits, 8 for
# framing, sequence number and checksum
LINKS: dict[str, Link] = {
    "PCIe 1.0 x16": _pcie(2.5, "8b/10b", 24),
    "PCIe 2.0 x16": _pcie(5.0, "8b/10b", 24),
    "PCIe 3.0 x16": _pcie(8.0, "128b/130b", 24),
    "PCIe 4.0 x16": _pcie(16.0, "128b/130b", 24),
    "PCIe 5.0 x16": _pcie(32.0, "128b/130b", 24),
    "PCIe 6.0 x16": _pcie(64.0, "242B/256B", 16),
    "NVLink 1, P100": _nvlink(links=4, lanes=8, gbit_s=20.0),
    "NVLink 2, V100": _nvlink(links=6, lanes=8, gbit_s=25.0),
    "NVLink 3, A100": _nvlink(links=12, lanes=4, gbit_s=50.0),
    "NVLink 4, H100 and H200": _nvlink(links=18, lanes=2, gbit_s=100.0),
    "NVLink 5, B200": _nvlink(links=18, lanes=2, gbit_s=200.0),
    "NVLink-C2C, GH200": _nvlink(links=10, lanes=9, gbit_s=40.0),
}
"""All links of one GPU; packets after the first NVLink are its packets."""

OLD = (
    *("PCIe 1.0 x16", "PCIe 2.0 x16", "PCIe 3.0 x16"),
    *("NVLink 1, P100", "NVLink 2, V100"),
)
"""Links that ``transfer_chart`` leaves out."""


def line_rate(
    lanes: int = 16, gbit_s: float = 32.0, line_code: LineCode = "128b/130b"
) -> float:
    """Bandwidth in one direction after the line code, in GB/s.

    Args:
        lanes: Lanes in one direction.
        gbit_s: Bits on one lane, in 10^9 bit/s; PCI Express writes GT/s.
        line_code: A key of ``DATA_AND_SENT``.

    Examples:
        >>> round(line_rate(lanes=16, gbit_s=8.0, line_code="128b/130b"), 3)
        15.754
    """
    data, sent = DATA_AND_SENT[line_code]
    return lanes * gbit_s / 8 * data / sent


def wire_bytes(size: int, payload_bytes: int, header_bytes: int) -> int:
    """Bytes that a message takes when it is cut into packets.

    Args:
        size: Bytes of the message.
        payload_bytes: Most data bytes in a packet.
        header_bytes: Bytes that each packet adds.

    Examples:
        >>> wire_bytes(size=1000, payload_bytes=256, header_bytes=24)
        1096
    """
    packets = -(-size // payload_bytes)
    return size + packets * header_bytes


@dataclass(frozen=True)
class Transfer:
    """What a link makes of a message.

    Attributes:
        raw_gb_s: Bits on all lanes, one direction, in GB/s.
        link_gb_s: After the line code, one direction, in GB/s.
        both_gb_s: The same in both directions, as NVLink is sold, in GB/s.
        payload_gb_s: Data in full packets, one direction, in GB/s.
        milliseconds: Time of this message, start-up included.
        reached_gb_s: Size over time of this message, in GB/s.
        half_speed_mb: Size that reaches half of the payload rate, in MB.
    """

    raw_gb_s: float
    link_gb_s: float
    both_gb_s: float
    payload_gb_s: float
    milliseconds: float
    reached_gb_s: float
    half_speed_mb: float


def transfer(
    lanes: int = 16,
    gbit_s: float = 32.0,
    line_code: LineCode = "128b/130b",
    payload_bytes: int = 256,
    header_bytes: int = 24,
    megabytes: float = 256.0,
    start_us: float = 10.0,
) -> Transfer:
    """Time to move a tensor over a link; the defaults are PCIe 5.0 x16.

    Args:
        lanes: Lanes in one direction, all links of the GPU together.
        gbit_s: Bits on one lane, in 10^9 bit/s; PCI Express writes GT/s.
        line_code: Bits of data in bits sent: a key of ``DATA_AND_SENT``.
        payload_bytes: Most data bytes in a packet.
        header_bytes: Bytes that each packet adds.
        megabytes: Size of the tensor, in 10^6 bytes.
        start_us: Time before the first byte moves, in microseconds; assumed.

    Raises:
        ValueError: If a number is out of range or the line code unknown.

    Examples:
        >>> gpu = transfer(**LINKS["NVLink 4, H100 and H200"])
        >>> gpu.both_gb_s, round(gpu.payload_gb_s, 1)
        (900.0, 423.5)
    """
    least = {"lanes": lanes, "payload_bytes": payload_bytes}
    for name, value in least.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    above = {"gbit_s": gbit_s, "megabytes": megabytes}
    for name, number in above.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive, got {number}")
    zero_or_more = {"header_bytes": header_bytes, "start_us": start_us}
    for name, number in zero_or_more.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must not be negative, got {number}")
    if line_code not in DATA_AND_SENT:
        known = ", ".join(DATA_AND_SENT)
        raise ValueError(f"line_code must be one of {known}, got {line_code}")
    size = round(megabytes * 1e6)
    if size < 1:
        raise ValueError(f"megabytes must hold a byte, got {megabytes}")

    raw = line_rate(lanes, gbit_s, "none")
    rate = line_rate(lanes, gbit_s, line_code)
    payload = rate * payload_bytes / (payload_bytes + header_bytes)
    on_wire = wire_bytes(size, payload_bytes, header_bytes)
    seconds = start_us * 1e-6 + on_wire / (rate * 1e9)
    return Transfer(
        raw_gb_s=raw,
        link_gb_s=rate,
        both_gb_s=2 * rate,
        payload_gb_s=payload,
        milliseconds=seconds * 1e3,
        reached_gb_s=size / seconds / 1e9,
        half_speed_mb=start_us * payload / 1e3,
    )


def transfer_chart(
    lanes: int = 16,
    gbit_s: float = 32.0,
    line_code: LineCode = "128b/130b",
    payload_bytes: int = 256,
    header_bytes: int = 24,
    megabytes: float = 256.0,
    start_us: float = 10.0,
) -> BarChart:
    """The same tensor over this link and over those of recent GPUs.

    Arguments are those of ``transfer``.

    Examples:
        >>> transfer_chart().bars[0].name
        'this link'
    """
    here = Link(
        lanes=lanes,
        gbit_s=gbit_s,
        line_code=line_code,
        payload_bytes=payload_bytes,
        header_bytes=header_bytes,
    )
    bars = []
    for name, link in {"this link": here, **LINKS}.items():
        if name in OLD:
            continue
        moved = transfer(**link, megabytes=megabytes, start_us=start_us)
        data = megabytes / moved.raw_gb_s
        start = start_us / 1e3
        parts = [
            ("start-up", start),
            ("line code and headers", moved.milliseconds - start - data),
            ("data", data),
        ]
        bars.append(Bar(name.partition(",")[0], parts))
    return BarChart(
        f"{megabytes:g} MB in one direction", Axis("milliseconds"), bars
    )
