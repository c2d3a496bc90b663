import math
import random
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from torch import nn

from warpmap.models.foundations import _width_sweep
from warpmap.models.foundations._coordinate_check import coordinate_check
from warpmap.models.foundations._width_sweep import losses_by_rate
from warpmap.models.foundations.initialization_and_parametrization import (
    ACTIVATIONS,
    HIDDEN,
    OUTPUT,
    STARTS,
    Scaling,
    fans,
    growth,
    moments,
    signal,
    signal_chart,
    sizes_by_layer,
    weight_variance,
    widen,
)

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/models/foundations/initialization_and_parametrization.md"
F = {
    "ReLU": torch.relu,
    "tanh": torch.tanh,
    "GELU": nn.functional.gelu,
    "linear": lambda z: z,
}
RULES = list(HIDDEN)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (64, 3, 7, 7), (2, 4, 3)])
def test_fans_and_variances_agree_with_torch(shape):
    empty = torch.empty(shape, dtype=torch.float64)
    fan_in, fan_out = fans(shape)
    assert (fan_in, fan_out) == nn.init._calculate_fan_in_and_fan_out(empty)
    theirs = {
        "Xavier": lambda: nn.init.xavier_normal_(empty),
        "He": lambda: nn.init.kaiming_normal_(empty, nonlinearity="relu"),
        "LeCun": lambda: nn.init.kaiming_normal_(empty, nonlinearity="linear"),
    }
    for start, init in theirs.items():
        torch.manual_seed(1)
        got = init().clone()
        torch.manual_seed(1)
        want = torch.randn(shape, dtype=torch.float64)
        want *= math.sqrt(weight_variance(start, fan_in, fan_out))
        torch.testing.assert_close(got, want)


def test_the_default_of_linear_is_a_third():
    torch.manual_seed(1)
    got = nn.Linear(7, 30, bias=False).weight.detach()
    torch.manual_seed(1)
    # a uniform number up to b has variance b^2 / 3
    edge = math.sqrt(3 * weight_variance("PyTorch", 7, 30))
    torch.testing.assert_close(got, torch.empty(30, 7).uniform_(-edge, edge))


