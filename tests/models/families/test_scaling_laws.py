"""The closed forms against search, the fit against known laws and torch."""

import math
import random
import subprocess
import sys
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path

import pytest
import torch

from warpmap.models.families.scaling_laws import (
    BESIROGLU,
    BUDGETS,
    FITS,
    HOFFMANN,
    HOFFMANN_DIGITS,
    PEAKS,
    effective_tokens,
    exact_match,
    fit,
    scaling_chart,
    scaling_laws,
)

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/models/families/scaling_laws.md"
LAWS = [HOFFMANN, HOFFMANN_DIGITS, BESIROGLU]
CHINCHILLA = 5.76e23


# -- the optimum --------------------------------------------------------------


def searched(law, flop):
    """Parameters with the lowest loss, on a grid that is made finer twice."""
    low, high = 1e6, 1e15
    for _ in range(3):
        ratio = (high / low) ** (1 / 2000)
        sizes = [low * ratio**i for i in range(2001)]
        best = min(
            sizes,
            key=lambda N: (
                law.E
                + law.A / N**law.alpha
                + law.B / (flop / 6 / N) ** law.beta
            ),
        )
        low, high = best / ratio, best * ratio
    return best


def agrees(optimum):
    """Whether a closed form finds what the search finds, flat as it is."""
    for law in LAWS:
        for flop in (1e18, CHINCHILLA, 3.8e25):
            N, D = optimum(law, flop)
            if not math.isclose(6 * N * D, flop, rel_tol=1e-9):
                return False
            if not math.isclose(N, searched(law, flop), rel_tol=1e-4):
                return False
    return True


def test_closed_form_is_what_a_search_finds():
    assert agrees(lambda law, flop: law.optimum(flop))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda law, flop: law.optimum(flop)[::-1],
        lambda law, flop: law.optimum(6 * flop),
        lambda law, flop: replace(law, alpha=law.beta, beta=law.alpha).optimum(
            flop
        ),
        lambda law, flop: replace(law, A=law.B, B=law.A).optimum(flop),
        lambda law, flop: (math.sqrt(flop / 6 / 20), math.sqrt(flop * 20 / 6)),
    ],
    ids=["swapped", "without 6", "exponents", "scales", "20 tokens each"],
)
def test_a_wrong_closed_form_is_caught(wrong):
    assert not agrees(wrong)


def test_at_the_best_size_both_gradients_balance():
    for law in LAWS:
        N, D = law.optimum(CHINCHILLA)
        assert law.alpha * law.A / N**law.alpha == pytest.approx(
            law.beta * law.B / D**law.beta
        )


def test_fits_give_what_their_papers_say():
    def growth(law):
        """N grows with C to this power."""
        return math.log10(law.optimum(1e24)[0] / law.optimum(1e23)[0])

    # table 2 of Hoffmann et al.; Besiroglu et al. report 0.513
    assert round(growth(HOFFMANN_DIGITS), 2) == 0.46
    assert round(growth(BESIROGLU), 3) == 0.513
    # "between 40 and 70 billion parameters", section 4 of Hoffmann et al.
    assert round(HOFFMANN_DIGITS.optimum(CHINCHILLA)[0] / 1e9) == 40
    assert 60e9 < BESIROGLU.optimum(CHINCHILLA)[0] < 80e9
    assert HOFFMANN.optimum(CHINCHILLA)[0] < 35e9
    # Chinchilla beat Gopher, 280 billion parameters on 0.3 10^12 tokens
    for law in LAWS:
        assert law.loss(70e9, 1.4e12) < law.loss(280e9, 300e9)


def test_tokens_for_a_loss_give_that_loss():
    for law in LAWS:
        for N in (1e9, 40e9, 400e9):
            loss = law.loss(N, 2e12)
            assert law.tokens_for(loss, N) == pytest.approx(2e12)
        # no number of tokens makes up for what parameters must do
        loss = law.E + 0.99 * law.A / 1e9**law.alpha
        assert law.tokens_for(loss, 1e9) is None


# -- the fit ------------------------------------------------------------------


def made_up(law, count=240, noise=0.0, failed=0.0, seed=0):
    """Runs of the sizes that Hoffmann et al. trained."""
    rng = random.Random(seed)
    runs = []
    for _ in range(count):
        N, D = 10 ** rng.uniform(7.7, 10.2), 10 ** rng.uniform(9.5, 11.7)
        loss = law.loss(N, D) * math.exp(rng.gauss(0, noise))
        if rng.random() < failed:
            loss *= math.exp(rng.uniform(0.05, 0.3))
        runs.append((N, D, loss))
    return runs


@pytest.mark.parametrize("law", LAWS)
def test_coefficients_come_back_from_clean_runs(law):
    assert asdict(fit(made_up(law))) == pytest.approx(asdict(law), rel=1e-5)


def spoiled(delta):
    """Best sizes by fits to five sets of runs, a tenth of them spoiled."""
    return [
        fit(made_up(BESIROGLU, noise=0.003, failed=0.1, seed=seed), delta)
        .optimum(CHINCHILLA)[0]
        for seed in range(5)
    ]  # fmt: skip


