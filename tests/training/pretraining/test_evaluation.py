import math
import random
import re
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest

from warpmap.training.pretraining._pass_rate import pass_rate, pass_rate_chart
from warpmap.training.pretraining._ranking import bradley_terry
from warpmap.training.pretraining.evaluation import (
    Loss,
    bits_per_byte,
    bootstrap,
    choose,
    mean,
    pass_at_k,
    strided_loss,
    windows,
)
from warpmap_site.traces import impure_imports

EPS = 2.0**-52
PAGE = Path(__file__).parents[3] / "docs/training/pretraining/evaluation.md"


def test_bits_per_byte_does_not_depend_on_the_tokens():
    """One source of letters, as single tokens and as pairs."""
    p = {"a": 0.5, "b": 0.3, "c": 0.2}
    text = "".join(random.Random(0).choices([*p], [*p.values()], k=600))
    single = Loss(-math.fsum(math.log(p[c]) for c in text), 600)
    pairs = [text[i : i + 2] for i in range(0, 600, 2)]
    double = Loss(-math.fsum(math.log(p[x] * p[y]) for x, y in pairs), 300)
    # each of 900 logarithms, at most 4, is rounded once or twice
    slack = 900 * 8 * EPS
    assert abs(
        bits_per_byte(single.nats, 600) - bits_per_byte(double.nats, 600)
    ) < slack / (600 * math.log(2))
    assert double.perplexity == pytest.approx(single.perplexity**2, rel=1e-12)
    assert bits_per_byte(-600 * math.log(1 / 256), 600) == pytest.approx(8)


SIZES = [(c, s) for c in range(2, 9) for s in range(1, c)]


def test_windows_score_every_token_once_with_context():
    for length, (context, stride) in product(range(25), SIZES):
        found = list(windows(length, context, stride))
        scored = [t for _, first, end in found for t in range(first, end)]
        assert scored == list(range(1, length))
        for begin, first, end in found:
            assert 0 <= begin < first < end <= length
            assert end - begin <= context
            assert first - begin >= min(first, context - stride)


class Markov:
    """A model that looks back ``order`` tokens, and knows its exact loss."""

    def __init__(self, order, letters=4):
        self.order, self.letters = order, letters
        self.calls = 0

    def __call__(self, window):
        self.calls += 1
        return [self.log_prob(window[:i], t) for i, t in enumerate(window)][1:]

    def log_prob(self, before, token):
        before = tuple(before)[-self.order :]
        weights = random.Random(repr(before)).choices(range(1, 9), k=4)
        return math.log(weights[token] / sum(weights))


TEXT = random.Random(1).choices(range(4), k=60)


@pytest.mark.parametrize(("context", "stride"), [(8, 5), (8, 1), (30, 27)])
def test_enough_overlap_gives_the_exact_loss(context, stride):
    model = Markov(order=context - stride)
    want = -math.fsum(model(TEXT))
    got = strided_loss(model, TEXT, context, stride)
    # the same terms, and a sum that rounds once
    assert got == Loss(want, len(TEXT) - 1)
    # a model that looks further back is cut off
    model = Markov(order=context - stride + 1)
    assert strided_loss(model, TEXT, context, stride).nats != -math.fsum(
        model(TEXT)
    )


def test_a_text_that_fits_takes_one_window():
    model = Markov(order=3)
    assert strided_loss(model, TEXT, 60, 1).tokens == 59
    assert model.calls == 1
    assert strided_loss(model, TEXT, 59, 1).tokens == 59
    assert model.calls == 3


def disjoint(model, tokens, context, stride):
    parts = [tokens[i : i + context] for i in range(0, len(tokens), context)]
    found = [p for part in parts for p in model(part)]
    return Loss(-math.fsum(found), len(found))


def counted_twice(model, tokens, context, stride):
    parts = [tokens[i : i + context] for i in range(0, len(tokens), stride)]
    found = [p for part in parts for p in model(part)]
    return Loss(-math.fsum(found), len(found))


def mean_of_means(model, tokens, context, stride):
    means = [
        mean(model(tokens[begin:end])[first - begin - 1 :])
        for begin, first, end in windows(len(tokens), context, stride)
    ]
    return Loss(-mean(means) * (len(tokens) - 1), len(tokens) - 1)


@pytest.mark.parametrize("wrong", [disjoint, counted_twice, mean_of_means])
def test_a_wrong_stride_is_caught(wrong):
    model = Markov(order=3)
    want = Loss(-math.fsum(model(TEXT)), 59)
    assert strided_loss(model, TEXT, 8, 5) == want
    assert wrong(model, TEXT, 8, 5) != want


def test_pass_at_k_agrees_with_every_choice():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                chosen = list(combinations([1] * c + [0] * (n - c), k))
                share = sum(map(any, chosen)) / len(chosen)
                assert pass_at_k(n, c, k) == share