@pytest.mark.parametrize("mean_square", [1e-12, 0.3, 1.0, 30.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_moments_agree_with_fine_integration(activation, mean_square):
    # midpoints, so that ReLU's corner lies between two of them
    u = torch.arange(-12, 12, 1 / 512, dtype=torch.float64) + 1 / 1024
    z = (math.sqrt(mean_square) * u).requires_grad_()
    f = F[activation](z)
    (slope,) = torch.autograd.grad(f.sum(), z)
    f = f.detach()
    weight = torch.exp(-u * u / 2) / math.sqrt(2 * math.pi) / 512
    for got, values in zip(
        moments(activation, mean_square), (f, slope), strict=True
    ):
        # 24 * 512 terms; midpoints leave a few 1e-7 where there is a corner
        want = float((weight * values**2).sum())
        off = 1e-6 if activation == "ReLU" else 1e-12
        assert got == pytest.approx(want, rel=off, abs=0)
        assert got != pytest.approx(want * (1 + 10 * off), rel=off, abs=0)


def monte_carlo(start, activation, depth, width, networks):
    """Mean squares of values and gradients, one a network, by autograd."""
    std = math.sqrt(weight_variance(start, width, width))
    x = torch.ones(networks, width, 1, dtype=torch.float64, requires_grad=True)
    y = x
    for _ in range(depth):
        noise = torch.randn(networks, width, width, dtype=torch.float64)
        if start == "PyTorch":
            noise.uniform_(-math.sqrt(3), math.sqrt(3))
        y = F[activation](std * noise @ y)
    values = y.detach().square().mean((1, 2))
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    return values, grad.square().mean((1, 2))


def strays(sample, want):
    """How many standard errors the mean of a sample is off."""
    return (
        float((sample.mean() - want).abs() / sample.std()) * len(sample) ** 0.5
    )


@pytest.mark.parametrize("activation", ["ReLU", "linear"])
@pytest.mark.parametrize("start", STARTS)
def test_straight_activations_are_exact_at_any_width(start, activation):
    values, gradients = sizes_by_layer(start, activation, depth=4, width=16)
    sample = monte_carlo(start, activation, 4, 16, networks=3000)
    assert strays(sample[0], values[-1]) < 5
    assert strays(sample[1], gradients[0]) < 5
    for wrong in (1.3, 1 / 1.3):
        assert strays(sample[0], wrong * values[-1]) > 5
        assert strays(sample[1], wrong * gradients[0]) > 5


@pytest.mark.parametrize("activation", ["tanh", "GELU"])
@pytest.mark.parametrize("start", ["He", "Xavier"])
def test_curved_activations_agree_in_wide_networks(start, activation):
    values, gradients = sizes_by_layer(start, activation, depth=3, width=512)
    sample = monte_carlo(start, activation, 3, 512, networks=16)
    # a layer of n is off by some 1/n on average, far below the noise
    for got, want in zip(sample, (values[-1], gradients[0]), strict=True):
        assert strays(got, want) < 5
        assert strays(got, 2 * want) > 5
        assert strays(got, want / 2) > 5


def test_a_single_network_strays_as_the_page_says():
    """The mean square of He's networks has relative variance (1+5/n)^L - 1."""
    values, _ = monte_carlo("He", "ReLU", depth=4, width=32, networks=3000)
    want = (1 + 5 / 32) ** 4 - 1
    # four or five moments enter: 3000 networks leave some percent
    assert float(values.var()) == pytest.approx(want, rel=0.25)
    assert float(values.median()) < 0.9 < float(values.mean())


def by_torch(rule, width, rate, seed):
    """The same network and example, with autograd and PyTorch's Adam."""
    noise = random.Random(seed).gauss

    def new(*shape):
        flat = [noise(0, 1) for _ in range(math.prod(shape))]
        return torch.tensor(flat, dtype=torch.float64).view(shape)

    x, target, n = new(4), new(1), float(width)
    hidden, output = HIDDEN[rule], OUTPUT[rule]
    w1 = (new(width, 4) / 2).requires_grad_()
    w2 = (new(width, width) * n**-hidden.deviation).requires_grad_()
    w3 = (new(1, width) * n**-output.deviation).requires_grad_()

    def forward():
        z = n**-hidden.multiplier * w2 @ (w1 @ x).relu()
        return z, n**-output.multiplier * w3 @ z.relu()

    adam = torch.optim.Adam(
        [
            {"params": [w1], "lr": rate},
            {"params": [w2], "lr": rate * n**-hidden.rate},
            {"params": [w3], "lr": rate * n**-output.rate},
        ],
        eps=1e-300,
    )
    z, out = forward()
    (out - target).square().backward()
    adam.step()
    z_then, out_then = forward()
    sizes = z, z_then - z, out, out_then - out
    return [t.detach().square().mean().sqrt().item() for t in sizes]


@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize("rule", RULES)
def test_one_step_agrees_with_torch_s_adam(rule, width):
    got = astuple(coordinate_check(rule, width, rate=1e-3, seed=3))
    # a difference of values near 1 that is 1e-4 loses four digits
    assert got == pytest.approx(by_torch(rule, width, 1e-3, 3), rel=1e-9)


def one_step(rule, width, x, target, w1, w2, w3):
    """As ``by_torch``, in single precision and by the signs alone."""
    n, hidden, output = float(width), HIDDEN[rule], OUTPUT[rule]
    w1 = w1 / 2
    w2 = w2 * n**-hidden.deviation
    w3 = w3 * n**-output.deviation
    m2, m3 = n**-hidden.multiplier, n**-output.multiplier
    a = (w1 @ x).relu()
    z = m2 * w2 @ a
    out = m3 * w3 @ z.relu()
    error = (out - target).sign()
    g2 = error * w3 * (z > 0)
    g1 = (w2.T @ g2) * (a > 0)
    rate = 1e-4
    w1 -= rate * torch.outer(g1.sign(), x.sign())
    w2 -= rate * n**-hidden.rate * torch.outer(g2.sign(), a.sign())
    w3 -= rate * n**-output.rate * error * z.relu().sign()
    z_then = m2 * w2 @ (w1 @ x).relu()
    moved = m3 * w3 @ z_then.relu() - out
    sizes = z, z_then - z, out, moved
    return [t.double().square().mean().sqrt().item() for t in sizes]


@pytest.fixture(scope="module")
def powers():
    """Powers between widths 128 and 2048, from eight networks each."""
    squares = torch.zeros(2, len(RULES), 4, dtype=torch.float64)
    for i, width in enumerate((128, 2048)):
        for seed in range(8):
            torch.manual_seed(seed)
            shapes = (4,), (1,), (width, 4), (width, width), (width,)
            noise = [torch.randn(shape) for shape in shapes]
            for j, rule in enumerate(RULES):
                sizes = one_step(rule, width, *noise)
                squares[i, j] += torch.tensor(sizes).square()
    fitted = (squares[1] / squares[0]).log() / 2 / math.log(2048 / 128)
    return dict(zip(RULES, fitted.tolist(), strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_sizes_grow_with_the_powers_foretold(rule, powers):
    # what grows more slowly still counts at these widths: up to 0.15
    assert powers[rule] == pytest.approx(astuple(growth(rule)), abs=0.2)
    for other in RULES:
        if other != rule:
            wrong = astuple(growth(other))
            assert powers[rule] != pytest.approx(wrong, abs=0.2)


@pytest.mark.slow
def test_wide_ntk_networks_stand_still_under_gradient_descent():
    """By the root of the width; a step of the plain gradient."""
    moved = []
    for width in (64, 1024):
        torch.manual_seed(0)
        x = torch.randn(40, 4, 1, dtype=torch.float64)  # forty networks
        a = (torch.randn(40, width, 4, dtype=torch.float64) @ x).relu()
        w3 = torch.randn(40, 1, width, dtype=torch.float64)
        z = torch.randn(40, width, 1, dtype=torch.float64)  # as w2 @ a is
        # of w3 relu(z) / sqrt(n), by z = w2 a / sqrt(n), by w2
        g = w3.mT * (z > 0) / math.sqrt(width)
        step = g @ a.mT / math.sqrt(width)
        moved.append((step @ a / math.sqrt(width)).square().mean().sqrt())
    assert math.log(moved[1] / moved[0], 16) == pytest.approx(-0.5, abs=0.05)


RATES = [2.0**-e for e in (10, 9, 5, 4)]


def test_the_best_rate_drifts_but_under_mup():
    best = {}
    for rule in ("standard", "muP"):
        for width in (16, 256):
            losses = losses_by_rate(rule, width, RATES, steps=16)
            finite = [x if math.isfinite(x) else math.inf for x in losses]
            best[rule, width] = RATES[finite.index(min(finite))]
    assert best["standard", 16] == best["muP", 16] >= 2.0**-5
    assert best["standard", 256] <= 2.0**-9
    assert best["muP", 256] >= 2.0**-5


def test_rates_side_by_side_agree_with_torch_s_adam_one_by_one(monkeypatch):
    """Capture the first weights, then train them alone."""
    monkeypatch.setattr(_width_sweep, "BETAS", (0.9, 0.999))
    together = losses_by_rate("NTK", 16, [0.01, 0.03], steps=3)
    alone = [losses_by_rate("NTK", 16, [r], steps=3)[0] for r in (0.01, 0.03)]
    assert together == pytest.approx(alone, rel=1e-12)

    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    x, along = noise(128, 8), noise(8, 3) / math.sqrt(8)
    t = x @ along
    y = (2 * t[:, 0]).sin() + t[:, 1] * t[:, 2]
    y /= y.square().mean().sqrt()
    model = nn.Sequential(
        nn.Linear(8, 16, bias=False),
        nn.ReLU(),
        nn.Linear(16, 16, bias=False),
        nn.ReLU(),
        nn.Linear(16, 1, bias=False),
    ).double()
    for i, std in ((0, 8**-0.5), (2, 8**-0.5), (4, 16**-0.5)):
        model[i].weight.data = noise(*model[i].weight.shape) * std
    adam = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(3):
        adam.zero_grad()
        nn.functional.mse_loss(model(x)[:, 0], y).backward()
        adam.step()
    want = nn.functional.mse_loss(model(x)[:, 0], y).item()
    assert together[1] == pytest.approx(want, rel=1e-9)


def shifted(scaling, by):
    return Scaling(
        scaling.multiplier + by, scaling.deviation - by, scaling.rate - by
    )


def test_a_factor_may_move_between_weight_and_multiplier(monkeypatch):
    """Bit for bit: at four times the base width all factors are powers of 2."""
    monkeypatch.setattr(_width_sweep, "EPS", 1e-300)
    run = [2.0**-6, 2.0**-4]
    want = losses_by_rate("muP", 64, run, steps=8)
    # the table for tied embeddings: the output starts as in the base
    monkeypatch.setitem(OUTPUT, "muP", shifted(OUTPUT["muP"], 1))
    assert OUTPUT["muP"] == Scaling(1, 0, 0)
    monkeypatch.setitem(HIDDEN, "muP", shifted(HIDDEN["muP"], 0.5))
    assert losses_by_rate("muP", 64, run, steps=8) == want
    # Adam's small constant is compared with gradients, which do scale
    monkeypatch.setattr(_width_sweep, "EPS", 1e-2)
    assert losses_by_rate("muP", 64, run, steps=8) != want
    monkeypatch.setattr(_width_sweep, "EPS", 1e-300)
    # and the rate has to move along
    wrong = Scaling(HIDDEN["muP"].multiplier, HIDDEN["muP"].deviation, 1)
    monkeypatch.setitem(HIDDEN, "muP", wrong)
    assert losses_by_rate("muP", 64, run, steps=8) != want


@pytest.mark.parametrize("rule", RULES)
def test_recipe_at_the_base_width_changes_nothing(rule):
    same = widen(rule, base_width=300, width=300, rate=0.1, std=0.3)
    assert astuple(same) == (1, 0.3, 0.1, 1, 0.3, 0.1, 1, 1)


@pytest.mark.parametrize("rule", RULES)
def test_recipes_compose(rule):
    near = widen(rule, 100, 300, rate=0.1, std=0.3)
    far = widen(rule, 300, 1200, near.hidden_rate, near.hidden_std)
    once = widen(rule, 100, 1200, rate=0.1, std=0.3)
    assert far.hidden_rate == pytest.approx(once.hidden_rate)
    assert far.hidden_std == pytest.approx(once.hidden_std)
    assert near.output_change * far.output_change == pytest.approx(
        once.output_change
    )


def test_signal_and_chart_show_the_same():
    shown = signal("He", "tanh", depth=9, width=20)
    values, gradients = signal_chart("He", "tanh", depth=9, width=20).lines
    assert values.points[-1] == (9, shown.value)
    assert gradients.points[0] == (0, shown.gradient)
    assert values.points[0] == (0, 1)
    assert gradients.points[-1] == (9, 1)
    assert shown.weight_std == pytest.approx(math.sqrt(2 / 20))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fans((3,)), r"shape must be \(out, in, ...\), got \(3,\)"),
        (lambda: weight_variance("he", 1, 1), "start must be one of"),
        (lambda: weight_variance("He", 0, 1), "fans must be at least 1, got 0"),
        (lambda: moments("relu", 1.0), "activation must be one of"),
        (lambda: signal(depth=0), "depth must be 1 to 200, got 0"),
        (lambda: signal(depth=201), "depth must be 1 to 200, got 201"),
        (lambda: signal(width=10**6), "width must be 1 to 65536"),
        (lambda: growth("mup"), "rule must be one of"),
        (lambda: coordinate_check("sp", 4), "rule must be one of"),
        (lambda: coordinate_check("muP", 0), "width must be at least 1"),
        (lambda: losses_by_rate("muP", 0, [0.1]), "width must be at least 1"),
        (lambda: widen(width=0), "width must be at least 1, got 0"),
        (lambda: widen(base_width=0), "base_width must be at least 1, got 0"),
        (lambda: widen(rate=0.0), "rate must be above 0"),
        (lambda: widen(std=math.nan), "std must be above 0, got nan"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_page_table_agrees():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text("utf-8").splitlines()
        if line.startswith("| ")
    ]
    names = {f"{s} start": s for s in STARTS} | {"0.02 always": "0.02"}
    shown = {names[row[0]]: row[1:] for row in rows if row[0] in names}
    assert set(shown) == set(STARTS)
    for start, cells in shown.items():
        for activation, cell in zip(ACTIVATIONS, cells, strict=True):
            want = signal(start, activation, depth=50, width=512).value
            number = cell.strip("$").replace(r"\cdot10^{", "e").rstrip("}")
            assert float(number) == float(f"{want:.1e}"), (start, activation)


def test_runs_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.models.foundations import _coordinate_check as c\n"
        "print(c.coordinate_check('muP', 8) == c.coordinate_check('muP', 8))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "True\n"