def test_spoiled_runs_hardly_move_the_fit_and_do_move_squares():
    best = BESIROGLU.optimum(CHINCHILLA)[0]
    robust, squares = spoiled(1e-3), spoiled(1e3)
    assert max(abs(math.log(N / best)) for N in robust) < 0.1
    assert max(abs(math.log(N / best)) for N in squares) > 0.5
    text = PAGE.read_text("utf-8")
    low, high = (f"{f(robust) / 1e9:.0f}" for f in (min, max))
    assert f"between {low} and {high} billion" in text
    low, high = (f"{f(squares) / 1e9:.0f}" for f in (min, max))
    assert f"from {low} to {high}." in text


def test_torch_finds_no_better_fit():
    runs = made_up(BESIROGLU, noise=0.01, failed=0.05)
    N, D, L = torch.tensor(runs, dtype=torch.float64).log().unbind(1)

    def cost(p):
        e, a, b, alpha, beta = p
        parts = torch.stack(
            [e.expand_as(N), a - alpha * (N - 20), b - beta * (D - 25)]
        )
        return torch.nn.functional.huber_loss(
            parts.logsumexp(0), L, reduction="sum", delta=1e-3
        )

    def of(law):
        return torch.tensor(
            [
                math.log(law.E),
                math.log(law.A) - 20 * law.alpha,
                math.log(law.B) - 25 * law.beta,
                law.alpha,
                law.beta,
            ],
            dtype=torch.float64,
        )

    ours = cost(of(fit(runs)))
    for start in (BESIROGLU, HOFFMANN):
        p = of(start).requires_grad_()
        search = torch.optim.LBFGS(
            [p], max_iter=2000, line_search_fn="strong_wolfe",
            tolerance_grad=1e-14, tolerance_change=1e-16,
        )  # fmt: skip

        def closure(p=p, search=search):
            search.zero_grad()
            value = 1e6 * cost(p)  # too small a loss stops it early
            value.backward()
            return value

        search.step(closure)
        assert ours <= cost(p) * (1 + 1e-9)
        assert cost(p) < cost(of(start))


@pytest.mark.parametrize(
    "runs", [made_up(HOFFMANN, 4), [(1e9, 1e9, 0.0), *made_up(HOFFMANN, 9)]]
)
def test_runs_that_cannot_be_fitted_are_refused(runs):
    with pytest.raises(ValueError, match="runs must be five or more"):
        fit(runs)


# -- repeated tokens, and answers ---------------------------------------------


def test_repeated_tokens_lose_their_worth_exponentially():
    def integrated(repeats, decay=15.39, steps=20000):
        width = repeats / steps
        return 1 + width * sum(
            math.exp(-(i + 0.5) * width / decay) for i in range(steps)
        )

    for epochs in (2, 4, 16, 100):
        assert effective_tokens(3e9, 3e9 * epochs) == pytest.approx(
            3e9 * integrated(epochs - 1)
        )
    assert effective_tokens(5e9, 2e9) == 2e9  # none is seen twice
    # "up to 4 epochs ... negligible changes to loss", the abstract
    four = effective_tokens(100e9, 400e9)
    assert BESIROGLU.loss(8e9, four) < 1.003 * BESIROGLU.loss(8e9, 400e9)
    # and at most some 16 times the unique ones in all
    assert effective_tokens(1, 1e9) == pytest.approx(16.39)


