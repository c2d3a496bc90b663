"""Softmax, forward and backward, beside PyTorch's and a plain copy.

Every matrix holds 2**28 bytes, five times the L2 cache. All implementations of
a case take turns in every round, on two inputs that alternate.
"""

import statistics
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels.normalization.softmax import softmax, softmax_reference

BYTES = 2**28
COLUMNS = (1024, 4096, 8192, 16384)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDS = 20
WARM_UPS = 3

Softmax = Callable[[Tensor], Tensor]
Run = Callable[[int], object]  # on the input of that number


def implementations() -> dict[str, Softmax]:
    """What is compared; each case compiles anew, for its own shape."""
    torch._dynamo.reset()
    return {
        "warpmap": softmax,
        "torch": lambda x: torch.nn.functional.softmax(x, dim=1),
        "torch.compile": torch.compile(softmax_reference, dynamic=False),
        "step by step": softmax_reference,
    }


def exact(x: Tensor, dy: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Result and gradient of the rows from ``first`` on, in float64."""
    rows = slice(first, first + 2**26 // x.shape[1])
    y = torch.softmax(x[rows].detach().double(), dim=1)
    g = dy[rows].double()
    return y, y * (g - (y * g).sum(dim=1, keepdim=True))


def errors(
    found: dict[str, tuple[Tensor, Tensor]], x: Tensor, dy: Tensor
) -> dict[str, list[float]]:
    """Largest error of each implementation, forward and backward.

    Raises:
        RuntimeError: If one is off by more than rounding and PyTorch's own.
    """
    worst = {name: [0.0, 0.0] for name in found}
    largest = [0.0, 0.0]
    step = 2**26 // x.shape[1]  # rows: float64 takes 512 MiB a matrix
    for first in range(0, x.shape[0], step):
        for i, wanted in enumerate(exact(x, dy, first)):
            largest[i] = max(largest[i], wanted.abs().max().item())
            for name, results in found.items():
                got = results[i][first : first + step].double()
                # the maximum of nan is nan, which no bound admits
                off = (got - wanted).abs().max().item()
                if not off <= worst[name][i]:
                    worst[name][i] = off
    for name, both in worst.items():
        for i, error in enumerate(both):
            rounding = 16 * torch.finfo(x.dtype).eps * largest[i]
            allowed = rounding + 2 * worst["torch"][i]
            if not error <= allowed:
                raise RuntimeError(
                    f"{name} is off by {error:.2g}, "
                    f"{worst['torch'][i]:.2g} in PyTorch: "
                    f"{('forward', 'backward')[i]}, {tuple(x.shape)}, {x.dtype}"
                )
    return worst


def times(runs: dict[str, tuple[Run, Run]]) -> dict[str, list[float]]:
    """Milliseconds of each, by events on the GPU, in interleaved rounds.

    Args:
        runs: What is not timed, whose result what is timed is given.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for n in range(WARM_UPS + ROUNDS):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            prepare, run = runs[name]
            given = prepare(n % 2)
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            # keeps the GPU busy until all launches are queued behind it
            torch.cuda._sleep(2_000_000)
            begin.record()
            run(given)
            end.record()
            end.synchronize()
            if n >= WARM_UPS:
                found[name].append(begin.elapsed_time(end))
            del given
    return found


def case(dtype: str, N: int) -> list[dict]:
    """Rows of one dtype and one length of rows."""
    width = DTYPES[dtype].itemsize
    M = BYTES // (N * width)
    made = {"device": DEVICE, "dtype": DTYPES[dtype]}
    torch.manual_seed(0)
    xs = [torch.randn(M, N, **made).requires_grad_() for _ in range(2)]
    dy, copy = torch.randn(M, N, **made), torch.empty(M, N, **made)
    known = implementations()

    found = {}
    for name, f in known.items():
        y = f(xs[0])
        (dx,) = torch.autograd.grad(y, xs[0], dy)
        found[name] = y.detach(), dx
        del y, dx
    worst = errors(found, xs[0], dy)
    del found

    def forward(f: Softmax) -> tuple[Run, Run]:
        return lambda n: xs[n].detach(), f

    def backward(f: Softmax) -> tuple[Run, Run]:
        def prepare(n: int) -> tuple[Tensor, Tensor]:
            return f(xs[n]), xs[n]

        return prepare, lambda given: torch.autograd.grad(*given, dy)

    plain = (lambda n: xs[n].detach(), copy.copy_)
    rows = []
    for i, (direction, moved, timed) in enumerate(
        (("forward", 2, forward), ("backward", 3, backward))
    ):
        runs = {name: timed(f) for name, f in known.items()}
        spent = times({"copy": plain, **runs})
        rates = {}
        for name, each in spent.items():
            ms = statistics.median(each)
            trips = 2 if name == "copy" else moved
            rates[name] = trips * M * N * width / ms / 1e6
            fifths = statistics.quantiles(each, n=5)
            row = {
                "pass": direction,
                "dtype": dtype,
                "M": M,
                "N": N,
                "implementation": name,
                "ms": round(ms, 4),
                "ms_p20": round(fifths[0], 4),
                "ms_p80": round(fifths[-1], 4),
                "gb_s": round(rates[name], 1),
                "share_of_copy": round(rates[name] / rates["copy"], 3),
            }
            if name != "copy":
                row["max_error"] = float(f"{worst[name][i]:.3g}")
                row["torch_max_error"] = float(f"{worst['torch'][i]:.3g}")
            rows.append(row)
    return rows


def rows() -> list[dict]:
    """Check and time every dtype, length of rows and direction.

    Returns:
        A row for each implementation: milliseconds (median, and where a fifth
        and four fifths are below), bytes a second of the two or three
        matrices that must be moved, their share of those of a copy, and the
        largest error against float64 beside that of PyTorch.

    Raises:
        RuntimeError: If there is no GPU, too little memory, or a wrong
            result.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("this benchmark needs one NVIDIA GPU")
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        raise RuntimeError("this benchmark needs 24 GiB of free GPU memory")
    return [row for d, n in product(DTYPES, COLUMNS) for row in case(d, n)]
