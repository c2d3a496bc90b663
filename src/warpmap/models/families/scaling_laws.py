"""Scaling laws: the best model and the loss that a budget of FLOPs buys.

Training N parameters on D tokens leaves a loss, in nats a token, of about

    L(N, D) = E + A / N^alpha + B / D^beta

and costs C = 6 N D FLOPs. With C fixed, the gradients of both terms balance:
alpha A / N^alpha = beta B / D^beta, from which the best N and D follow.

Reference: Kaplan et al., 2020, https://arxiv.org/abs/2001.08361
Reference: Hoffmann et al., 2022, https://arxiv.org/abs/2203.15556
Reference: Besiroglu et al., 2024, https://arxiv.org/abs/2404.10102
Reference: Muennighoff et al., 2023, https://arxiv.org/abs/2305.16264
Reference: Schaeffer et al., 2023, https://arxiv.org/abs/2304.15004
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from warpmap.chart import Axis, Line, LineChart, Point
from warpmap.training.cost.flops_and_mfu import PEAKS


@dataclass(frozen=True)
class Law:
    """The five coefficients of a fit.

    Attributes:
        E: Loss that no size and no data take away, in nats a token.
        A: Scale of the part that parameters reduce.
        B: Scale of the part that tokens reduce.
        alpha: Exponent of the parameters.
        beta: Exponent of the tokens.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token, after training so many parameters on so many tokens.

        Examples:
            >>> round(BESIROGLU.loss(70e9, 1.4e12), 3)
            1.974
        """
        size: float = self.A * parameters**-self.alpha
        data: float = self.B * tokens**-self.beta
        return self.E + size + data

    def optimum(self, flop: float) -> tuple[float, float]:
        """Parameters and tokens with the lowest loss for ``6 N D`` FLOPs.

        Examples:
            >>> N, D = BESIROGLU.optimum(5.76e23)
            >>> round(N / 1e9, 1), round(D / 1e12, 2)
            (72.2, 1.33)
        """
        both = self.alpha + self.beta
        balance = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
        parameters = balance * (flop / 6) ** (self.beta / both)
        return parameters, flop / 6 / parameters

    def tokens_for(self, loss: float, parameters: float) -> float | None:
        """Tokens after which so many parameters have a loss; None if never.

        Examples:
            >>> tokens = BESIROGLU.tokens_for(1.974, 70e9)
            >>> round(tokens / 1e12, 1)
            1.4
            >>> BESIROGLU.tokens_for(1.974, 7e9)
        """
        left = loss - self.E - self.A * parameters**-self.alpha
        return (self.B / left) ** (1 / self.beta) if left > 0 else None


HOFFMANN = Law(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
"""As printed, equation 10 of the paper."""

HOFFMANN_DIGITS = Law(E=1.6934, A=406.4, B=410.7, alpha=0.3392, beta=0.2849)
"""The same fit with more digits, from the paper's TeX source."""

