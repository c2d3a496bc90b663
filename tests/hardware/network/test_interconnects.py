"""Rates are checked against published tables and a link that sends bits."""

import math
import random
import subprocess
import sys
from pathlib import Path

import pytest

from warpmap.hardware.gpus import GPUS
from warpmap.hardware.network.interconnects import (
    DATA_AND_SENT,
    LINKS,
    line_rate,
    transfer,
    transfer_chart,
    wire_bytes,
)

ROOT = Path(__file__).parents[3]

# GB/s of 16 lanes in one direction. Generations 1 to 3: Intel, PCI Express
# user guide 683111 (in Gbit/s: 32, 64, 126); 4 and 5 as in hpc-notes; 6: 242
# of 256 bytes of a flit
PCIE = {
    "PCIe 1.0 x16": 32 / 8,
    "PCIe 2.0 x16": 64 / 8,
    "PCIe 3.0 x16": 126 / 8,
    "PCIe 4.0 x16": 31.5,
    "PCIe 5.0 x16": 63.0,
    "PCIe 6.0 x16": 121.0,
}
# GB/s of one GPU, both directions, from NVIDIA's sheets
NVLINK = {
    "NVLink 1, P100": 160,
    "NVLink 2, V100": 300,
    "NVLink 3, A100": 600,
    "NVLink 4, H100 and H200": 900,
    "NVLink 5, B200": 1800,
    "NVLink-C2C, GH200": 900,
}
SOLD_IN = {
    "NVLink 2, V100": "V100 SXM2 32GB",
    "NVLink 3, A100": "A100 80GB SXM",
    "NVLink 4, H100 and H200": "H200 SXM",
    "NVLink 5, B200": "B200",
}


def send(size, lanes, gbit_s, line_code, payload_bytes, header_bytes):
    """Seconds on the wire: packets laid out, coded and dealt to the lanes."""
    stream = bytearray()
    left = size
    while left > 0:
        stream += b"h" * header_bytes
        stream += b"d" * min(left, payload_bytes)
        left -= payload_bytes
    if line_code == "8b/10b":
        bits = sum(10 for _ in stream)
    elif line_code == "128b/130b":  # two bits before each 16 bytes of a lane
        of_lane = [stream[i::lanes] for i in range(lanes)]
        blocks = sum(math.ceil(len(b) / 16) for b in of_lane)
        bits = 130 * blocks
    elif line_code == "242B/256B":
        bits = 8 * 256 * math.ceil(len(stream) / 242)
    else:
        bits = 8 * len(stream)
    return bits / lanes / (gbit_s * 1e9)


@pytest.mark.parametrize("name", PCIE)
def test_pcie_agrees_with_published_tables(name):
    assert transfer(**LINKS[name]).link_gb_s == pytest.approx(
        PCIE[name], rel=1e-3
    )


@pytest.mark.parametrize("name", NVLINK)
def test_nvlink_agrees_with_data_sheets(name):
    assert transfer(**LINKS[name]).both_gb_s == pytest.approx(NVLINK[name])


def test_every_link_is_checked_against_a_table():
    assert set(PCIE) | set(NVLINK) == set(LINKS)


@pytest.mark.parametrize("name", SOLD_IN)
def test_nvlink_agrees_with_the_table_of_gpus(name):
    sold = GPUS[SOLD_IN[name]].nvlink_gb_s
    assert transfer(**LINKS[name]).both_gb_s == pytest.approx(sold)


@pytest.mark.parametrize(
    "gpu", [g for g in GPUS.values() if g.pcie_gen], ids=lambda g: g.name
)
def test_pcie_agrees_with_the_table_of_gpus(gpu):
    link = transfer(**LINKS[f"PCIe {gpu.pcie_gen}.0 x16"])
    of_16_lanes = gpu.pcie_one_way_gb_s * 16 / gpu.pcie_lanes
    assert link.link_gb_s == pytest.approx(of_16_lanes)


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("size", [3_000_000, 3_000_001])
def test_time_agrees_with_a_link_that_sends_bits(name, size):
    link = LINKS[name]
    ours = transfer(**link, megabytes=size / 1e6, start_us=0.0)
    # the model fills the last block of each lane to its end at no cost
    last = 1.1 * link["lanes"] * 256 / (ours.raw_gb_s * 1e9)
    theirs = send(size, **link)
    assert 0 <= theirs - ours.milliseconds / 1e3 + 1e-15 <= last