def expected(estimate, n, k, p):
    """Mean of an estimate over all outcomes of ``n`` draws, exactly."""
    return sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * estimate(n, c, k)
        for c in range(n + 1)
    )


def naive(n, c, k):
    return 1 - (1 - Fraction(c, n)) ** k


def as_product(n, c, k):
    """The paper's form, as a product."""
    if n - c < k:
        return Fraction(1)
    found = Fraction(1)
    for i in range(n - c + 1, n + 1):
        found *= 1 - Fraction(k, i)
    return 1 - found


@pytest.mark.parametrize("k", [1, 3, 10])
def test_pass_at_k_is_unbiased_and_the_naive_estimate_is_not(k):
    p, n = Fraction(1, 7), 10
    true = 1 - (1 - p) ** k
    assert expected(as_product, n, k, p) == true
    for c in range(n + 1):
        assert pass_at_k(n, c, k) == float(as_product(n, c, k))
    if k > 1:
        assert expected(naive, n, k, p) < true
    else:
        assert expected(naive, n, k, p) == true


def test_pass_at_k_keeps_small_cases():
    # floats would round both terms to 1
    assert pass_at_k(10**6, 1, 1) == 1e-6
    assert pass_at_k(10**17, 1, 1) == 1e-17


def test_calculator_and_chart_agree():
    chart = pass_rate_chart(samples=300, correct=3, k=77)
    unbiased, plain = (dict(line.points) for line in chart.lines)
    assert unbiased.keys() == plain.keys() >= {1, 77, 300}
    assert len(unbiased) <= 103
    here = pass_rate(samples=300, correct=3, k=77)
    assert here.unbiased == unbiased[77] == pass_at_k(300, 3, 77)
    assert here.naive == plain[77]
    assert here.naive == pytest.approx(float(naive(300, 3, 77)), rel=1e-12)
    assert all(plain[k] <= unbiased[k] + EPS for k in plain)


def test_choice_is_the_likeliest_for_its_length():
    rng = random.Random(0)
    flipped = 0
    for _ in range(100):
        sums = [-rng.uniform(1, 50) for _ in range(4)]
        lengths = [rng.randrange(1, 30) for _ in range(4)]
        assert sums[choose(sums)] == max(sums)
        i = choose(sums, lengths)
        assert all(
            Fraction(sums[i]) / lengths[i] >= Fraction(s) / n
            for s, n in zip(sums, lengths, strict=True)
        )
        flipped += i != choose(sums)
    assert flipped > 20
    assert choose([-1.0, -1.0]) == 0


def probabilities(strength):
    s = np.array(strength)
    return 1 / (1 + np.exp(s[None] - s[:, None]))


def games(rng, players):
    wins = (
        rng.integers(0, 9, (players, players))
        + rng.integers(0, 2, (players, players)) * 0.5
    )
    wins[np.arange(players), np.arange(players) - 1] += 1  # a ring of wins
    np.fill_diagonal(wins, 0)
    return wins


def newton(wins):
    """Maximum likelihood by another way: Newton steps, last player at 0."""
    wins = np.array(wins, dtype=float)
    n = len(wins)
    s = np.zeros(n)
    for _ in range(50):
        p = probabilities(s)
        both = wins + wins.T
        slope = (wins - both * p).sum(axis=1)
        curve = both * p * (1 - p)
        hessian = np.diag(curve.sum(axis=1)) - curve
        s[:-1] += np.linalg.solve(hessian[:-1, :-1], slope[:-1])
    return s - s.mean()


def test_strengths_agree_with_newton_s_method():
    rng = np.random.default_rng(0)
    for players in (2, 3, 5, 8):
        wins = games(rng, players)
        got = bradley_terry(wins.tolist())
        # it stops when a round moves by 1e-13, having shrunk by half or more
        np.testing.assert_allclose(got, newton(wins), rtol=0, atol=1e-11)
        assert abs(math.fsum(got)) < 1e-14 * players


def test_expected_results_give_back_the_strengths():
    strength = [1.2, 0.1, -0.4, -0.9]
    wins = 30 * probabilities(strength)
    got = bradley_terry(wins.tolist())
    np.testing.assert_allclose(got, strength, rtol=0, atol=1e-11)


def by_share_of_wins(wins):
    wins = np.array(wins)
    share = wins.sum(axis=1) / (wins + wins.T).sum(axis=1)
    logits = np.log(share / (1 - share))
    return logits - logits.mean()


def by_losses(wins):
    return bradley_terry(np.array(wins).T.tolist())


@pytest.mark.parametrize("wrong", [by_share_of_wins, by_losses])
def test_a_wrong_ranking_is_caught(wrong):
    """Whoever meets weak opponents wins often."""
    wins = games(np.random.default_rng(1), 5)
    assert np.abs(wrong(wins) - newton(wins)).max() > 1e-3


