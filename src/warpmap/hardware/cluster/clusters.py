"""Clusters: what joins thousands of GPUs, and what their failures cost.

A fat tree joins them with equal switches. Each has as many ports up as down,
or fewer up, by the oversubscription of the last step. With k ports, undiluted:

    one switch      k GPUs              1 switch on the way
    two levels      k^2 / 2             3
    three levels    k^3 / 4             5

One failure stops a training on all of them. It goes on from a checkpoint, so
what is lost is the time of checkpoints, the work since the last, the restart.

Reference: Leiserson, 1985, doi:10.1109/TC.1985.6312192
Reference: Al-Fares et al., 2008, doi:10.1145/1402958.1402967
Reference: Daly, 2006, doi:10.1016/j.future.2004.11.016
"""

import math
from dataclasses import dataclass
from typing import Any

from warpmap.chart import Axis, Line, LineChart, Point


@dataclass(frozen=True)
class Fabric:
    """A fat tree, by its switches and cables.

    Attributes:
        levels: Switches one above the other, 1 to 3.
        leaves: Switches that GPUs are plugged into.
        spines: Switches above them; 0 with one level.
        cores: Switches above these; 0 with fewer than three levels.
        down: GPUs of one leaf.
        cables: Cables of each step, from the GPUs up.
        oversubscription: Ports down for each port up, in the last step.
    """

    levels: int
    leaves: int
    spines: int
    cores: int
    down: int
    cables: tuple[int, ...]
    oversubscription: float


