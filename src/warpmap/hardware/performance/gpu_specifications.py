"""Peak rates of a data sheet, rebuilt from what the chip is made of.

A sheet's peaks are products, not measurements:

    FLOP/s  SMs x clock x multiply-adds an SM does each clock x 2
    byte/s  data pins x bits a second of each pin / 8

Multiply-adds are dense: half-empty weights, which sheets like to count, are
left out. The clock is the one that the sheet assumes; under load a chip may
run slower, and never reaches the product.

Reference: NVIDIA, H100 Tensor Core GPU Architecture, 2022,
https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper
"""

import math
from dataclasses import dataclass

from warpmap.chart import Axis, Bar, BarChart
from warpmap.hardware.gpus import GPUS, Format, Gpu

_AMPERE: dict[Format, int] = {
    "fp64": 64,
    "fp32": 64,
    "tf32": 512,
    "bf16": 1024,
    "fp16": 1024,
    "int8": 2048,
}
_HOPPER: dict[Format, int] = {
    "fp64": 128,
    "fp32": 128,
    "tf32": 1024,
    "bf16": 2048,
    "fp16": 2048,
    "fp8": 4096,
    "int8": 4096,
}
_ADA: dict[Format, int] = {
    "fp32": 128,
    "tf32": 256,
    "bf16": 512,
    "fp16": 512,
    "fp8": 1024,
    "int8": 1024,
}
# GeForce: sums in fp32 run at half the rate of the same chip's server card
_GEFORCE: dict[Format, int] = {
    "fp32": 128,
    "tf32": 128,
    "bf16": 256,
    "fp16": 256,
    "fp8": 512,
    "int8": 1024,
}

FMAS_PER_CLOCK: dict[str, dict[Format, int]] = {
    "V100 SXM2 32GB": {"fp64": 32, "fp32": 64, "fp16": 512},
    "A100 40GB SXM": _AMPERE,
    "A100 80GB SXM": _AMPERE,
    "H100 SXM": _HOPPER,
    "H100 PCIe": _HOPPER,
    "H200 SXM": _HOPPER,
    "L40S": _ADA,
    "L4": _ADA,
    "RTX 4090": _GEFORCE,
    "RTX 5090": {**_GEFORCE, "fp4": 2048},
}
"""Dense multiply-adds of one SM in one clock, on its fastest unit."""


def peak_tflops(sms: int, fmas_per_clock: int, clock_mhz: float) -> float:
    """Peak rate from units and clock, in TFLOP/s.

    Args:
        sms: Streaming multiprocessors.
        fmas_per_clock: Multiply-adds that one of them does each clock.
        clock_mhz: Clock, in MHz.

    Examples:
        >>> round(peak_tflops(132, 2048, 1830), 1)
        989.4
    """
    return 2 * sms * fmas_per_clock * clock_mhz / 1e6


def bandwidth_tb_s(bus_bits: int, pin_gbit_s: float) -> float:
    """Memory bandwidth from the bus, in TB/s (10^12 byte/s).

    Args:
        bus_bits: Data pins of all memory chips together.
        pin_gbit_s: Data rate of one pin, in Gbit/s: twice the memory clock.

    Examples:
        >>> round(bandwidth_tb_s(5120, 5.238), 3)
        3.352
    """
    return bus_bits * pin_gbit_s / 8 / 1000


def rebuilt_tflops(card: Gpu, number_format: Format) -> float | None:
    """A card's peak in a format, from its units and clock, in TFLOP/s.

    Args:
        card: A card of the table.
        number_format: One of ``warpmap.hardware.gpus.FORMATS``.

    Returns:
        The product, or ``None`` where units or clock are not known.

    Examples:
        >>> round(rebuilt_tflops(GPUS["A100 80GB SXM"], "bf16"))
        312
    """
    fmas = FMAS_PER_CLOCK.get(card.name, {}).get(number_format)
    # some sheets assume a lower clock where tensor cores work
    plain = number_format in ("fp64", "fp32")
    clock = card.boost_clock_mhz if plain else card.tensor_clock_mhz
    if fmas is None or card.sms is None or clock is None:
        return None
    return peak_tflops(card.sms, fmas, clock)


