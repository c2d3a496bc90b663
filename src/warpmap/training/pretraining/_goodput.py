"""What saving costs a job: training waits for the storage, or for a copy.

Work of ``t`` seconds is followed by a stall of ``d``. Who waits for the storage
is safe then. Who waits for a copy in the hosts' memory has a short ``d``, and
is safe ``w`` later: the copy is written while training goes on.

Failures come at random, one in ``M`` seconds on average. After a restart the
first save is safe after ``t + d + w``, each further one ``t + d`` later, and
the time to the next failure is exponential. So there are on average

    exp(-w / M) / (exp((t + d) / M) - 1)

safe saves before it, each worth ``t``. A write thus acts like a longer restart
in Daly's formula: the factor ``exp(-w / M)``, whatever the interval is.

Reference: Daly, 2006, https://doi.org/10.1016/j.future.2004.11.016
"""

import math
from dataclasses import dataclass

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.hardware.cluster.clusters import best_interval, goodput

MTBF_DAYS = 2112.0  # of one GPU: 419 failures of 16,384 in 54 days
COPY_GB_S = 32.0  # a GPU to its host, half of what PCIe 5.0 x16 carries

PRESETS: dict[str, dict[str, float]] = {
    # arXiv:2407.21783: storage of 2 TB/s
    "Llama 3 405B": {"parameters_b": 405, "gpus": 16384, "storage_gb_s": 2000},
    "405B, storage of 100 GB/s": {
        "parameters_b": 405,
        "gpus": 16384,
        "storage_gb_s": 100,
    },
    "8B on one server": {"parameters_b": 8, "gpus": 8, "storage_gb_s": 2},
}


@dataclass(frozen=True)
class SavingCost:
    """What saving takes, and leaves, with both ways to save.

    Attributes:
        checkpoint_gb: Size of a checkpoint, in GB.
        write_seconds: Until it is in the storage, in seconds.
        copy_seconds: Until it is in the hosts' memory, in seconds.
        hours_between_failures: Mean time between failures of the job, in hours.
        waiting_interval_minutes: Best work between saves that wait for the
            storage, in minutes.
        waiting_percent: Time that then ends up in the model, in percent.
        background_interval_minutes: Best work between saves that wait for the
            copy, in minutes; a write ends before the next begins.
        background_percent: Time that then ends up in the model, in percent.
    """

    checkpoint_gb: float
    write_seconds: float
    copy_seconds: float
    hours_between_failures: float
    waiting_interval_minutes: float
    waiting_percent: float
    background_interval_minutes: float
    background_percent: float


def background_goodput(
    interval: float, stall: float, write: float, restart: float, mtbf: float
) -> float:
    """Share of the time that ends up in the model; one unit for all times.

    Args:
        interval: Work between two saves.
        stall: Training waits so long for a copy.
        write: Until the copy is safe; at most ``interval + stall``.
        restart: From a failure until training runs again.
        mtbf: Mean time between failures of the job.

    Raises:
        ValueError: If a write would not end before the next begins.

    Examples:
        >>> round(background_goodput(600, 10, 60, 300, 10_800), 3)
        0.925
    """
    if write > interval + stall:
        raise ValueError(
            f"write must be at most {interval + stall}, interval and stall, "
            f"got {write}"
        )
    return goodput(interval, stall, restart + write, mtbf)


def saving_cost(
    parameters_b: float = 405.0,
    bytes_per_parameter: float = 12.0,
    gpus: int = 16384,
    storage_gb_s: float = 100.0,
    restart_minutes: float = 10.0,
) -> SavingCost:
    """What saving costs, waiting for the storage or for a copy.

    Args:
        parameters_b: Parameters of the model, in 10^9.
        bytes_per_parameter: What is saved of each, in bytes: 4 for a weight in
            fp32 and 8 for Adam's moments make 12.
        gpus: GPUs of the job, each of which saves its part.
        storage_gb_s: What the storage takes from all of them, in GB/s.
        restart_minutes: From a failure until training runs again, in minutes.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> cost = saving_cost()
        >>> round(cost.waiting_percent, 1), round(cost.background_percent, 1)
        (86.2, 94.1)
    """
    for name, value in (
        ("parameters_b", parameters_b),
        ("bytes_per_parameter", bytes_per_parameter),
        ("gpus", gpus),
        ("storage_gb_s", storage_gb_s),
    ):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value}")
    if not 0 <= restart_minutes < math.inf:
        raise ValueError(
            f"restart_minutes must be at least 0, got {restart_minutes}"
        )
    size = parameters_b * bytes_per_parameter  # GB
    write, copy = size / storage_gb_s, size / gpus / COPY_GB_S
    mtbf, restart = 86400 * MTBF_DAYS / gpus, 60 * restart_minutes
    waiting = best_interval(write, mtbf)
    background = max(best_interval(copy, mtbf), write - copy)
    return SavingCost(
        checkpoint_gb=size,
        write_seconds=write,
        copy_seconds=copy,
        hours_between_failures=mtbf / 3600,
        waiting_interval_minutes=waiting / 60,
        waiting_percent=100 * goodput(waiting, write, restart, mtbf),
        background_interval_minutes=background / 60,
        background_percent=100
        * background_goodput(background, copy, write, restart, mtbf),
    )


def saving_chart(
    parameters_b: float = 405.0,
    bytes_per_parameter: float = 12.0,
    gpus: int = 16384,
    storage_gb_s: float = 100.0,
    restart_minutes: float = 10.0,
) -> LineChart:
    """Useful time against the size of the job, both ways.

    Args:
        parameters_b: As for ``saving_cost``, as are the others.
        bytes_per_parameter: What is saved of each, in bytes.
        gpus: Where the point is.
        storage_gb_s: The same for every size of the job.
        restart_minutes: As for ``saving_cost``.

    Examples:
        >>> [line.name for line in saving_chart().lines]
        ['waits for the copy', 'waits for the storage']
    """

    def at(n: int) -> SavingCost:
        model = (parameters_b, bytes_per_parameter)
        return saving_cost(*model, n, storage_gb_s, restart_minutes)

    costs = [(n, at(n)) for n in (gpus * 2**k // 32 for k in range(11)) if n]
    here = at(gpus)
    return LineChart(
        "Time that ends up in the model",
        Axis("GPUs", log=True),
        Axis("%"),
        [
            Line(
                "waits for the copy",
                [(n, c.background_percent) for n, c in costs],
            ),
            Line(
                "waits for the storage",
                [(n, c.waiting_percent) for n, c in costs],
            ),
        ],
        [Point("this job", gpus, here.background_percent)],
    )
