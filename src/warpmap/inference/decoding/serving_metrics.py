"""What a reader of streamed tokens feels, and how many requests get it.

Everything is computed from a log: when each request arrived, and when each of
its tokens came out.

    TTFT      arrival to first token: queueing and prefill
    TPOT      mean gap between the later tokens of one request
    ITL       every gap by itself; one stall that TPOT averages away shows here
    goodput   requests a second that kept both promises

A small simulator makes such logs: arrivals at random, one GPU that either
prefills one waiting request or decodes one token for all running ones.

Reference: Zhong et al., 2024, https://arxiv.org/abs/2401.09670
"""

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from warpmap.chart import Axis, Line, LineChart, Point


@dataclass(frozen=True)
class Request:
    """One request's log; all times in seconds on one clock.

    Attributes:
        arrival: When the server received it.
        tokens: When each token came out, in order.
    """

    arrival: float
    tokens: tuple[float, ...]

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.tokens[0] - self.arrival

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring tokens, the inter-token latencies."""
        return [later - earlier for earlier, later in pairwise(self.tokens)]

    @property
    def tpot(self) -> float:
        """Mean seconds a token after the first; 0 where there is only one."""
        return fmean(self.gaps or [0.0])


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that ``percent`` % of the values do not exceed.

    Between two values it interpolates, as NumPy does by default.

    Raises:
        ValueError: If there are no values, or ``percent`` is not in 0 to 100.

    Examples:
        >>> percentile([1, 2, 3, 10], 50), percentile([1, 2, 3, 10], 100)
        (2.5, 10.0)
    """
    if not values:
        raise ValueError("expected values, got none")
    if not 0 <= percent <= 100:
        raise ValueError(f"percent must be in 0 to 100, got {percent}")
    ordered = sorted(values)
    at = percent / 100 * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (at - low) * (ordered[high] - ordered[low]))


def mean_concurrency(requests: Sequence[Request]) -> float:
    """Requests inside the server, averaged over the log's time.

    Little's law gives it without watching the server: the rate of arrivals
    times the mean time inside.

    Examples:
        >>> mean_concurrency([Request(0, (1, 2)), Request(1, (3, 4))])
        1.25
    """
    start = min(r.arrival for r in requests)
    end = max(r.tokens[-1] for r in requests)
    inside = [r.tokens[-1] - r.arrival for r in requests]
    return len(requests) / (end - start) * fmean(inside)


def goodput(
    requests: Sequence[Request], ttft_limit: float, tpot_limit: float
) -> float:
    """Requests a second that met both limits (seconds).

    Examples:
        >>> log = [Request(0, (1, 2)), Request(0, (3, 4))]
        >>> goodput(log, ttft_limit=1, tpot_limit=1)
        0.25
    """
    start = min(r.arrival for r in requests)
    end = max(r.tokens[-1] for r in requests)
    good = [
        r for r in requests if r.ttft <= ttft_limit and r.tpot <= tpot_limit
    ]
    return len(good) / (end - start)


def simulate(
    arrivals: Sequence[float],
    output_tokens: int,
    prefill: float,
    step: float,
    step_per_request: float,
    max_batch: int,
) -> list[Request]:
    """Serve requests in their order, prefill before decode.

    Whenever a request waits and the batch has room, the GPU prefills it, which
    yields its first token and stalls the others. Otherwise one step decodes a
    token for every running request.

    Args:
        arrivals: Seconds, ascending.
        output_tokens: Tokens of each answer.
        prefill: Seconds to prefill one prompt.
        step: Seconds of a decoding step without requests: reading weights.
        step_per_request: Seconds that each request adds to a step.
        max_batch: Requests that may run at once.

    Returns:
        The log, in order of arrival.

    Examples:
        >>> log = simulate([0.0, 0.5], 3, 1.0, 1.0, 0.0, max_batch=2)
        >>> [r.tokens for r in log]  # the second prefill stalls the first
        [(1.0, 3.0, 4.0), (2.0, 3.0, 4.0)]
    """
    waiting = deque(range(len(arrivals)))
    running: list[int] = []
    tokens: list[list[float]] = [[] for _ in arrivals]
    now = 0.0
    while waiting or running:
        if not running:  # idle until somebody comes
            now = max(now, arrivals[waiting[0]])
        if waiting and arrivals[waiting[0]] <= now and len(running) < max_batch:
            batch = [waiting.popleft()]
            running += batch
            now += prefill
        else:
            batch = running
            now += step + step_per_request * len(running)
        for request in batch:
            tokens[request].append(now)
        running = [r for r in running if len(tokens[r]) < output_tokens]
    return [
        Request(arrival, tuple(times))
        for arrival, times in zip(arrivals, tokens, strict=True)
    ]


SERVERS: dict[str, dict[str, float]] = {
    "short prompts, long answers": {"prefill_ms": 20.0, "output_tokens": 400},
    "long prompts, short answers": {"prefill_ms": 400.0, "output_tokens": 30},
    "loose limits": {"ttft_limit_ms": 2000.0, "tpot_limit_ms": 100.0},
}
"""Kinds of traffic to start from; the figures are invented."""