def _units() -> dict[str, dict[str, float]]:
    cards = {}
    for name, fmas in FMAS_PER_CLOCK.items():
        card = GPUS[name]
        parts = {
            "sms": card.sms,
            "fmas_per_clock": fmas["fp16"],
            "clock_mhz": card.tensor_clock_mhz,
            "bus_bits": card.memory_bus_bits,
            "pin_gbit_s": card.memory_pin_gbit_s,
        }
        known = {key: value for key, value in parts.items() if value}
        if len(known) == len(parts):
            cards[name] = known
    return cards


CARDS: dict[str, dict[str, float]] = _units()
"""Cards in 16-bit formats, as arguments of ``gpu_specifications``."""

BESIDE = (
    "L40S",
    "H100 SXM",
    "B200",
    "H200 SXM",
    "A100 80GB SXM",
    "RTX 5090",
    "H20",
)
"""Cards that the chart shows beside the reader's chip."""


@dataclass(frozen=True)
class Specifications:
    """What a chip can do at most.

    Attributes:
        peak_tflops: Dense peak, in TFLOP/s.
        sparse_tflops: What a sheet prints for half-empty weights.
        bandwidth_tb_s: Memory bandwidth, in TB/s (10^12 byte/s).
        flops_per_byte: FLOPs for each byte from memory that keep both busy.
    """

    peak_tflops: float
    sparse_tflops: float
    bandwidth_tb_s: float
    flops_per_byte: float


def gpu_specifications(
    sms: int = 132,
    fmas_per_clock: int = 2048,
    clock_mhz: float = 1830.0,
    bus_bits: int = 6144,
    pin_gbit_s: float = 6.402,
) -> Specifications:
    """Peaks of a chip from its parts; the defaults are an H200 in bf16.

    Args:
        sms: Streaming multiprocessors that are switched on.
        fmas_per_clock: Dense multiply-adds of one SM in one clock.
        clock_mhz: Clock of the SMs: the sheet's, or what you see under load.
        bus_bits: Data pins of all memory chips together.
        pin_gbit_s: Data rate of one pin: twice the memory clock.

    Raises:
        ValueError: If an argument is not positive.

    Examples:
        >>> h200 = gpu_specifications()
        >>> round(h200.peak_tflops), round(h200.bandwidth_tb_s, 2)
        (989, 4.92)
        >>> round(gpu_specifications(**CARDS["RTX 5090"]).peak_tflops, 1)
        209.5
    """
    given = dict(locals())  # the arguments, nothing else yet
    for name, value in given.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    peak = peak_tflops(sms, fmas_per_clock, clock_mhz)
    bandwidth = bandwidth_tb_s(bus_bits, pin_gbit_s)
    return Specifications(
        peak_tflops=peak,
        sparse_tflops=2 * peak,
        bandwidth_tb_s=bandwidth,
        flops_per_byte=peak / bandwidth,
    )


def ridge_chart(
    sms: int = 132,
    fmas_per_clock: int = 2048,
    clock_mhz: float = 1830.0,
    bus_bits: int = 6144,
    pin_gbit_s: float = 6.402,
) -> BarChart:
    """FLOPs a byte: this chip above the data sheets, 16-bit and dense.

    Args:
        sms: As in ``gpu_specifications``, and so are the others.
        fmas_per_clock: Dense multiply-adds of one SM in one clock.
        clock_mhz: Clock of the SMs, in MHz.
        bus_bits: Data pins of all memory chips together.
        pin_gbit_s: Data rate of one pin, in Gbit/s.

    Raises:
        ValueError: If an argument is not positive.

    Examples:
        >>> [bar.name for bar in ridge_chart().bars][:2]
        ['this chip', 'L40S']
    """
    chip = gpu_specifications(
        sms, fmas_per_clock, clock_mhz, bus_bits, pin_gbit_s
    )
    sheets = {name: GPUS[name].flops_per_byte("fp16") or 0 for name in BESIDE}
    ranked = sorted(sheets.items(), key=lambda item: -item[1])
    return BarChart(
        "FLOPs a byte from memory, 16-bit formats",
        Axis("FLOP/byte"),
        [
            Bar(name, [("", ridge)])
            for name, ridge in [("this chip", chip.flops_per_byte), *ranked]
        ],
    )
