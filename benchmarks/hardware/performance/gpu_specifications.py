"""What the driver says of this GPU beside its data sheet, and two real rates.

Static properties come from the CUDA driver, ``nvidia-smi`` and PyTorch. The
matrix product and the copy show how far real work stays below the peaks.
"""

import ctypes
import statistics
import subprocess

import torch

from warpmap.hardware.gpus import GIB, Gpu, gpu
from warpmap.hardware.performance.gpu_specifications import bandwidth_tb_s

# what PyTorch calls a card, and what the table does
NAMES = {
    "Tesla V100-SXM2-32GB": "V100 SXM2 32GB",
    "NVIDIA A100-SXM4-40GB": "A100 40GB SXM",
    "NVIDIA A100-SXM4-80GB": "A100 80GB SXM",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H200": "H200 SXM",
    "NVIDIA H800": "H800 SXM",
    "NVIDIA H20": "H20",
    "NVIDIA L40S": "L40S",
    "NVIDIA L4": "L4",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA B200": "B200",
    "NVIDIA GB200": "GB200",
}

# CUdevice_attribute of cuda.h
ATTRIBUTES = {
    "clock_khz": 13,
    "sms": 16,
    "memory_clock_khz": 36,
    "bus_bits": 37,
    "l2_bytes": 38,
    "shared_bytes": 81,
    "registers": 82,
}
QUERIES = {
    "memory_mib": "memory.total",
    "power_w": "power.default_limit",
    "pcie_gen": "pcie.link.gen.max",
    "pcie_lanes": "pcie.link.width.max",
}
MATRIX = 8192
COPY_BYTES = 4 * GIB
ROUNDS = 30


def driver_attributes():
    """Integers that the CUDA driver reports of device 0."""
    torch.cuda.init()
    cuda = ctypes.CDLL("libcuda.so.1")
    read = {}
    for name, attribute in ATTRIBUTES.items():
        value = ctypes.c_int()
        failed = cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0)
        if not failed and value.value > 0:
            read[name] = value.value
    return read


def smi():
    """Numbers that ``nvidia-smi`` reports; what it cannot tell is left out."""
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    done = subprocess.run(
        [
            "nvidia-smi",
            f"--id={f'GPU-{uuid}' if uuid else 0}",
            f"--query-gpu={','.join(QUERIES.values())}",
            "--format=csv,noheader,nounits",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    read = {}
    for name, text in zip(QUERIES, done.stdout.split(","), strict=True):
        try:
            read[name] = float(text)
        except ValueError:  # "[N/A]"
            continue
    return read


def compare(card: Gpu, device: dict[str, float]) -> list[dict]:
    """Rows of static properties: the table's figure beside the device's."""
    bus, clock = device.get("bus_bits"), device.get("memory_clock_khz")
    in_units = {
        "memory in GiB": (device.get("memory_mib"), 1024, "nvidia-smi"),
        "memory for programs in GiB": (
            device.get("usable_bytes"),
            GIB,
            "PyTorch",
        ),
        "SMs": (device.get("sms"), 1, "CUDA driver"),
        "L2 cache in MiB": (device.get("l2_bytes"), 1 << 20, "CUDA driver"),
        "registers of an SM in KiB": (
            device.get("registers"),
            256,  # 4 bytes each
            "CUDA driver",
        ),
        "shared memory of an SM in KiB": (
            device.get("shared_bytes"),
            1024,
            "CUDA driver",
        ),
        "highest clock in MHz": (device.get("clock_khz"), 1000, "CUDA driver"),
        "memory bus in bits": (bus, 1, "CUDA driver"),
        "power limit in W": (device.get("power_w"), 1, "nvidia-smi"),
        "PCI Express generation": (device.get("pcie_gen"), 1, "nvidia-smi"),
        "PCI Express lanes": (device.get("pcie_lanes"), 1, "nvidia-smi"),
    }
    sheet = {
        "memory in GiB": card.memory_gb,
        "memory for programs in GiB": card.memory_gb,
        "SMs": card.sms,
        "L2 cache in MiB": card.l2_mb,
        "registers of an SM in KiB": card.registers_kib,
        "shared memory of an SM in KiB": card.shared_kib,
        "highest clock in MHz": card.boost_clock_mhz,
        "memory bus in bits": card.memory_bus_bits,
        "power limit in W": card.power_w,
        "PCI Express generation": card.pcie_gen,
        "PCI Express lanes": card.pcie_lanes,
    }
    rows = [
        row(name, sheet[name], round(value / unit, 2), source)
        for name, (value, unit, source) in in_units.items()
        if value is not None
    ]
    if bus and clock:
        # two bits a pin and clock
        rebuilt = bandwidth_tb_s(int(bus), 2 * clock / 1e6)
        rows.append(
            row(
                "bandwidth from the bus in TB/s",
                card.bandwidth_tb_s,
                round(rebuilt, 3),
                "CUDA driver",
            )
        )
    return rows


def row(name, sheet, device, source):
    """One row; a figure that no sheet states is said to be so."""
    return {
        "property": name,
        "data_sheet": "not stated" if sheet is None else sheet,
        "device": int(device) if device == int(device) else device,
        "read_from": source,
    }


def median_seconds(run):
    """Median time of a call on the GPU."""
    for _ in range(5):
        run()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measured(card):
    """Rows of a bf16 product and of a copy, each checked."""
    a, b = (
        torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    )
    out = torch.empty_like(a)
    seconds = median_seconds(lambda: torch.matmul(a, b, out=out))
    some = slice(0, 64)
    right = a[some].double() @ b.double()
    # one rounding to bf16 is 2^-9 of the value; sums may cancel
    error = (out[some].double() - right).abs().max() / right.abs().max()
    if error > 2**-7:
        raise RuntimeError(f"the product is wrong: relative error {error:.3g}")
    tflops = 2 * MATRIX**3 / seconds / 1e12

    x = torch.randint(127, (COPY_BYTES // 2,), device="cuda", dtype=torch.uint8)
    y = torch.empty_like(x)
    seconds = median_seconds(lambda: y.copy_(x))
    if not torch.equal(x, y):
        raise RuntimeError("the copy differs from its source")
    return [
        row(
            f"bf16 product of {MATRIX} x {MATRIX} in TFLOP/s",
            card.bf16_tflops,
            round(tflops, 1),
            "measured",
        ),
        row(
            "copy, read and written, in TB/s",
            card.bandwidth_tb_s,
            round(COPY_BYTES / seconds / 1e12, 3),
            "measured",
        ),
    ]


def rows():
    """Rows of property, data_sheet, device and read_from."""
    if not torch.cuda.is_available():
        raise RuntimeError("needs one NVIDIA GPU, but PyTorch sees none")
    name = torch.cuda.get_device_name(0)
    if name not in NAMES:
        raise ValueError(f"no card for {name!r}; known: {', '.join(NAMES)}")
    card = gpu(NAMES[name])
    properties = torch.cuda.get_device_properties(0)
    device = {
        "usable_bytes": properties.total_memory,
        **driver_attributes(),
        **smi(),
    }
    if device.get("sms") != properties.multi_processor_count:
        raise RuntimeError(
            f"the driver's device 0 is not PyTorch's: {device.get('sms')} SMs "
            f"and {properties.multi_processor_count}; unset "
            "CUDA_VISIBLE_DEVICES"
        )
    return compare(card, device) + measured(card)
