"""Times implementations of one thing against each other on a GPU.

A benchmark's ``cases()`` yields ``Case``s. Each is checked against float64,
then everybody takes turns, in an order shuffled every round: this
implementation, its peers, itself once more as a control, and a plain copy (or
read, or matrix product) as the ceiling. What is compared is the median of the
rounds' ratios, since a GPU's clock moves between rounds and not within one.
"""

import gc
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROUNDS = 25
WARM_UPS = 3
SHORT_MS = 0.05  # shorter calls go into a CUDA graph
CONTROL = "warpmap again"

Results = Tensor | tuple[Tensor, ...]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Prepared:
    """A function of which only the second half is timed."""

    prepare: Function  # from the inputs to the arguments of `run`
    run: Function


@dataclass(frozen=True)
class Missing:
    """A peer that cannot be asked, and why."""

    reason: str


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        labels: What the record's rows are chosen and drawn by.
        inputs: Makes fresh random inputs on the GPU; called several times.
        ours: Takes the inputs; returns a tensor or a tuple of tensors.
        peers: The same from others; the first is PyTorch's own.
        exact: The results in float64, from the same inputs. Integers must be
            equal.
        moved: Bytes that must be moved: inputs read once, outputs written
            once.
        flops: Operations, where the ceiling is "matmul".
        ceiling: "copy", "read" or "matmul".
        rounding: How many roundings of the largest result an error may be, on
            top of twice PyTorch's own.
        same: Whether peers compute the same numbers; where they draw others,
            only ours is checked.
        memory: Whether to record what each allocates at its peak.
    """

    labels: Mapping[str, str | int]
    inputs: Callable[[], tuple[Any, ...]]
    ours: Function | Prepared
    peers: Mapping[str, Function | Prepared | Missing]
    exact: Callable[..., Results]
    moved: int = 0
    flops: int = 0
    ceiling: str = "copy"
    rounding: float = 16
    same: bool = True
    memory: bool = False


def optional(package: str, make: Callable[[], Function]) -> Function | Missing:
    """A peer from a package that may not be installed.

    Args:
        package: Its name, for what the record says.
        make: Imports it and returns the function.
    """
    try:
        return make()
    except Exception as error:  # a package may fail in its own way
        return Missing(f"{package}: {type(error).__name__}: {error}"[:200])


def compiled(f: Function) -> Function:
    """``torch.compile`` at its best for fixed shapes; compiles when called."""
    return torch.compile(
        f, dynamic=False, mode="max-autotune-no-cudagraphs", fullgraph=True
    )


def gradient(f: Function, wrt: Sequence[int] | None = None) -> Prepared:
    """The backward pass alone, as a function of ``(*inputs of f, dy)``.

    Args:
        f: Returns one tensor, or several of which the first counts.
        wrt: Which inputs get a gradient; default: every floating tensor.
    """

    def prepare(*inputs: Any) -> tuple[Any, ...]:
        *args, dy = inputs
        chosen = (
            [
                i
                for i, a in enumerate(args)
                if isinstance(a, Tensor) and a.is_floating_point()
            ]
            if wrt is None
            else list(wrt)
        )
        leaves = [
            a.detach().requires_grad_() if i in chosen else a
            for i, a in enumerate(args)
        ]
        y = f(*leaves)
        y = y[0] if isinstance(y, tuple) else y
        return y, [leaves[i] for i in chosen], dy

    def run(y: Tensor, leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, leaves, dy, retain_graph=True)

    return Prepared(prepare, run)


def _split(f: Function | Prepared) -> Prepared:
    return f if isinstance(f, Prepared) else Prepared(lambda *args: args, f)


def _clone(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies that keep their layout and whether they need a gradient."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            new = torch.empty_strided(
                value.shape,
                value.stride(),
                dtype=value.dtype,
                device=value.device,
            )
            return new.copy_(value.detach()).requires_grad_(value.requires_grad)
        if isinstance(value, list | tuple):
            return type(value)(copy(v) for v in value)
        return value

    return tuple(copy(value) for value in inputs)


def _tensors(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [r for r in results if isinstance(r, Tensor)]


def _call(f: Prepared, inputs: tuple[Any, ...], poisoned: bool) -> list[Tensor]:
    """The results on copies of the inputs, perhaps in memory full of NaN."""
    given = f.prepare(*_clone(inputs))
    if poisoned:  # PyTorch fills what it allocates in this mode
        torch.set_deterministic_debug_mode("warn")
    try:
        return [t.detach() for t in _tensors(f.run(*given))]
    finally:
        torch.set_deterministic_debug_mode("default")


def _error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest error, as a share of the largest exact value.

    Infinite where a result is missing or no number, or a whole number wrong.
    """
    if len(got) < len(exact):
        return math.inf
    worst = 0.0
    for ours, right in zip(got, exact, strict=False):
        if ours.shape != right.shape:
            return math.inf
        if not right.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(ours, right) else math.inf)
        elif right.numel():
            off = (ours.double() - right).abs().max().item()
            largest = right.abs().max().item()
            share = off / largest if largest else off
            worst = max(worst, math.inf if math.isnan(share) else share)
    return worst


