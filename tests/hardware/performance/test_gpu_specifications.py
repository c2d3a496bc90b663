"""Products of parts agree with sheets; what the page prints is the table's."""

import dataclasses
import importlib.util
import inspect
import random
import re
from fractions import Fraction
from pathlib import Path
from typing import get_type_hints

import pytest

from warpmap.hardware.gpus import FORMATS, GPUS, gpu
from warpmap.hardware.performance.gpu_specifications import (
    BESIDE,
    CARDS,
    FMAS_PER_CLOCK,
    bandwidth_tb_s,
    gpu_specifications,
    peak_tflops,
    rebuilt_tflops,
    ridge_chart,
)

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/hardware/performance/gpu_specifications.md"


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REBUILT = [
    (name, number_format)
    for name, units in FMAS_PER_CLOCK.items()
    for number_format in units
]


@pytest.mark.parametrize(("name", "number_format"), REBUILT)
def test_rebuilt_peak_agrees_with_the_sheet(name, number_format):
    card = GPUS[name]
    sheet = card.peak_tflops(number_format)
    if name == "V100 SXM2 32GB" and number_format == "fp64":
        sheet = card.fp64_tflops  # it has no tensor cores for fp64
    assert rebuilt_tflops(card, number_format) == pytest.approx(sheet, rel=0.02)


@pytest.mark.parametrize("name", FMAS_PER_CLOCK)
def test_every_stated_peak_has_units_behind_it(name):
    stated = {f for f in FORMATS if GPUS[name].peak_tflops(f) is not None}
    assert set(FMAS_PER_CLOCK[name]) == stated


def test_products_agree_with_exact_arithmetic():
    rng = random.Random(0)
    for _ in range(100):
        sms, fmas, mhz, bits, millibits = (
            rng.randint(1, 9999) for _ in range(5)
        )
        operations = Fraction(sms) * mhz * 10**6 * fmas * 2
        assert peak_tflops(sms, fmas, mhz) == pytest.approx(
            float(operations / 10**12), rel=1e-12
        )
        moved = Fraction(bits) * millibits * 10**6 / 8
        assert bandwidth_tb_s(bits, millibits / 1000) == pytest.approx(
            float(moved / 10**12), rel=1e-12
        )


def test_an_sm_that_counts_its_multiply_adds_gives_the_peak():
    """One SM of four tensor cores, each a 4 x 4 x 4 product a clock (V100)."""
    clocks, products, sums = 1000, 0, 0
    for _ in range(4 * 2):  # 8 of them in a V100's SM
        for _ in range(4 * 4 * 4):
            products, sums = products + 1, sums + 1
    counted = clocks * (products + sums)  # in 1000 clocks at 1 MHz: 1 ms
    assert peak_tflops(1, 512, 1) == pytest.approx(counted / 1e-3 / 1e12)


def test_calculator_gives_the_sheets_back():
    for name, parts in CARDS.items():
        made = gpu_specifications(**parts)
        sheet = GPUS[name]
        assert made.peak_tflops == pytest.approx(sheet.fp16_tflops, rel=0.02)
        assert made.sparse_tflops == 2 * made.peak_tflops
        # the sheet of the H200 rounds its bandwidth down by 2.4 %
        assert made.bandwidth_tb_s == pytest.approx(
            sheet.bandwidth_tb_s, rel=0.025
        )
        assert made.flops_per_byte == pytest.approx(
            made.peak_tflops / made.bandwidth_tb_s
        )


def test_defaults_are_the_preset_of_the_h200():
    signature = inspect.signature(gpu_specifications)
    defaults = {k: p.default for k, p in signature.parameters.items()}
    assert defaults == CARDS["H200 SXM"]
    hints = get_type_hints(gpu_specifications)
    for parts in CARDS.values():
        assert all(isinstance(parts[k], int) for k in parts if hints[k] is int)


def test_cards_leave_out_what_a_sheet_does_not_state():
    assert "H20" not in CARDS  # no clock
    assert "H100 PCIe" not in CARDS  # no data rate
    assert rebuilt_tflops(gpu("B200"), "bf16") is None
    assert rebuilt_tflops(gpu("V100 SXM2 32GB"), "bf16") is None


def test_half_the_clock_is_half_the_peak_and_half_the_ridge():
    full, half = gpu_specifications(), gpu_specifications(clock_mhz=915)
    assert half.peak_tflops == full.peak_tflops / 2
    assert half.flops_per_byte == full.flops_per_byte / 2
    assert half.bandwidth_tb_s == full.bandwidth_tb_s


def test_chart_ranks_the_sheets_below_the_readers_chip():
    chart = ridge_chart(clock_mhz=100)
    mine, *sheets = chart.bars
    assert mine.name == "this chip"
    assert mine.parts[0][1] == gpu_specifications(clock_mhz=100).flops_per_byte
    assert {bar.name for bar in sheets} == set(BESIDE)
    for bar in sheets:
        card = GPUS[bar.name]
        ridge = card.fp16_tflops / card.bandwidth_tb_s
        assert bar.parts[0][1] == pytest.approx(ridge)
    lengths = [bar.parts[0][1] for bar in sheets]
    assert lengths == sorted(lengths, reverse=True)
    assert min(lengths) > 0
    chart_takes = inspect.signature(ridge_chart).parameters
    assert list(chart_takes) == list(CARDS["H200 SXM"])


