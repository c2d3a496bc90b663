"""How near matrix products come to the data sheet, and what holds them back.

Rows of four parts: ``size`` and ``best`` by format, ``side`` for squares with
one side changed, ``inputs`` for what numbers do to clock and power.
"""

import importlib.util
import itertools
import statistics
import subprocess
import time
from pathlib import Path

import torch

from warpmap.hardware.gpus import Gpu, gpu
from warpmap.hardware.performance.matmul_ceiling import (
    FORMATS,
    INPUTS,
    Format,
    Inputs,
    Shape,
    matrix,
    measure,
    neighbours,
    product,
    row_alignment,
    toggled_bits,
    useful_share,
)

SIZES = (1024, 2048, 4096, 6144, 8192, 12288, 16384)
STEPS = (-64, -16, -8, -1, 0, 1, 8, 16, 64)
SIDE = 4096
HEAT = 8192  # the product that runs for long
SECONDS = 2.0
SHORT = 10  # products that a chip at rest does first
QUERY = (
    "clocks.sm",
    "power.draw.instant",
    "clocks_event_reasons.sw_power_cap",
)


def _card() -> Gpu:
    """The data sheet of this GPU, by the names of a benchmark beside this."""
    file = Path(__file__).with_name("gpu_specifications.py")
    spec = importlib.util.spec_from_file_location("_specifications", file)
    beside = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(beside)
    name = torch.cuda.get_device_name(0)
    if name not in beside.NAMES:
        raise ValueError(
            f"no card for {name!r}; known: {', '.join(beside.NAMES)}"
        )
    return gpu(beside.NAMES[name])


def _check(fmt: Format) -> None:
    """Compare some rows of a product with float64."""
    a, b = (matrix("normal", 2048, 1024, fmt, "cuda") for _ in "ab")
    y = product(a, b, fmt)()[:64].double()
    exact = a[:64].double() @ b.double().T
    # fp8 may keep partial sums in fewer bits
    allowed = {"fp32": 1e-5, "tf32": 2e-3, "fp8": 2e-2, "int8": 0.0}
    error = ((y - exact).abs().max() / exact.abs().max()).item()
    if not error <= allowed.get(fmt, 1e-2):
        raise RuntimeError(f"the {fmt} product is wrong: error {error:.2g}")


def _calls(shape: Shape, tflops: float) -> int:
    """As many as take 0.3 s, but 12 to 40."""
    return int(min(40, max(12, 0.3 * tflops * 1e12 / shape.flops)))


def _size_rows(card: Gpu) -> list[dict]:
    found = []
    for fmt in FORMATS:
        _check(fmt)
        sheet = card.peak_tflops(fmt)
        if sheet is None:
            continue
        rows = []
        for n in SIZES:
            shape = Shape(n, n, n)
            tflops, said = measure(shape, fmt, calls=_calls(shape, sheet))
            rows.append(
                {
                    "part": "size",
                    "format": fmt,
                    "n": n,
                    "tflops": round(tflops, 1),
                    "sheet_tflops": sheet,
                    "share_percent": round(100 * tflops / sheet, 1),
                    "us": round(said.median_s * 1e6, 2),
                    "spread_percent": round(100 * said.spread, 1),
                    "warm_up_calls": said.warm_up,
                }
            )
            torch.cuda.empty_cache()
        best = max(rows, key=lambda row: row["tflops"])
        found += [*rows, {**best, "part": "best"}]
    return found