def _check(
    case: Case, known: Mapping[str, Prepared]
) -> tuple[dict[str, float], dict[str, str]]:
    """Errors by implementation, and what those said that failed.

    Raises:
        RuntimeError: If ours is wrong.
    """
    inputs = case.inputs()
    exact = _tensors(case.exact(*_clone(inputs)))
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    eps = 0.0
    for name, f in known.items():
        try:
            got = _call(f, inputs, poisoned=name == "warpmap")
        except Exception as error:
            if name == "warpmap":
                raise
            failed[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        if name == "warpmap":
            eps = max(
                (
                    torch.finfo(t.dtype).eps
                    for t in got[: len(exact)]
                    if t.is_floating_point()
                ),
                default=0.0,
            )
        if case.same or name == "warpmap":
            errors[name] = _error(got, exact)
        del got
    del exact
    torchs = errors.get(next(iter(case.peers), ""), 0.0)
    # but not by a PyTorch that is wrong itself
    allowed = case.rounding * eps + (2 * torchs if torchs < 0.3 else 0)
    for name, share in errors.items():
        if share <= allowed:
            continue
        says = f"error {share:.2g} of the largest value, allowed {allowed:.2g}"
        if name == "warpmap":
            raise RuntimeError(f"{dict(case.labels)}: ours is wrong: {says}")
        failed[name] = f"wrong: {says}"
    return errors, failed


def _ceiling(case: Case) -> Prepared:
    """What is hard to beat: takes the inputs and does not look at them."""
    if case.ceiling == "matmul":
        a, b = (
            torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
            for _ in "ab"
        )
        return Prepared(lambda *_: (), lambda: torch.matmul(a, b))
    if case.ceiling == "read":
        n = max(1, case.moved // 4)
        return Prepared(lambda *_: (torch.randn(n, device="cuda"),), torch.sum)
    if case.ceiling == "copy":
        n = max(1, case.moved // 4)
        return Prepared(
            lambda *_: (
                torch.randn(n, device="cuda", dtype=torch.bfloat16),
                torch.empty(n, device="cuda", dtype=torch.bfloat16),
            ),
            lambda x, y: y.copy_(x),
        )
    raise ValueError(f"ceiling must be copy, read or matmul: {case.ceiling!r}")


def _once(f: Prepared, given: Any, stream: torch.cuda.Stream) -> float:
    """Milliseconds of one call, its launches queued before it begins."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
    torch.cuda._sleep(8_000_000)  # 4 ms, in which the CPU launches
    begin.record(stream)
    f.run(*given)
    end.record(stream)
    end.synchronize()
    return float(begin.elapsed_time(end))


def _graph(
    f: Prepared, given: Sequence[Any], stream: torch.cuda.Stream
) -> Callable[[], float]:
    """A graph of one call on every set; it returns milliseconds a call."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for arguments in given:
            f.run(*arguments)

    def replay() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in "be")
        torch.cuda._sleep(200_000)
        begin.record(stream)
        graph.replay()
        end.record(stream)
        end.synchronize()
        return float(begin.elapsed_time(end)) / len(given)

    return replay


@dataclass
class _Contestant:
    """An implementation with arguments ready for every set of inputs."""

    f: Prepared
    given: list[Any]
    replay: Callable[[], float] | None = None
    times: list[float] = field(default_factory=list)

    def time(self, turn: int, stream: torch.cuda.Stream) -> float:
        if self.replay:
            return self.replay()
        return _once(self.f, self.given[turn % len(self.given)], stream)


def _peak_mib(f: Prepared, given: Any) -> float:
    """What a call allocates at its peak, beyond what is held already."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f.run(*given)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _ratio(of: Sequence[float], to: Sequence[float]) -> float:
    """How many times as long ``of`` takes: the median of the rounds."""
    return statistics.median(a / b for a, b in zip(of, to, strict=True))


def _spread(of: Sequence[float], to: Sequence[float]) -> float:
    """How far from 1 the ratio of four rounds in five lies, at most."""
    ratios = [a / b for a, b in zip(of, to, strict=True)]
    tenths = statistics.quantiles(ratios, n=10, method="inclusive")
    return max(abs(tenths[0] - 1), abs(tenths[-1] - 1))


def _measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """The rows of one case."""
    torch._dynamo.reset()
    known = {"warpmap": _split(case.ours)}
    missing: dict[str, str] = {}
    for name, peer in case.peers.items():
        if isinstance(peer, Missing):
            missing[name] = peer.reason
        else:
            known[name] = _split(peer)
    errors, failed = _check(case, known)
    for name, reason in failed.items():
        if not reason.startswith("wrong"):
            del known[name]
    gc.collect()
    torch.cuda.empty_cache()

    stream = torch.cuda.Stream()  # a graph cannot be captured on the default
    with torch.cuda.stream(stream):
        # inputs that rotate, up to 64 sets: four times as large as the L2
        # cache in all, unless they are very small
        l2 = torch.cuda.get_device_properties().L2_cache_size
        sets = min(64, max(2, math.ceil(4 * l2 / max(case.moved, 1))))
        made = [case.inputs() for _ in range(sets)]
        known["ceiling"] = _ceiling(case)
        known[CONTROL] = known["warpmap"]
        contestants: dict[str, _Contestant] = {}
        peaks: dict[str, float] = {}
        for name, f in known.items():
            try:
                one = _Contestant(f, [f.prepare(*inputs) for inputs in made])
                for turn in range(WARM_UPS):
                    one.time(turn, stream)
            except Exception as error:  # not on copies, but on another stream
                if name not in case.peers:
                    raise
                failed[name] = f"{type(error).__name__}: {error}"[:200]
                torch.cuda.synchronize()
                continue
            contestants[name] = one
            if case.memory:
                peaks[name] = _peak_mib(one.f, one.given[0])
        ours = contestants["warpmap"]
        estimate = statistics.median(ours.time(n, stream) for n in range(5))
        launch = "stream"
        if estimate < SHORT_MS:
            launch = "graph"
            for name, one in list(contestants.items()):
                try:
                    one.replay = _graph(one.f, one.given, stream)
                except Exception as error:
                    if name not in case.peers:
                        raise
                    failed[name] = f"no CUDA graph: {error}"[:200]
                    torch.cuda.synchronize()
                    del contestants[name]
        order = list(contestants)
        for turn in range(WARM_UPS + rounds):
            random.shuffle(order)
            for place, name in enumerate(order):
                # nobody gets inputs that the one before left in the cache
                at = turn * len(order) + place
                spent = contestants[name].time(at, stream)
                if turn >= WARM_UPS:
                    contestants[name].times.append(spent)
    torch.cuda.synchronize()
    times = {name: one.times for name, one in contestants.items()}
    del contestants, ours, made
    gc.collect()
    torch.cuda.empty_cache()
    # after the race, on fresh inputs, with PyTorch's error as the measure
    both = ["warpmap", next(iter(case.peers), "")]
    _check(case, {name: known[name] for name in both if name in known})
    return _rows(case, times, errors, missing, failed, peaks, launch)


def _rows(
    case: Case,
    times: Mapping[str, list[float]],
    errors: Mapping[str, float],
    missing: Mapping[str, str],
    failed: Mapping[str, str],
    peaks: Mapping[str, float],
    launch: str,
) -> list[dict[str, Any]]:
    ours, ceiling = times["warpmap"], times["ceiling"]
    ratios = {
        name: _ratio(times[name], ours)
        for name in case.peers
        if name in times and name not in failed
    }
    rows = []
    names = ["warpmap", *case.peers, "ceiling"]
    for name in names:
        row: dict[str, Any] = {**case.labels, "implementation": name}
        if name in missing:
            rows.append({**row, "missing": missing[name]})
            continue
        if name in failed:
            row["failed"] = failed[name]
        if name in times:
            ms = statistics.median(times[name])
            fifths = statistics.quantiles(times[name], n=5)
            row |= {
                "ms": _digits(ms),
                "ms_p20": _digits(fifths[0]),
                "ms_p80": _digits(fifths[-1]),
            }
            flops = case.ceiling == "matmul"
            work = case.flops if flops else case.moved
            if name == "ceiling":
                row["implementation"] = case.ceiling
                if flops:
                    work = 2 * 8192**3
            unit, scale = ("tflop_s", 1e9) if flops else ("gb_s", 1e6)
            row[unit] = _digits(work / ms / scale)
            row["share"] = _digits(
                _ratio(ceiling, times[name])
                * (work / (2 * 8192**3) if flops else 1)
            )
        if name in errors and math.isfinite(errors[name]):
            row["error"] = float(f"{errors[name]:.2g}")
        if name in peaks:
            row["peak_mib"] = round(peaks[name], 1)
        if name in ratios:
            row["ratio"] = _digits(ratios[name])
        if name == "warpmap":
            row["rounds"] = len(ours)
            row["launch"] = launch
            row["control"] = _digits(_spread(times[CONTROL], ours))
            if ratios:
                best = min(ratios, key=lambda n: ratios[n])
                row["best_peer"] = best
                row["ratio_to_best"] = _digits(ratios[best])
        rows.append(row)
    return rows


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def compare(
    cases: Iterable[Case], rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """Check and time every case; a line for each goes to stderr.

    Args:
        cases: What to compare.
        rounds: How often everybody takes a turn; 7 at least.

    Returns:
        A row for each case and implementation, the ceiling among them. ``ms``
        is a median, with ``ms_p20`` and ``ms_p80``; ``gb_s`` or ``tflop_s``
        follow from the case's bytes or operations; ``share`` is that of the
        ceiling in the same rounds; ``error`` the largest, as a share of the
        largest value. A peer's ``ratio`` says how many times as long it takes
        as ours. Ours has ``ratio_to_best``, the ratio of the fastest peer,
        and ``control``: how far its ratio to itself strays from 1. A ratio
        nearer to 1 than that is no difference. A peer that is ``missing``
        or has ``failed`` says why.

    Raises:
        RuntimeError: If no GPU is seen, or ours computes something wrong.
        ValueError: If a case has another ceiling, or there are few rounds.
    """
    if rounds < 7:
        raise ValueError(f"rounds must be at least 7, got {rounds}")
    if not torch.cuda.is_available():
        raise RuntimeError("a benchmark needs an NVIDIA GPU; none is seen")
    found = []
    for case in cases:
        rows = _measure(case, rounds)
        found += rows
        print(summary(rows), file=sys.stderr, flush=True)
    return found


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """One case in a line, for whoever waits."""
    ours = rows[0]
    own = {"implementation", "ms", "rounds", "launch", "failed"}
    labels = []
    for key, value in ours.items():
        if key in own:
            break
        labels.append(f"{key}={value}")
    ceiling = rows[-1]["implementation"]
    line = (
        f"{' '.join(labels)}: {ours['ms']} ms, {ours['share']:.3f} of {ceiling}"
    )
    if "best_peer" in ours:
        line += (
            f", {ours['ratio_to_best']:.3f} x {ours['best_peer']} "
            f"(control {ours['control']:.3f})"
        )
    for row in rows[1:]:
        for key in ("missing", "failed"):
            if key in row:
                line += f"\n    {row['implementation']} {key}: {row[key]}"
    return line
