"""Data sheets of GPUs, in units that cannot be confused.

``gpus.json`` beside this file holds the figures and where each comes from.
A figure that is not there is ``None``: the chip lacks it, or no source was
found that states it. Nothing is estimated.

What sheets mean by their units:

    FLOP/s     peak rates here are dense; sheets often print twice as much,
               for weights of which half are zero (``sparsity_factor``)
    memory     a sheet's GB are a product name: an "A100 80GB" has 80 GiB,
               an "H200" with 141 GB has 140.4 GiB; see ``memory_bytes``
    TB/s       bandwidth is decimal, 10^12 byte/s
    NVLink     sheets add both directions: 900 GB/s are 450 each way
    L2         a sheet's MB are 2^20 bytes, for the whole chip
"""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

GIB = 1 << 30

Format = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4"]
"""Number formats that sheets give a peak for."""

FORMATS: tuple[Format, ...] = get_args(Format)

_PCIE_GT_S = {3: 8.0, 4: 16.0, 5: 32.0}


@dataclass(frozen=True)
class Gpu:
    """One product, as its data sheet describes it.

    Peak rates count a multiplication and an addition as 2 operations. On
    GeForce cards those of fp16 and fp8 are for sums kept in fp32, which is
    what training and inference use; with fp16 sums they are twice as high.

    Attributes:
        name: Key in ``GPUS``.
        architecture: Vendor's name of the generation.
        year: Year in which it was sold first.
        compute_capability: CUDA compute capability, for example ``"9.0"``.
        source: Address of the sheet that figures are taken from.
        sms: Streaming multiprocessors that are switched on.
        boost_clock_mhz: Clock behind the fp64 and fp32 peaks, in MHz.
        tensor_clock_mhz: Clock behind the tensor cores' peaks, in MHz.
        memory_gb: Capacity as sold, the number before "GB".
        memory_gib: Capacity as ``nvidia-smi`` reports it, in 2^30 bytes.
        memory_bus_bits: Data pins of all memory chips together.
        memory_pin_gbit_s: Data rate of one pin, in 10^9 bit/s.
        bandwidth_tb_s: Memory bandwidth, in 10^12 byte/s.
        fp64_tflops: Peak in fp64 without tensor cores, in TFLOP/s.
        fp64_tensor_tflops: Peak in fp64 on tensor cores, in TFLOP/s.
        fp32_tflops: Peak in fp32 without tensor cores, in TFLOP/s.
        tf32_tflops: Dense peak on tensor cores, in TFLOP/s.
        bf16_tflops: Dense peak on tensor cores, in TFLOP/s.
        fp16_tflops: Dense peak on tensor cores, in TFLOP/s.
        fp8_tflops: Dense peak on tensor cores, in TFLOP/s.
        int8_tops: Dense peak on tensor cores, in 10^12 operations a second.
        fp4_tflops: Dense peak on tensor cores, in TFLOP/s.
        sparsity_factor: How many times as high sheets print tensor peaks
            for structured sparsity; 1 if the chip cannot use it.
        nvlink_gb_s: NVLink of one GPU, BOTH directions added, in GB/s; 0
            if it has none.
        pcie_gen: Generation of its PCI Express.
        pcie_lanes: Lanes of its PCI Express.
        l2_mb: L2 cache of the whole chip, in 2^20 bytes as sheets count.
        registers_kib: Registers of one SM, in KiB.
        shared_kib: Most shared memory of one SM, in KiB.
        power_w: Most power that it may draw by default, in W.
        sources: Addresses of figures that ``source`` does not state.
        measured: What this project measured, from its records.
    """

    name: str
    architecture: str
    year: int
    compute_capability: str
    source: str
    sms: int | None = None
    boost_clock_mhz: float | None = None
    tensor_clock_mhz: float | None = None
    memory_gb: float | None = None
    memory_gib: float | None = None
    memory_bus_bits: int | None = None
    memory_pin_gbit_s: float | None = None
    bandwidth_tb_s: float | None = None
    fp64_tflops: float | None = None
    fp64_tensor_tflops: float | None = None
    fp32_tflops: float | None = None
    tf32_tflops: float | None = None
    bf16_tflops: float | None = None
    fp16_tflops: float | None = None
    fp8_tflops: float | None = None
    int8_tops: float | None = None
    fp4_tflops: float | None = None
    sparsity_factor: float = 1
    nvlink_gb_s: float | None = None
    pcie_gen: int | None = None
    pcie_lanes: int | None = None
    l2_mb: float | None = None
    registers_kib: int | None = None
    shared_kib: int | None = None
    power_w: float | None = None
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)
    measured: Mapping[str, float] = field(default_factory=dict, compare=False)

    @property
    def memory_bytes(self) -> int | None:
        """Capacity in bytes: what the driver reports, else the GB sold.

        Where only the sheet is known, its GB are read as 10^9 bytes, the
        smaller reading.
        """
        if self.memory_gib is not None:
            return round(self.memory_gib * GIB)
        return None if self.memory_gb is None else round(self.memory_gb * 1e9)

    @property
    def nvlink_one_way_gb_s(self) -> float | None:
        """NVLink of one GPU in one direction, in GB/s."""
        return None if self.nvlink_gb_s is None else self.nvlink_gb_s / 2

    @property
    def pcie_one_way_gb_s(self) -> float | None:
        """PCI Express in one direction after its line code, in GB/s."""
        if self.pcie_gen is None or self.pcie_lanes is None:
            return None
        # 128 of 130 bits carry data since generation 3
        gbit_s = _PCIE_GT_S[self.pcie_gen] * self.pcie_lanes * 128 / 130
        return gbit_s / 8

    def peak_tflops(
        self, number_format: Format, sparse: bool = False
    ) -> float | None:
        """Peak rate in a format, in TFLOP/s (TOP/s for int8).

        Args:
            number_format: One of ``FORMATS``.
            sparse: Whether half of the weights are zero in the pattern that
                the tensor cores can skip.

        Returns:
            The best unit's peak, or ``None`` if there is none.

        Raises:
            ValueError: If there is no such format.

        Examples:
            >>> gpu("H200 SXM").peak_tflops("bf16")
            989.4
            >>> gpu("H200 SXM").peak_tflops("bf16", sparse=True)
            1978.8
        """
        if number_format not in FORMATS:
            raise ValueError(
                f"number_format must be one of {', '.join(FORMATS)}, "
                f"got {number_format!r}"
            )
        suffix = "tops" if number_format == "int8" else "tflops"
        dense: float | None = getattr(self, f"{number_format}_{suffix}")
        if number_format == "fp64":
            return self.fp64_tensor_tflops or dense
        if dense is None or number_format == "fp32":
            return dense
        return dense * self.sparsity_factor if sparse else dense

    def flops_per_byte(self, number_format: Format) -> float | None:
        """The ridge point: operations for each byte from memory.

        Args:
            number_format: One of ``FORMATS``.

        Returns:
            Dense peak over bandwidth, or ``None`` if one is unknown.

        Examples:
            >>> gpu("H200 SXM").flops_per_byte("bf16")
            206.125
        """
        peak = self.peak_tflops(number_format)
        if peak is None or self.bandwidth_tb_s is None:
            return None
        return peak / self.bandwidth_tb_s


def _load() -> dict[str, Gpu]:
    path = Path(__file__).with_suffix(".json")
    table = json.loads(path.read_text(encoding="utf-8"))
    return {name: Gpu(name=name, **row) for name, row in table.items()}


GPUS: dict[str, Gpu] = _load()
"""The table, from oldest to newest family."""


def gpu(name: str) -> Gpu:
    """The GPU of that name.

    Args:
        name: A key of ``GPUS``.

    Raises:
        ValueError: If there is none; it names the nearest.

    Examples:
        >>> gpu("H100 SXM").nvlink_one_way_gb_s
        450.0
        >>> gpu("H100")
        Traceback (most recent call last):
        ...
        ValueError: no GPU named 'H100'; did you mean H100 SXM, H100 PCIe?
    """
    if name in GPUS:
        return GPUS[name]
    wanted = name.casefold()
    near = [known for known in GPUS if wanted and wanted in known.casefold()]
    near = near or difflib.get_close_matches(name, GPUS, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else ", ".join(GPUS)
    raise ValueError(f"no GPU named {name!r}; {hint}")