def _kernel_name(run) -> str:
    """Name of the longest kernel of a call, or "unknown"."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    ]
    if not kernels:
        return "unknown"
    return max(kernels, key=lambda e: e.time_range.elapsed_us()).name


def _side_rows(sms: int) -> list[dict]:
    rows = []
    square = Shape(SIDE, SIDE, SIDE)
    for shape in neighbours(SIDE, STEPS):
        tflops, said = measure(shape, calls=40)
        a = matrix("normal", shape.M, shape.K, "bf16", "cuda")
        b = matrix("normal", shape.N, shape.K, "bf16", "cuda")
        changed = [s for s in "MNK" if getattr(shape, s) != SIDE]
        rows.append(
            {
                "part": "side",
                "side": changed[0] if changed else "none",
                "M": shape.M,
                "N": shape.N,
                "K": shape.K,
                "input_row_aligned_bytes": row_alignment(shape.K, 2),
                "output_row_aligned_bytes": row_alignment(shape.N, 2),
                "predicted_share": round(
                    useful_share(shape, sms) / useful_share(square, sms), 3
                ),
                "tflops": round(tflops, 1),
                "us": round(said.median_s * 1e6, 2),
                "kernel": _kernel_name(product(a, b, "bf16"))[:80],
            }
        )
    first = rows[0]["tflops"]
    for row in rows:
        row["measured_share"] = round(row["tflops"] / first, 3)
    return rows


def _watch() -> subprocess.Popen:
    """``nvidia-smi`` that says clock, watts and cap every 100 ms."""
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    return subprocess.Popen(
        [
            "nvidia-smi",
            f"--id={f'GPU-{uuid}' if uuid else 0}",
            f"--query-gpu={','.join(QUERY)}",
            "--format=csv,noheader,nounits",
            "--loop-ms=100",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_samples(text: str) -> dict[str, float]:
    """Medians of what the watcher said in the second half of its lines.

    Args:
        text: Its output: a line a sample, values separated by commas.

    Raises:
        RuntimeError: If there are fewer than four samples.
    """
    samples = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split(",")]
        try:
            clock, watts = float(fields[0]), float(fields[1])
        except (ValueError, IndexError):  # a message, or "[N/A]"
            continue
        capped = len(fields) > 2 and fields[2] == "Active"
        samples.append((clock, watts, capped))
    if len(samples) < 4:
        raise RuntimeError(f"nvidia-smi said too little: {text[:300]!r}")
    late = samples[len(samples) // 2 :]
    clocks, watts, capped = zip(*late, strict=True)
    return {
        "clock_mhz": round(statistics.median(clocks)),
        "watts": round(statistics.median(watts)),
        "power_capped_percent": round(100 * sum(capped) / len(capped)),
    }


def _sustained(run) -> list[float]:
    """Seconds of each call, one after another for ``SECONDS``."""
    marks = [torch.cuda.Event(enable_timing=True)]
    marks[0].record()
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        run()
        marks.append(torch.cuda.Event(enable_timing=True))
        marks[-1].record()
        if len(marks) > 20:  # the queue stays short
            marks[-20].synchronize()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]


def _input_rows() -> list[dict]:
    rows = []
    shape = Shape(HEAT, HEAT, HEAT)
    for fmt in ("bf16", "fp8"):
        for inputs in INPUTS:
            rows.append(_input_row(shape, fmt, inputs))
        zeros = rows[-len(INPUTS)]["sustained_tflops"]
        for row in rows[-len(INPUTS) :]:
            row["over_zeros"] = round(row["sustained_tflops"] / zeros, 3)
    return rows


def _input_row(shape: Shape, fmt: Format, inputs: Inputs) -> dict:
    a, b = (matrix(inputs, n, shape.K, fmt, "cuda") for n in (shape.M, shape.N))
    run = product(a, b, fmt)
    run()  # whatever is chosen or loaded at first
    torch.cuda.synchronize()
    time.sleep(1)  # the chip cools, and its clock recovers
    watcher = _watch()
    try:
        times = _sustained(run)
    finally:
        watcher.terminate()
        said, _ = watcher.communicate()
    short, long = times[1 : 1 + SHORT], times[len(times) // 2 :]
    rates = [
        shape.flops / statistics.median(some) / 1e12 for some in (short, long)
    ]
    seen = read_samples(said)
    return {
        "part": "inputs",
        "format": fmt,
        "inputs": inputs,
        "toggled_bits": round(toggled_bits(a[:256]), 2),
        "short_tflops": round(rates[0], 1),
        "sustained_tflops": round(rates[1], 1),
        **seen,
        "pj_per_flop": round(seen["watts"] / rates[1], 3),
    }


def rows() -> list[dict]:
    """Measure all four parts.

    Raises:
        RuntimeError: If there is no GPU, or a product is wrong.
        ValueError: If there is no data sheet of this GPU.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    card = _card()
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    return [*_size_rows(card), *_side_rows(sms), *_input_rows()]
