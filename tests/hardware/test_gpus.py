"""The table agrees with fixtures typed from other places, and with itself."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from warpmap.hardware.gpus import FORMATS, GIB, GPUS, Gpu, gpu

ROOT = Path(__file__).parents[2]

# SMs, MHz, FMAs an SM and clock, TFLOP/s: A100 and V100 from the
# A100 white paper; H100 clocks from llm.c's mfu.h, which cites the Hopper
# white paper; Ada and Blackwell from the appendices of their white papers
PRODUCTS = [
    ("V100 SXM2 32GB", "fp32_tflops", 80, 1530, 64, 15.7),
    ("V100 SXM2 32GB", "fp16_tflops", 80, 1530, 8 * 64, 125),
    ("A100 40GB SXM", "fp64_tflops", 108, 1410, 32, 9.7),
    ("A100 40GB SXM", "fp64_tensor_tflops", 108, 1410, 4 * 16, 19.5),
    ("A100 80GB SXM", "fp32_tflops", 108, 1410, 64, 19.5),
    ("A100 80GB SXM", "tf32_tflops", 108, 1410, 4 * 128, 156),
    ("A100 80GB SXM", "bf16_tflops", 108, 1410, 4 * 256, 312),
    ("A100 80GB SXM", "int8_tops", 108, 1410, 4 * 512, 624),
    ("H100 SXM", "fp64_tflops", 132, 1980, 64, 33.5),
    ("H100 SXM", "fp32_tflops", 132, 1980, 128, 66.9),
    ("H100 SXM", "tf32_tflops", 132, 1830, 4 * 256, 494.7),
    ("H100 SXM", "bf16_tflops", 132, 1830, 4 * 512, 989.4),
    ("H100 SXM", "fp8_tflops", 132, 1830, 4 * 1024, 1978.9),
    ("H100 PCIe", "fp32_tflops", 114, 1755, 128, 51),
    ("H100 PCIe", "bf16_tflops", 114, 1620, 4 * 512, 756),
    ("H200 SXM", "bf16_tflops", 132, 1830, 4 * 512, 989.4),
    ("L40S", "fp32_tflops", 142, 2520, 128, 91.6),
    ("L40S", "bf16_tflops", 142, 2520, 4 * 128, 362.05),
    ("L40S", "fp8_tflops", 142, 2520, 4 * 256, 733),
    ("L4", "fp32_tflops", 58, 2040, 128, 30.3),
    ("L4", "bf16_tflops", 58, 2040, 4 * 128, 121),
    ("RTX 4090", "fp32_tflops", 128, 2520, 128, 82.6),
    ("RTX 4090", "fp16_tflops", 128, 2520, 4 * 64, 165.2),
    ("RTX 4090", "int8_tops", 128, 2520, 4 * 256, 660.6),
    ("RTX 5090", "fp32_tflops", 170, 2407, 128, 104.8),
    ("RTX 5090", "bf16_tflops", 170, 2407, 4 * 64, 209.5),
    ("RTX 5090", "fp4_tflops", 170, 2407, 4 * 512, 1676),
]

# bits, MHz, transfers a clock, TB/s: stacks of HBM have 1024 bits, GDDR
# chips 32; memory clocks as nvidia-smi and deviceQuery report them
BUSES = [
    ("V100 SXM2 32GB", 4 * 1024, 877, 2, 0.9),
    ("A100 40GB SXM", 5 * 1024, 1215, 2, 1.555),
    ("A100 80GB SXM", 5 * 1024, 1593, 2, 2.039),
    ("H100 SXM", 5 * 1024, 2619, 2, 3.35),
    ("L40S", 12 * 32, 9000, 2, 0.864),
    ("L4", 6 * 32, 6250, 2, 0.3),
    ("RTX 4090", 12 * 32, 10500, 2, 1.008),
    ("RTX 5090", 16 * 32, 14000, 2, 1.792),
    ("B200", 7680, 3996, 2, 7.7),
]

# MiB that nvidia-smi reports: https://github.com/modal-labs/modal-client/
# pull/2797, and the sources of memory_gib
MIB = {
    "A100 40GB SXM": 40960,
    "A100 80GB SXM": 81920,
    "H100 SXM": 81559,
    "H100 PCIe": 81559,
    "H200 SXM": 143771,
    "H20": 97871,
    "L40S": 46068,
    "L4": 23034,
    "RTX 4090": 24564,
    "RTX 5090": 32607,
    "B200": 183359,
    "GB200": 189471,
}

# with sparsity, as the product pages of NVIDIA print it
PRINTED = [
    ("A100 80GB SXM", "bf16", 624),
    ("H100 SXM", "bf16", 1979),
    ("H100 SXM", "fp8", 3958),
    ("H100 PCIe", "bf16", 1513),
    ("H200 SXM", "int8", 3958),
    ("L40S", "fp8", 1466),
    ("L4", "bf16", 242),
    ("RTX 5090", "fp4", 3352),
    ("B200", "fp4", 18000),
    ("GB200", "fp4", 1_440_000 / 72),
]

ALL = [pytest.param(card, id=name) for name, card in GPUS.items()]


def is_product(card, field, sms, mhz, fmas, sheet):
    """Whether table, sheet and product of units agree within 2 %."""
    product = sms * mhz * 1e6 * fmas * 2 / 1e12
    value = getattr(card, field)
    return value == pytest.approx(sheet, rel=0.02) and (
        value == pytest.approx(product, rel=0.02)
    )


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda c: f"{c[0]} {c[1]}")
def test_peak_is_the_product_of_units_and_clock(case):
    name, *product = case
    assert is_product(GPUS[name], *product)


@pytest.mark.parametrize("case", BUSES, ids=lambda c: c[0])
def test_bandwidth_is_the_product_of_bus_and_rate(case):
    name, bits, mhz, transfers, sheet = case
    card = GPUS[name]
    product = bits * mhz * 1e6 * transfers / 8 / 1e12
    assert card.memory_bus_bits == bits
    assert card.memory_pin_gbit_s == pytest.approx(mhz * transfers / 1000)
    assert card.bandwidth_tb_s == pytest.approx(sheet)
    assert card.bandwidth_tb_s == pytest.approx(product, rel=0.02)


def test_the_h200_sheet_promises_less_than_its_pins():
    card = gpu("H200 SXM")
    product = 6 * 1024 * 3201e6 * 2 / 8 / 1e12
    assert product == pytest.approx(4.917, abs=1e-3)
    assert 0.97 < card.bandwidth_tb_s / product < 0.98


@pytest.mark.parametrize(("name", "number_format", "printed"), PRINTED)
def test_printed_peak_is_the_sparse_one(name, number_format, printed):
    card = GPUS[name]
    sparse = card.peak_tflops(number_format, sparse=True)
    assert sparse == pytest.approx(printed, rel=0.01)
    assert card.peak_tflops(number_format) == pytest.approx(sparse / 2)


@pytest.mark.parametrize("card", ALL)
def test_dense_is_at_most_sparse(card):
    for number_format in FORMATS:
        dense = card.peak_tflops(number_format)
        sparse = card.peak_tflops(number_format, sparse=True)
        assert (dense is None) == (sparse is None)
        assert dense is None or 0 < dense <= sparse


@pytest.mark.parametrize("card", ALL)
def test_fewer_bits_are_never_slower(card):
    ladder = ("fp32", "tf32", "bf16", "fp8", "fp4")
    rates = [card.peak_tflops(f) for f in ladder]
    known = [rate for rate in rates if rate is not None]
    assert known == sorted(known)
    assert card.bf16_tflops in (None, card.fp16_tflops)


@pytest.mark.parametrize("name", MIB)
def test_memory_is_what_the_driver_reports(name):
    assert GPUS[name].memory_gib == pytest.approx(MIB[name] / 1024, abs=0.005)
    # half a unit of the last digit that the table keeps
    error = abs(GPUS[name].memory_bytes - MIB[name] * 2**20)
    assert error <= 0.005 * GIB


@pytest.mark.parametrize("name", MIB)
def test_gb_on_a_sheet_are_gib_but_for_what_is_set_aside(name):
    """80 GB are not 80 * 10^9 bytes: 7 % more are there."""
    card = GPUS[name]
    left = card.memory_gib / card.memory_gb
    # GDDR6 server cards keep 1 of 16 bytes for error correction
    kept = 15 / 16 if name in ("L4", "L40S") else 1
    assert kept - 0.01 < left <= kept
    if kept == 1:
        assert card.memory_bytes > 1.06 * card.memory_gb * 1e9


def test_without_a_report_memory_is_read_as_decimal():
    card = dataclasses.replace(gpu("H100 SXM"), memory_gib=None)
    assert card.memory_bytes == 80_000_000_000
    assert dataclasses.replace(card, memory_gb=None).memory_bytes is None


def test_links_are_halved_for_one_direction():
    # 18 links of 25 GB/s each way on Hopper, 6 on V100, 8 left on H800
    assert gpu("H100 SXM").nvlink_one_way_gb_s == 18 * 25
    assert gpu("V100 SXM2 32GB").nvlink_one_way_gb_s == 6 * 25
    assert gpu("H800 SXM").nvlink_one_way_gb_s == 8 * 25
    assert gpu("B200").nvlink_one_way_gb_s == 18 * 50
    assert gpu("L40S").nvlink_one_way_gb_s == 0
    nothing = dataclasses.replace(gpu("L40S"), nvlink_gb_s=None, pcie_gen=None)
    assert nothing.nvlink_one_way_gb_s is None
    assert nothing.pcie_one_way_gb_s is None


def test_pcie_agrees_with_the_usual_table():
    assert gpu("V100 SXM2 32GB").pcie_one_way_gb_s == pytest.approx(15.75, 1e-3)
    assert gpu("A100 80GB SXM").pcie_one_way_gb_s == pytest.approx(31.5, 1e-3)
    assert gpu("H100 SXM").pcie_one_way_gb_s == pytest.approx(63.0, 1e-3)


@pytest.mark.parametrize("card", ALL)
def test_units_are_plausible(card):
    """A figure in the wrong unit is off by 8, 1000 or more."""
    ranges = {
        "sms": (40, 200),
        "boost_clock_mhz": (1000, 3000),
        "tensor_clock_mhz": (1000, 3000),
        "memory_gb": (20, 200),
        "memory_gib": (20, 200),
        "memory_bus_bits": (128, 8192),
        "memory_pin_gbit_s": (1.5, 32),
        "bandwidth_tb_s": (0.25, 9),
        "l2_mb": (5, 130),
        "registers_kib": (256, 256),
        "shared_kib": (96, 228),
        "power_w": (60, 1300),
        "year": (2017, 2026),
    }
    for field, (low, high) in ranges.items():
        value = getattr(card, field)
        assert value is None or low <= value <= high, field


def has_sources(card):
    """Whether every figure has a source that is an address or a report."""
    known = re.compile(r"https?://\S+|nvidia-smi reports .+\d.+")
    fields = {field.name for field in dataclasses.fields(Gpu)}
    figures = fields - {"name", "source", "sources", "measured"}
    return bool(
        known.fullmatch(card.source)
        and all(
            key in figures
            and getattr(card, key) is not None
            and known.fullmatch(text)
            for key, text in card.sources.items()
        )
    )


@pytest.mark.parametrize("card", ALL)
def test_every_figure_has_a_source(card):
    assert has_sources(card)
    # a sheet never says what the driver reports
    assert ("memory_gib" in card.sources) == (card.memory_gib is not None)


def test_json_has_no_field_that_is_not_used():
    path = Path(__file__).parents[2] / "src/warpmap/hardware/gpus.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    assert list(table) == list(GPUS)
    for name, card in GPUS.items():
        assert card.name == name
        assert None not in table[name].values()


H100 = gpu("H100 SXM")


@pytest.mark.parametrize(
    "fault",
    [
        {"bf16_tflops": 1978.9},  # the sparse figure
        {"bf16_tflops": 756.0},  # the PCIe card's
        {"bf16_tflops": 494.7},  # a multiply-add counted as one
        {"bf16_tflops": 132 * 1.98 * 4.096},  # the other clock
    ],
    ids=str,
)
def test_a_wrong_peak_is_caught(fault):
    wrong = dataclasses.replace(H100, **fault)
    right = ("bf16_tflops", 132, 1830, 4 * 512, 989.4)
    assert is_product(H100, *right)
    assert not is_product(wrong, *right)


@pytest.mark.parametrize(
    "fault",
    [
        {"source": "a colleague"},
        {"sources": {"sms": ""}},
        {"sources": {"smes": "https://example.org"}},
        {"sources": {"fp4_tflops": "https://example.org"}},
    ],
    ids=str,
)
def test_a_missing_source_is_caught(fault):
    assert not has_sources(dataclasses.replace(H100, **fault))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("H100", "did you mean H100 SXM, H100 PCIe"),
        ("h200 sxm", "did you mean H200 SXM"),
        ("RTX 4080", "did you mean RTX 4090"),
        ("", "no GPU named ''"),
        ("TPU v5p", "no GPU named 'TPU v5p'"),
    ],
)
def test_unknown_name_says_the_nearest(name, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        gpu(name)


def test_unknown_format_says_the_known():
    with pytest.raises(ValueError, match="number_format must be one of fp64"):
        H100.peak_tflops("bf8")
    with pytest.raises(ValueError, match="number_format"):
        H100.flops_per_byte("fp6")


def test_what_is_unknown_stays_unknown():
    assert gpu("V100 SXM2 32GB").peak_tflops("bf16") is None
    assert gpu("V100 SXM2 32GB").flops_per_byte("fp8") is None
    assert gpu("H100 SXM").peak_tflops("fp32", sparse=True) == 66.9
    assert gpu("H100 SXM").peak_tflops("fp64") == 66.9
    assert gpu("H800 SXM").peak_tflops("fp64") is None


def test_what_was_measured_is_what_the_record_says():
    file = "docs/records/h200/hardware/performance/gpu_specifications.json"
    rows = json.loads((ROOT / file).read_text("utf-8"))["rows"]
    said = {row["property"]: row["device"] for row in rows}
    assert GPUS["H200 SXM"].measured == {
        "bf16_tflops": said["bf16 product of 8192 x 8192 in TFLOP/s"],
        "bandwidth_tb_s": said["copy, read and written, in TB/s"],
    }