def test_one_player_has_no_one_to_beat():
    assert bradley_terry([[0]]) == [0.0]


@pytest.mark.parametrize(
    ("wins", "says"),
    [
        ([], "wins must be a square"),
        ([[0, 1]], "wins must be a square"),
        ([[0, -1], [1, 0]], "finite and at least 0"),
        ([[0, math.inf], [1, 0]], "finite and at least 0"),
        ([[0, math.nan], [1, 0]], "finite and at least 0"),
        ([[0, 1], [0, 0]], "otherwise a strength is infinite"),
        ([[0, 0], [1, 0]], "otherwise a strength is infinite"),
        (
            [[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]],
            "otherwise a strength is infinite",
        ),
    ],
)
def test_results_without_a_ranking_are_refused(wins, says):
    with pytest.raises(ValueError, match=says):
        bradley_terry(wins)


def test_too_few_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds must be more than 1"):
        bradley_terry([[0, 3, 1], [1, 0, 2], [1, 1, 0]], rounds=1)


def binomial_interval(n, ones, level):
    """The same interval from all outcomes instead of draws."""
    p = ones / n
    found, below = [], 0.0
    for c in range(n + 1):
        below += math.comb(n, c) * p**c * (1 - p) ** (n - c)
        found.append(below)
    low = next(c for c in range(n + 1) if found[c] > (1 - level) / 2)
    high = next(c for c in range(n + 1) if found[c] >= (1 + level) / 2)
    return low, high


@pytest.mark.parametrize(("n", "ones"), [(40, 10), (100, 70), (30, 29)])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_interval_agrees_with_the_binomial_distribution(n, ones, level):
    values = [1] * ones + [0] * (n - ones)
    low, high = bootstrap(values, level=level, draws=2000)
    want_low, want_high = binomial_interval(n, ones, level)
    # 2000 draws place a quantile to within one question
    assert abs(low * n - want_low) <= 1 + n * EPS
    assert abs(high * n - want_high) <= 1 + n * EPS
    # a wrong level would be found
    other = binomial_interval(n, ones, 0.999)
    assert max(abs(low * n - other[0]), abs(high * n - other[1])) > 1.5


def test_intervals_repeat_and_hold_any_statistic():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, statistic=max)[1] == 5.0
    assert bootstrap([2.0]) == (2.0, 2.0)
    low, high = bootstrap(values, draws=3, level=1e-9)
    assert low <= high


def test_a_paired_interval_is_narrower():
    a = [1] * 115 + [0] * 49
    b = [1] * 124 + [0] * 40
    assert bootstrap(a)[1] > bootstrap(b)[0]
    assert bootstrap([y - x for x, y in zip(a, b, strict=True)])[0] > 0


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bits_per_byte(1.0, 0), "bytes must be at least 1, got 0"),
        (lambda: list(windows(9, 1, 1)), "context must be at least 2, got 1"),
        (lambda: list(windows(9, 4, 4)), "stride must be 1 to 3, got 4"),
        (lambda: list(windows(9, 4, 0)), "stride must be 1 to 3, got 0"),
        (
            lambda: strided_loss(Markov(1), [1], 4, 2),
            "tokens must be at least 2, got 1",
        ),
        (lambda: pass_at_k(0, 0, 1), "samples must be at least 1, got 0"),
        (lambda: pass_at_k(5, 6, 1), "correct must be 0 to 5, got 6"),
        (lambda: pass_at_k(5, -1, 1), "correct must be 0 to 5, got -1"),
        (lambda: pass_rate(5, 2, 6), "k must be 1 to 5, got 6"),
        (lambda: pass_rate_chart(5, 2, 0), "k must be 1 to 5, got 0"),
        (lambda: choose([]), "log_probs must hold an answer"),
        (lambda: choose([-1.0], [0]), r"lengths must be 1 .*, got \[0\]"),
        (lambda: choose([-1.0], [1, 2]), r"lengths must be 1 .*, got \[1, 2\]"),
        (lambda: bootstrap([]), "values must be one or more"),
        (lambda: bootstrap([1], level=1), "level must be between 0 and 1"),
        (lambda: bootstrap([1], draws=0), "draws must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_page_table_agrees():
    """The standard error of a share is largest at one half."""
    page = PAGE.read_text("utf-8")
    rows = re.findall(
        r"^\| \[.* \| ([\d,]+) \| \d+% \| (.*) points", page, re.M
    )
    assert len(rows) == 5
    for questions, error in rows:
        n = int(questions.replace(",", ""))
        assert f"{100 * math.sqrt(0.5 * 0.5 / n):.1f}" == error


def test_runs_in_a_browser():
    for name in ("_pass_rate", "_ranking"):
        assert impure_imports(f"warpmap.training.pretraining.{name}") == []