BESIROGLU = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""A new fit to runs that were read off a figure of the same paper."""


def fit(runs: Sequence[tuple[float, float, float]], delta: float = 1e-3) -> Law:
    """The law that explains runs best, by Huber's loss of log losses.

    Squares of small errors, absolute values of large ones: a run that went
    wrong cannot pull the law to itself. Levenberg-Marquardt with weights.

    Args:
        runs: Parameters, tokens and final loss of each; five at least.
        delta: Error of a log loss from which on it counts linearly.

    Raises:
        ValueError: If there are too few runs, or one is not positive.

    Examples:
        >>> sizes = [10**k for k in (7, 8, 9)]
        >>> runs = [(n, d, HOFFMANN.loss(n, d)) for n in sizes
        ...         for d in (10**9, 10**10, 10**11)]
        >>> law = fit(runs)
        >>> round(law.E, 3), round(law.alpha, 3), round(law.beta, 3)
        (1.69, 0.34, 0.28)
    """
    if len(runs) < 5 or min(min(run) for run in runs) <= 0:
        raise ValueError("runs must be five or more, of positive numbers")
    logs = [tuple(map(math.log, run)) for run in runs]
    low = min(loss for *_, loss in runs)
    part = math.log(0.1 * low)  # where the search starts: 0.8, 0.1, 0.1
    n, d = (statistics.fmean(log[i] for log in logs) for i in (0, 1))
    # log E; log A and log B at the middle of the runs; alpha, beta
    at = [math.log(0.8 * low), part, part, 0.3, 0.3]

    def errors(p: Sequence[float]) -> list[tuple[float, list[float]]]:
        """Error of each log loss, and its gradient."""
        found = []
        for log_n, log_d, log_loss in logs:
            e = math.exp(p[0])
            a = math.exp(p[1] - p[3] * (log_n - n))
            b = math.exp(p[2] - p[4] * (log_d - d))
            slopes = [e, a, b, -a * (log_n - n), -b * (log_d - d)]
            total = e + a + b
            gradient = [slope / total for slope in slopes]
            found.append((math.log(total) - log_loss, gradient))
        return found

    def cost(found: Sequence[tuple[float, list[float]]]) -> float:
        sizes = [abs(error) for error, _ in found]
        return math.fsum(
            r * r / 2 if r < delta else delta * (r - delta / 2) for r in sizes
        )

    now, damping = errors(at), 1.0
    for _ in range(1000):
        H = [[0.0] * 5 for _ in range(5)]
        g = [0.0] * 5
        for error, gradient in now:
            weight = min(1.0, delta / max(abs(error), 1e-300))
            for i in range(5):
                g[i] -= weight * error * gradient[i]
                for j in range(5):
                    H[i][j] += weight * gradient[i] * gradient[j]
        for i in range(5):
            H[i][i] *= 1 + damping
        try:
            step = _solve(H, g)
            tried = [x + s for x, s in zip(at, step, strict=True)]
            then = errors(tried)
        except ArithmeticError:  # too far
            damping *= 4
            continue
        if cost(then) < cost(now):
            at, now, damping = tried, then, damping / 3
            if max(map(abs, step)) < 1e-10:
                break
        elif damping > 1e12:
            break
        else:
            damping *= 4
    E, a, b, alpha, beta = at
    A, B = math.exp(a + alpha * n), math.exp(b + beta * d)
    return Law(math.exp(E), A, B, alpha, beta)


def _solve(H: list[list[float]], g: list[float]) -> list[float]:
    """Gauss and Jordan, for a matrix that is positive definite."""
    rows = [[*row, value] for row, value in zip(H, g, strict=True)]
    for i, pivot in enumerate(rows):
        for k, row in enumerate(rows):
            if k != i:
                share = row[i] / pivot[i]
                rows[k] = [
                    x - share * y for x, y in zip(row, pivot, strict=True)
                ]
    return [row[-1] / row[i] for i, row in enumerate(rows)]


def effective_tokens(unique: float, seen: float, decay: float = 15.39) -> float:
    """Fresh tokens that are worth as much as tokens seen several times.

    Args:
        unique: Tokens that differ.
        seen: Tokens trained on; as many as ``unique`` in each epoch.
        decay: Repetitions after which one is worth 1/e of a fresh pass, as
            Muennighoff et al. fitted it.

    Raises:
        ValueError: If a number is not positive.

    Examples:
        >>> [round(effective_tokens(1, seen), 1) for seen in (1, 4, 40, 400)]
        [1, 3.7, 15.2, 16.4]
    """
    if min(unique, seen, decay) <= 0:
        raise ValueError(
            f"unique, seen and decay must be above 0, got {unique}, {seen}, "
            f"{decay}"
        )
    if seen <= unique:
        return seen
    repeats = seen / unique - 1
    return unique * (1 - decay * math.expm1(-repeats / decay))


def exact_match(loss: float, answer_tokens: int) -> float:
    """Share of answers of which every token is right, were they independent.

    Args:
        loss: Nats a token on the answers, so a token is right ``exp(-loss)``.
        answer_tokens: Tokens of an answer.

    Examples:
        >>> [round(exact_match(loss, 30), 3) for loss in (0.4, 0.2, 0.1, 0.05)]
        [0.0, 0.002, 0.05, 0.223]
    """
    return math.exp(-loss * answer_tokens)


@dataclass(frozen=True)
class ScalingLaws:
    """What a budget buys, and what a model of another size costs.

    Attributes:
        flop: FLOPs of the budget.
        best_parameters_billions: Parameters with the lowest loss, in 10^9.
        best_trillion_tokens: Tokens to train them on, in 10^12.
        best_tokens_per_parameter: Tokens for each of these parameters.
        best_loss: Loss of that model, in nats a token.
        same_budget_loss: Loss of the other size, for the same FLOPs.
        other_parameters_billions: Parameters of the other size, in 10^9.
        other_trillion_tokens: Tokens until it has ``best_loss``, in 10^12;
            none if it is too small.
        extra_training_percent: FLOPs that these tokens cost on top.
        serving_saved_percent: FLOPs that each served token saves.
        break_even_trillion_tokens: Served tokens, in 10^12, after which a
            smaller model has saved what it cost on top.
    """

    flop: float
    best_parameters_billions: float
    best_trillion_tokens: float
    best_tokens_per_parameter: float
    best_loss: float
    same_budget_loss: float
    other_parameters_billions: float
    other_trillion_tokens: float | None
    extra_training_percent: float | None
    serving_saved_percent: float
    break_even_trillion_tokens: float | None


def scaling_laws(
    budget: Literal["FLOPs", "GPUs"] = "FLOPs",
    flop: float = 5.76e23,
    gpus: int = 2048,
    days: float = 30.0,
    peak_tflops: float = 989.4,
    mfu_percent: float = 40.0,
    size_percent: float = 50.0,
    E: float = 1.8172,
    A: float = 482.01,
    B: float = 2085.43,
    alpha: float = 0.3478,
    beta: float = 0.3658,
) -> ScalingLaws:
    """What a budget buys; the defaults are Chinchilla's, with the newer fit.

    Args:
        budget: Whether FLOPs are given or follow from GPUs, days and MFU.
        flop: FLOPs to train with, if given.
        gpus: GPUs that train together.
        days: Days that they train.
        peak_tflops: Dense peak of one GPU, in TFLOP/s.
        mfu_percent: Share of the peak that training reaches.
        size_percent: The other model's parameters, in percent of the best.
        E: Loss that nothing takes away, in nats a token.
        A: Scale of the part that parameters reduce.
        B: Scale of the part that tokens reduce.
        alpha: Exponent of the parameters.
        beta: Exponent of the tokens.

    Raises:
        ValueError: If a number is not positive.

    Examples:
        >>> half = scaling_laws(size_percent=50.0)
        >>> round(half.extra_training_percent), half.serving_saved_percent
        (26, 50.0)
    """
    given = dict(locals())  # the arguments, nothing else yet
    for name, value in given.items():
        if name == "budget":
            if value not in ("FLOPs", "GPUs"):
                raise ValueError(f"budget must be FLOPs or GPUs, got {value}")
        elif not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value}")
    if budget == "GPUs":
        flop = gpus * days * 86400 * peak_tflops * 1e12 * mfu_percent / 100
    law = Law(E, A, B, alpha, beta)
    N, D = law.optimum(flop)
    loss = law.loss(N, D)
    other = N * size_percent / 100
    tokens = law.tokens_for(loss, other) if size_percent != 100 else D
    extra = 6 * (other * tokens - N * D) if tokens else None
    saved = 2 * (N - other)  # a token's forward pass
    return ScalingLaws(
        flop=flop,
        best_parameters_billions=N / 1e9,
        best_trillion_tokens=D / 1e12,
        best_tokens_per_parameter=D / N,
        best_loss=loss,
        same_budget_loss=law.loss(other, flop / 6 / other),
        other_parameters_billions=other / 1e9,
        other_trillion_tokens=tokens / 1e12 if tokens else None,
        extra_training_percent=None if extra is None else 100 * extra / flop,
        serving_saved_percent=100 - size_percent,
        break_even_trillion_tokens=(
            extra / saved / 1e12 if extra is not None and saved > 0 else None
        ),
    )


FITS: dict[str, dict[str, Any]] = {
    "Besiroglu 2024": asdict(BESIROGLU),
    "Hoffmann 2022, as printed": asdict(HOFFMANN),
    "Hoffmann 2022, more digits": asdict(HOFFMANN_DIGITS),
}
"""The calculator's menu of fits."""