@pytest.mark.parametrize("name", list(CARDS["H200 SXM"]))
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_bad_input_names_the_parameter(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be > 0 and finite"):
        gpu_specifications(**{name: value})
    with pytest.raises(ValueError, match=name):
        ridge_chart(**{name: value})


def wrong_one_operation(sms, fmas, mhz):
    return sms * fmas * mhz / 1e6


def wrong_sparse(sms, fmas, mhz):
    return 4 * sms * fmas * mhz / 1e6


def wrong_full_chip(sms, fmas, mhz):
    return 2 * (sms + 12) * fmas * mhz / 1e6  # SMs that are switched off


@pytest.mark.parametrize(
    "wrong", [wrong_one_operation, wrong_sparse, wrong_full_chip]
)
def test_the_sheet_catches_a_wrong_product(wrong):
    right = 132, 2048, 1830
    assert peak_tflops(*right) == pytest.approx(989.4, rel=0.02)
    assert wrong(*right) != pytest.approx(989.4, rel=0.02)


def test_the_sheet_catches_a_bus_counted_wrong():
    assert bandwidth_tb_s(5120, 5.238) == pytest.approx(3.35, rel=0.02)
    for wrong in (
        bandwidth_tb_s(5120, 2.619),  # one bit a clock
        bandwidth_tb_s(5120, 5.238) * 8,  # bits for bytes
        bandwidth_tb_s(5120, 5.238) / 1.024**4,  # TiB for TB
    ):
        assert wrong != pytest.approx(3.35, rel=0.02)


# -- the page, the figure, the benchmark ---------------------------------------


def page_rows():
    """Rows of the page's table of cards, as texts by heading."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| card"))
    names = [cell.strip() for cell in lines[head].strip("|").split("|")]
    for line in lines[head + 2 :]:
        if not line.startswith("|"):
            return
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        yield dict(zip(names, cells, strict=True))


def as_number(text):
    return None if text == "–" else float(text.replace(",", ""))


def test_table_of_the_page_is_the_table_of_the_package():
    rows = list(page_rows())
    assert {row["card"] for row in rows} == set(GPUS)
    for row in rows:
        card = GPUS[row["card"]]
        assert as_number(row["GB sold"]) == card.memory_gb
        assert as_number(row["TB/s"]) == card.bandwidth_tb_s
        assert as_number(row["fp16"]) == card.fp16_tflops
        assert as_number(row["fp8"]) == card.fp8_tflops
        assert as_number(row["fp4"]) == card.fp4_tflops
        assert as_number(row["NVLink GB/s"]) == card.nvlink_gb_s
        ridge = card.flops_per_byte("fp16")
        assert as_number(row["FLOP/byte"]) == round(ridge)


def test_sums_of_the_page_are_right():
    page = PAGE.read_text(encoding="utf-8")
    h200, h100 = gpu("H200 SXM"), gpu("H100 SXM")
    peak = 132 * 4 * 512 * 2 * 1830e6 / 1e12
    for said, computed in {
        "989.4": peak,
        "66.9": 132 * 128 * 2 * 1980e6 / 1e12,
        "4.92": 6144 * 2 * 3.201 / 8 / 1000,
        "79.65": 81559 / 1024,
        "85.5": 81559 * 2**20 / 1e9,
        "450": h100.nvlink_gb_s / 2,
        "63": h100.pcie_one_way_gb_s,
        "50": 400 / 8,
        "206": h200.flops_per_byte("bf16"),
    }.items():
        digits = len(said.partition(".")[2])
        assert f"{computed:.{digits}f}" == said
        assert re.search(rf"(?<![\d.]){re.escape(said)}(?![\d.]*\d)", page), (
            said
        )


def benchmark():
    return load(ROOT / "benchmarks/hardware/performance/gpu_specifications.py")


DEVICE = {
    "usable_bytes": 150_000_000_000,
    "memory_mib": 143771.0,
    "sms": 132,
    "l2_bytes": 50 << 20,
    "registers": 65536,
    "shared_bytes": 228 << 10,
    "clock_khz": 1980000,
    "memory_clock_khz": 3201000,
    "bus_bits": 6144,
    "power_w": 700.0,
    "pcie_gen": 5.0,
    "pcie_lanes": 16.0,
}


def test_benchmark_compares_in_the_units_of_the_sheet():
    made = {
        row["property"]: (row["data_sheet"], row["device"])
        for row in benchmark().compare(gpu("H200 SXM"), DEVICE)
    }
    assert made["memory in GiB"] == (141, 140.4)
    assert made["bandwidth from the bus in TB/s"] == (4.8, 4.917)
    same = set(made) - {
        "memory in GiB",
        "memory for programs in GiB",
        "bandwidth from the bus in TB/s",
    }
    assert len(same) == 9
    for name in same:
        sheet, device = made[name]
        assert sheet == device, name


def test_benchmark_leaves_out_what_a_device_does_not_tell():
    rows = benchmark().compare(gpu("H20"), {"sms": 78, "bus_bits": 6144})
    assert rows == [
        {
            "property": "SMs",
            "data_sheet": 78,
            "device": 78,
            "read_from": "CUDA driver",
        },
        {
            "property": "memory bus in bits",
            "data_sheet": "not stated",
            "device": 6144,
            "read_from": "CUDA driver",
        },
    ]


def test_benchmark_knows_every_card():
    assert set(benchmark().NAMES.values()) == set(GPUS)


def test_benchmark_without_a_gpu_says_so(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs one NVIDIA GPU"):
        benchmark().rows()


def test_result_is_a_frozen_dataclass():
    with pytest.raises(dataclasses.FrozenInstanceError):
        gpu_specifications().peak_tflops = 1