@pytest.mark.parametrize("wrong", [(0, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_tokens_must_be_positive(wrong):
    with pytest.raises(ValueError, match="unique, seen and decay"):
        effective_tokens(*wrong)


def test_exact_match_is_the_share_of_answers_without_an_error():
    rng = random.Random(0)
    for loss, tokens in ((0.05, 10), (0.2, 5), (0.01, 60)):
        right = sum(
            all(rng.random() < math.exp(-loss) for _ in range(tokens))
            for _ in range(20000)
        )
        assert right / 20000 == pytest.approx(
            exact_match(loss, tokens), abs=0.015
        )


def test_a_smooth_loss_looks_like_a_jump_in_long_answers():
    losses = [2.0**-k for k in range(12)]  # halves with each step of scale
    token = [exact_match(loss, 1) for loss in losses]
    answer = [exact_match(loss, 100) for loss in losses]
    below = next(i for i, share in enumerate(answer) if share > 0.02)
    assert max(answer[:below]) < 0.02
    assert answer[below + 4] > 0.75  # from almost nothing, in four steps
    assert token[below] > 0.95  # tokens were right long before
    # and on the scale of logarithms nothing happens at all
    for loss, share in zip(losses[4:], answer[4:], strict=True):
        assert -math.log(share) / loss == pytest.approx(100)


# -- the calculator -----------------------------------------------------------


def test_break_even_is_where_total_flops_are_equal():
    for size in (30.0, 50.0, 80.0):
        answer = scaling_laws(size_percent=size)
        N, D = BESIROGLU.optimum(CHINCHILLA)
        small = answer.other_parameters_billions * 1e9
        tokens = answer.other_trillion_tokens * 1e12
        assert BESIROGLU.loss(small, tokens) == pytest.approx(answer.best_loss)

        def total(parameters, trained, served):
            return 6 * parameters * trained + 2 * parameters * served

        even = answer.break_even_trillion_tokens * 1e12
        assert total(small, tokens, even) == pytest.approx(total(N, D, even))
        assert total(small, tokens, 2 * even) < total(N, D, 2 * even)
        assert total(small, tokens, even / 2) > total(N, D, even / 2)
        assert answer.extra_training_percent == pytest.approx(
            100 * (total(small, tokens, 0) / CHINCHILLA - 1)
        )


def test_no_other_size_is_better_for_the_same_flops():
    for size in (5.0, 50.0, 99.0, 101.0, 400.0):
        answer = scaling_laws(size_percent=size)
        assert answer.same_budget_loss > answer.best_loss
    same = scaling_laws(size_percent=100.0)
    assert same.same_budget_loss == pytest.approx(same.best_loss)
    assert (same.extra_training_percent, same.break_even_trillion_tokens) == (
        pytest.approx(0, abs=1e-9),
        None,
    )


def test_a_model_can_be_too_small_for_any_number_of_tokens():
    tiny = scaling_laws(size_percent=5.0)
    assert tiny.other_trillion_tokens is None
    assert tiny.extra_training_percent is None
    assert tiny.break_even_trillion_tokens is None


def test_gpus_days_and_mfu_make_the_budget():
    answer = scaling_laws(
        "GPUs", gpus=10, days=2.0, peak_tflops=100.0, mfu_percent=30.0
    )
    assert answer.flop == pytest.approx(10 * 172_800 * 100e12 * 0.3)
    N = answer.best_parameters_billions * 1e9
    D = answer.best_trillion_tokens * 1e12
    assert pytest.approx(answer.flop) == 6 * N * D
    assert answer.best_tokens_per_parameter == pytest.approx(D / N)


def defaults(**changes):
    asked = signature(scaling_laws).parameters.values()
    return {p.name: p.default for p in asked} | changes


def test_chart_touches_its_curve_at_its_lowest_point():
    chart = scaling_chart(**defaults())
    best, other = chart.points
    curve = next(x for x in chart.lines if x.name == "this budget").points
    lowest = min(curve, key=lambda at: at[1])
    assert (best.x, best.y) == pytest.approx(lowest)
    assert any((other.x, other.y) == pytest.approx(at) for at in curve)
    lowests = [min(y for _, y in line.points) for line in chart.lines]
    assert lowests == sorted(lowests, reverse=True)


def test_menus_fill_only_their_fields():
    for menu in (FITS, BUDGETS, PEAKS):
        for values in menu.values():
            scaling_chart(**defaults(**values))
    assert FITS["Besiroglu 2024"].items() <= defaults().items()


@pytest.mark.parametrize(
    "name", [n for n in defaults() if n not in ("budget",)]
)
@pytest.mark.parametrize("bad", [0, -1, math.inf, math.nan])
def test_bad_numbers_are_named(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be above 0, got"):
        scaling_laws(**{name: bad})


def test_an_unknown_budget_is_refused():
    with pytest.raises(ValueError, match="budget must be FLOPs or GPUs"):
        scaling_laws("euros")


def test_runs_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.models.families.scaling_laws import *\n"
        "print(round(scaling_laws().best_parameters_billions))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "72"


# -- the page -----------------------------------------------------------------


def page_rows():
    return {
        row[0]: row[1:]
        for row in (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in PAGE.read_text("utf-8").splitlines()
            if line.startswith("| ")
        )
    }


def test_page_s_sizes_agree():
    rows = page_rows()
    for size in (200, 100, 75, 50, 33, 25):
        a = scaling_laws(size_percent=float(size))
        even = a.break_even_trillion_tokens
        assert rows[f"{size}%"] == [
            f"{a.other_parameters_billions:.0f}",
            f"{a.same_budget_loss:.3f}",
            f"{a.other_trillion_tokens:.1f}",
            f"{abs(a.extra_training_percent):.0f}%",
            "none" if even is None else f"{even:.1f}",
        ]


def test_page_s_numbers_agree():
    text = " ".join(PAGE.read_text("utf-8").split())
    long = BESIROGLU.loss(8e9, 15e12)
    low, high = 1e20, 1e25
    while high / low > 1 + 1e-12:
        middle = math.sqrt(low * high)
        better = BESIROGLU.loss(*BESIROGLU.optimum(middle)) < long
        low, high = (low, middle) if better else (middle, high)
    assert f"{BESIROGLU.optimum(low)[0] / 1e9:.0f} billion parameters" in text
    assert f"{6 * 8e9 * 15e12 / low:.1f} times the FLOPs" in text

    four, forty = (effective_tokens(1, n) for n in (4, 40))
    assert f"worth {four:.1f} epochs" in text
    assert f"worth {forty:.0f}" in text