def fat_tree(gpus: int, radix: int, oversubscription: float = 1.0) -> Fabric:
    """The smallest fat tree for so many GPUs, cables spread evenly.

    Args:
        gpus: GPUs, one network port each.
        radix: Ports of a switch, an even number.
        oversubscription: Ports down for each port up, in the last step.

    Raises:
        ValueError: If a number is out of range, or three levels do not do.

    Examples:
        >>> fat_tree(1024, radix=64).cables
        (1024, 1024)
        >>> fabric = fat_tree(16384, radix=64)
        >>> fabric.leaves, fabric.spines, fabric.cores
        (512, 512, 256)
    """
    if radix < 4 or radix % 2:
        raise ValueError(f"radix must be even and at least 4, got {radix}")
    if not 1 <= oversubscription <= radix - 1:
        raise ValueError(
            f"oversubscription must be from 1 to {radix - 1}, "
            f"got {oversubscription}"
        )
    up = int(radix / (1 + oversubscription))
    down = int(up * oversubscription + 1e-9)
    half = radix // 2
    most = half * down * radix
    if not 2 <= gpus <= most:
        raise ValueError(f"gpus must be from 2 to {most}, got {gpus}")
    if gpus <= radix:
        return Fabric(1, 1, 0, 0, gpus, (gpus,), 1.0)
    if gpus <= down * radix:
        leaves = -(-gpus // down)
        spines = _above(leaves, up, radix)
        cables: tuple[int, ...] = (gpus, leaves * up)
        return Fabric(2, leaves, spines, 0, down, cables, down / up)
    # pods of two levels, undiluted; each of a pod's spines has its own cores
    leaves = -(-gpus // half)
    pods = -(-leaves // down)
    cores = half * _above(pods, up, radix)
    cables = gpus, leaves * half, pods * half * up
    return Fabric(3, leaves, pods * half, cores, half, cables, down / up)


def _above(below: int, up: int, radix: int) -> int:
    """Fewest switches above, so that each below reaches all alike."""
    return next(
        count
        for count in range(1, up + 1)
        if up % count == 0 and below * (up // count) <= radix
    )


def goodput(
    interval: float, checkpoint: float, restart: float, mtbf: float
) -> float:
    """Share of the time in which a training gets ahead.

    Failures come at random, at any time, with a constant rate. A segment is
    ``interval`` of work and a checkpoint; who fails starts it once more.

    Args:
        interval: Work between two checkpoints; all four in one unit.
        checkpoint: Time that training stands still for one.
        restart: From a failure until work goes on.
        mtbf: Mean time between failures of the whole cluster.

    Examples:
        >>> round(goodput(interval=30, checkpoint=1, restart=10, mtbf=180), 3)
        0.839
    """
    segment = (interval + checkpoint) / mtbf
    if segment + restart / mtbf > 700:
        return 0.0
    wall = mtbf * math.exp(restart / mtbf) * math.expm1(segment)
    return interval / wall


def best_interval(checkpoint: float, mtbf: float) -> float:
    """Work between checkpoints that makes goodput highest, by Daly's series.

    Its first factor alone is Young's rule. The restart does not matter.

    Args:
        checkpoint: Time that training stands still for one.
        mtbf: Mean time between failures, in the same unit.

    Examples:
        >>> round(best_interval(checkpoint=1, mtbf=180), 1)
        18.3
    """
    if checkpoint >= 2 * mtbf:
        return mtbf
    share = math.sqrt(checkpoint / (2 * mtbf))
    young = math.sqrt(2 * checkpoint * mtbf)
    return young * (1 + share / 3 + share * share / 9) - checkpoint


@dataclass(frozen=True)
class Cluster:
    """What a cluster needs, and what is left of its time.

    Attributes:
        levels: Levels of switches.
        switches: Switches in all.
        cables: Cables in all, those to the GPUs included.
        hops: Switches between two GPUs, at most.
        bisection_tb_s: From any half of the GPUs to the other, in TB/s.
        rail_servers: Servers whose GPUs of one number share a leaf, if every
            leaf takes one rail.
        rack_servers: Servers on one leaf, if it takes all their GPUs.
        failures_a_day: Failures of the whole cluster.
        hours_between_failures: Mean time between them.
        best_interval_minutes: Work between checkpoints that loses least.
        goodput_percent: Share of the time in which training gets ahead.
        checkpoint_percent: Share that goes into checkpoints that are kept.
        rework_percent: Share that is done and lost again.
        restart_percent: Share that goes into restarts.
        useful_gpus: GPUs that would do as much without any loss.
    """

    levels: int
    switches: int
    cables: int
    hops: int
    bisection_tb_s: float
    rail_servers: int
    rack_servers: int
    failures_a_day: float
    hours_between_failures: float
    best_interval_minutes: float
    goodput_percent: float
    checkpoint_percent: float
    rework_percent: float
    restart_percent: float
    useful_gpus: float


def clusters(
    gpus: int = 16384,
    radix: int = 64,
    oversubscription: float = 1.0,
    gbit_s: float = 400.0,
    gpus_per_server: int = 8,
    mtbf_days: float = 2112.0,
    checkpoint_seconds: float = 10.0,
    restart_minutes: float = 10.0,
    interval_minutes: float = 0.0,
) -> Cluster:
    """A cluster's fabric and goodput; the failures are those of Llama 3.

    Args:
        gpus: GPUs, one network port each.
        radix: Ports of a switch.
        oversubscription: Ports down for each port up, in the last step.
        gbit_s: Rate of a port in one direction, in Gbit/s.
        gpus_per_server: GPUs that NVLink joins.
        mtbf_days: Days between failures of one GPU and its share of the rest.
        checkpoint_seconds: Time that training stands still for a checkpoint.
        restart_minutes: Minutes to notice, diagnose, start and load.
        interval_minutes: Minutes of work between checkpoints; 0 for the best.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> here = clusters()
        >>> here.hops, round(here.hours_between_failures, 2)
        (5, 3.09)
        >>> round(here.goodput_percent, 1)
        90.8
    """
    given = dict(locals())  # the arguments, nothing else yet
    for name in ("gbit_s", "mtbf_days", "checkpoint_seconds"):
        if not 0 < given[name] < math.inf:
            raise ValueError(f"{name} must be above 0, got {given[name]}")
    for name in ("restart_minutes", "interval_minutes"):
        if not 0 <= given[name] < math.inf:
            raise ValueError(f"{name} must not be below 0, got {given[name]}")
    fabric = fat_tree(gpus, radix, oversubscription)  # checks these three
    if not 1 <= gpus_per_server <= gpus:
        raise ValueError(
            f"gpus_per_server must be from 1 to {gpus}, got {gpus_per_server}"
        )

    mtbf = mtbf_days * 1440 / gpus  # minutes
    checkpoint = checkpoint_seconds / 60
    best = best_interval(checkpoint, mtbf)
    interval = interval_minutes or best
    good = goodput(interval, checkpoint, restart_minutes, mtbf)
    # a restart that fails again takes its time too
    restart = -math.expm1(-restart_minutes / mtbf)
    kept = good * checkpoint / interval
    return Cluster(
        levels=fabric.levels,
        switches=fabric.leaves + fabric.spines + fabric.cores,
        cables=sum(fabric.cables),
        hops=2 * fabric.levels - 1,
        bisection_tb_s=gpus // 2 * gbit_s / 8000 / fabric.oversubscription,
        rail_servers=min(fabric.down, -(-gpus // gpus_per_server)),
        rack_servers=fabric.down // gpus_per_server,
        failures_a_day=1440 / mtbf,
        hours_between_failures=mtbf / 60,
        best_interval_minutes=best,
        goodput_percent=100 * good,
        checkpoint_percent=100 * kept,
        rework_percent=100 * (1 - good - kept - restart),
        restart_percent=100 * restart,
        useful_gpus=gpus * good,
    )


# 419 unexpected interruptions of 16,384 GPUs in 54 days, arXiv:2407.21783:
# one in 2112 days of a GPU
SIZES: dict[str, dict[str, Any]] = {
    "Llama 3 405B": {"gpus": 16384, "mtbf_days": 2112.0},
    "the same, 131,072 GPUs": {"gpus": 131072, "radix": 128}
    | {"mtbf_days": 2112.0},
    "one server": {"gpus": 8, "mtbf_days": 2112.0},
}
"""The calculator's menu of sizes."""

FABRICS: dict[str, dict[str, Any]] = {
    "64 ports, NDR or 400 GbE": {"radix": 64, "gbit_s": 400.0},
    "128 ports, 400 GbE": {"radix": 128, "gbit_s": 400.0},
}
"""The calculator's menu of switches."""


def goodput_chart(**arguments: Any) -> LineChart:
    """Goodput over the interval between checkpoints.

    Args:
        **arguments: As for ``clusters``, all of them.

    Returns:
        This cluster, one of a quarter and one of four times the GPUs.

    Examples:
        >>> from inspect import signature
        >>> asked = signature(clusters).parameters.values()
        >>> chart = goodput_chart(**{p.name: p.default for p in asked})
        >>> [line.name for line in chart.lines]
        ['4,096 GPUs', '16,384 GPUs', '65,536 GPUs']
    """
    here = clusters(**arguments)
    checkpoint = arguments["checkpoint_seconds"] / 60
    restart = arguments["restart_minutes"]
    interval = arguments["interval_minutes"] or here.best_interval_minutes
    middle = here.best_interval_minutes
    lines = []
    for factor in (0.25, 1, 4):
        mtbf = here.hours_between_failures * 60 / factor
        at = [middle * 2 ** (k / 4) for k in range(-16, 17)]
        lines.append(
            Line(
                f"{max(1, round(arguments['gpus'] * factor)):,} GPUs",
                [(t, 100 * goodput(t, checkpoint, restart, mtbf)) for t in at],
            )
        )
    return LineChart(
        "Time in which training gets ahead",
        Axis("minutes between checkpoints", log=True),
        Axis("%"),
        lines,
        [Point(f"{here.goodput_percent:.1f}%", interval, here.goodput_percent)],
    )