WRONG = {
    "8 of 10 forgotten": lambda link: {**link, "line_code": "none"},
    "one header too small": lambda link: {**link, "header_bytes": 20},
    "one header for all": lambda link: {**link, "payload_bytes": 10**9},
    "both directions counted": lambda link: {**link, "gbit_s": 5.0},
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_link_is_caught(fault):
    link = LINKS["PCIe 1.0 x16"]
    wrong = transfer(**WRONG[fault](link), megabytes=3.0, start_us=0.0)
    theirs = send(3_000_000, **link)
    assert wrong.milliseconds / 1e3 != pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize(
    # flits of 16 bytes: the shares that WikiChip gives for the first NVLink
    ("payload", "share"),
    [(256, 0.9412), (64, 0.80)],
)
def test_packets_of_nvlink_have_the_published_efficiency(payload, share):
    link = {**LINKS["NVLink 1, P100"], "payload_bytes": payload}
    moved = transfer(**link)
    assert moved.payload_gb_s / moved.link_gb_s == pytest.approx(
        share, abs=5e-5
    )


def test_wire_bytes_counts_every_header():
    rng = random.Random(0)
    for _ in range(200):
        size, payload = rng.randint(1, 5000), rng.randint(1, 600)
        header = rng.randint(0, 40)
        packets = len(range(0, size, payload))
        assert wire_bytes(size, payload, header) == size + packets * header
    assert wire_bytes(0, 256, 24) == 0


def test_a_large_tensor_reaches_the_payload_rate_and_a_small_one_does_not():
    large = transfer(megabytes=1e6)
    assert large.reached_gb_s == pytest.approx(large.payload_gb_s, rel=1e-4)
    assert transfer(megabytes=0.001).reached_gb_s < large.payload_gb_s / 100


@pytest.mark.parametrize("name", LINKS)
def test_half_speed_is_half_of_the_speed(name):
    size = transfer(**LINKS[name]).half_speed_mb
    half = transfer(**LINKS[name], megabytes=size)
    assert half.reached_gb_s == pytest.approx(half.payload_gb_s / 2, rel=1e-3)


def test_chart_adds_up_to_the_time():
    chart = transfer_chart(**LINKS["PCIe 3.0 x16"], megabytes=7.0)
    here = transfer(**LINKS["PCIe 3.0 x16"], megabytes=7.0)
    total = sum(length for _, length in chart.bars[0].parts)
    assert total == pytest.approx(here.milliseconds)
    for bar in chart.bars:
        assert all(length >= -1e-12 for _, length in bar.parts)


def test_line_codes_are_what_their_names_say():
    for name, (data, sent) in DATA_AND_SENT.items():
        if name != "none":
            numbers = name.replace("b", "").replace("B", "").split("/")
            assert (str(data), str(sent)) == tuple(numbers)
    assert line_rate(1, 8.0, "none") == 1.0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"lanes": 0}, "lanes must be at least 1, got 0"),
        ({"payload_bytes": 0}, "payload_bytes must be at least 1, got 0"),
        ({"header_bytes": -1}, "header_bytes must not be negative, got -1"),
        ({"gbit_s": 0.0}, "gbit_s must be positive, got 0.0"),
        ({"megabytes": math.inf}, "megabytes must be positive, got inf"),
        ({"megabytes": math.nan}, "megabytes must be positive, got nan"),
        ({"megabytes": 1e-9}, "megabytes must hold a byte, got 1e-09"),
        ({"start_us": -1.0}, "start_us must not be negative, got -1.0"),
        ({"line_code": "64b/66b"}, "line_code must be one of 8b/10b"),
    ],
)
def test_bad_numbers_are_named(wrong, says):
    for call in (transfer, transfer_chart):
        with pytest.raises(ValueError, match=says):
            call(**wrong)


def test_runs_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.hardware.network.interconnects import transfer\n"
        "print(transfer(lanes=8, line_code='none').link_gb_s)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "32.0"