BUDGETS: dict[str, dict[str, Any]] = {
    "Chinchilla": {"budget": "FLOPs", "flop": 5.76e23},
    "Llama 3 405B": {"budget": "FLOPs", "flop": 3.8e25},
    "8 H100, a week": {"budget": "GPUs", "gpus": 8, "days": 7.0}
    | PEAKS["H100 SXM"],
    "2048 H800, 54 days": {"budget": "GPUs", "gpus": 2048, "days": 54.0}
    | PEAKS["H800 SXM"],
}
"""The calculator's menu of budgets."""


def scaling_chart(**arguments: Any) -> LineChart:
    """Loss above E over the number of parameters, FLOPs held fixed.

    Args:
        **arguments: As for ``scaling_laws``, all of them.

    Returns:
        Curves of this budget, a tenth and ten times of it, and two models.

    Examples:
        >>> from inspect import signature
        >>> asked = signature(scaling_laws).parameters.values()
        >>> chart = scaling_chart(**{p.name: p.default for p in asked})
        >>> [line.name for line in chart.lines]
        ['a tenth', 'this budget', 'ten times']
    """
    here = scaling_laws(**arguments)
    law = Law(**{name: arguments[name] for name in asdict(BESIROGLU)})
    scales = {"a tenth": 0.1, "this budget": 1.0, "ten times": 10.0}
    lines = []
    for name, scale in scales.items():
        flop = scale * here.flop
        best, _ = law.optimum(flop)
        sizes = [best * 2 ** (k / 2) for k in range(-8, 9)]
        points = [(N / 1e9, law.loss(N, flop / 6 / N) - law.E) for N in sizes]
        lines.append(Line(name, points))
    return LineChart(
        "What a budget leaves to be learned",
        Axis("billions of parameters", log=True),
        Axis("nats a token above E"),
        lines,
        [
            Point(
                "best",
                here.best_parameters_billions,
                here.best_loss - law.E,
            ),
            Point(
                "other size",
                here.other_parameters_billions,
                here.same_budget_loss - law.E,
            ),
        ],
    )