@dataclass(frozen=True)
class ServingMetrics:
    """What a run delivered.

    Attributes:
        ttft_p50_ms: Median time to first token, in ms.
        ttft_p99_ms: Time to first token of the slowest 1 %, in ms.
        tpot_p50_ms: Median time per output token, in ms.
        tpot_p99_ms: Time per output token of the slowest 1 %, in ms.
        itl_p99_ms: Longest 1 % of all single gaps begin here, in ms.
        tokens_per_s: Tokens a second of the whole server.
        attainment: Percent of the requests that met both limits.
        goodput: Requests a second that met both limits.
        concurrency: Requests in the server on average.
    """

    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_p50_ms: float
    tpot_p99_ms: float
    itl_p99_ms: float
    tokens_per_s: float
    attainment: float
    goodput: float
    concurrency: float


def serving_metrics(
    requests_per_s: float = 4.0,
    output_tokens: int = 100,
    prefill_ms: float = 100.0,
    step_ms: float = 10.0,
    step_ms_per_request: float = 0.1,
    max_batch: int = 64,
    ttft_limit_ms: float = 400.0,
    tpot_limit_ms: float = 25.0,
    requests: int = 400,
    seed: int = 0,
) -> ServingMetrics:
    """Serve a random stream of equal requests and report what it felt like.

    Args:
        requests_per_s: Mean rate of arrivals, a Poisson process.
        output_tokens: Tokens of each answer.
        prefill_ms: Time to prefill one prompt, in ms.
        step_ms: Time of a decoding step for reading the weights, in ms.
        step_ms_per_request: Time that each running request adds, in ms.
        max_batch: Requests that may run at once.
        ttft_limit_ms: Promise for the first token, in ms.
        tpot_limit_ms: Promise for the mean of the later ones, in ms.
        requests: Requests in the run; percentiles of few are noisy.
        seed: Chooses the random arrivals.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> calm = serving_metrics(requests_per_s=1)
        >>> busy = serving_metrics(requests_per_s=9)
        >>> calm.attainment > 90, busy.attainment < 10
        (True, True)
    """
    given = dict(locals())
    for name in given:
        least = 1 if isinstance(given[name], int) and name != "seed" else 0
        if not least <= given[name] < math.inf:
            raise ValueError(
                f"{name} must be at least {least}, got {given[name]}"
            )
    for name in ("requests_per_s", "prefill_ms", "step_ms"):
        if not given[name]:
            raise ValueError(f"{name} must be more than 0, got 0")
    if requests * output_tokens > 1_000_000:
        raise ValueError(
            "requests times output_tokens must be at most a million, "
            f"got {requests} x {output_tokens}"
        )
    chance = random.Random(seed)
    now, arrivals = 0.0, []
    for _ in range(requests):
        now += chance.expovariate(requests_per_s)
        arrivals.append(now)
    log = simulate(
        arrivals,
        output_tokens,
        prefill_ms / 1e3,
        step_ms / 1e3,
        step_ms_per_request / 1e3,
        max_batch,
    )
    ttft = [r.ttft * 1e3 for r in log]
    tpot = [r.tpot * 1e3 for r in log]
    gaps = [gap * 1e3 for r in log for gap in r.gaps]
    seconds = max(r.tokens[-1] for r in log) - arrivals[0]
    good = goodput(log, ttft_limit_ms / 1e3, tpot_limit_ms / 1e3)
    return ServingMetrics(
        ttft_p50_ms=percentile(ttft, 50),
        ttft_p99_ms=percentile(ttft, 99),
        tpot_p50_ms=percentile(tpot, 50),
        tpot_p99_ms=percentile(tpot, 99),
        itl_p99_ms=percentile(gaps or [0.0], 99),
        tokens_per_s=requests * output_tokens / seconds,
        attainment=100 * good * seconds / requests,
        goodput=good,
        concurrency=mean_concurrency(log),
    )


def serving_chart(requests_per_s: float = 4.0, **server: float) -> LineChart:
    """Throughput and goodput as the rate of arrivals rises.

    Args:
        requests_per_s: Where the reader's point is.
        server: The other arguments of ``serving_metrics``.

    Examples:
        >>> [line.name for line in serving_chart(requests=50).lines]
        ['completed', 'within both limits']
    """
    tokens = int(server.get("output_tokens", 100))
    served: dict[float, ServingMetrics] = {
        rate: serving_metrics(rate, **server)  # type: ignore[arg-type]
        for rate in (requests_per_s * share / 8 for share in range(1, 21))
    }
    here = served[requests_per_s]
    return LineChart(
        "Goodput and throughput",
        Axis("requests a second that arrive"),
        Axis("requests a second"),
        [
            Line(
                "completed",
                [(rate, m.tokens_per_s / tokens) for rate, m in served.items()],
            ),
            Line(
                "within both limits",
                [(rate, m.goodput) for rate, m in served.items()],
            ),
        ],
        [Point("here", requests_per_s, here.goodput)],
    )
