import functools
import math
import random
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from warpmap.training.foundations import _moons, mlp_from_scratch
from warpmap.training.foundations._moons import boundary_trace, moons
from warpmap.training.foundations.autograd import Tensor, tensor
from warpmap.training.foundations.mlp_from_scratch import (
    MLP,
    SGD,
    Adam,
    Linear,
    batches,
    cross_entropy,
    train,
)

WIDTHS, CLASSES = [3, 8, 6, 4], 4
SIZE, EPOCHS, SEED = 16, 8, 5


def examples():
    """50 of them, so that the last batch has 2."""
    rng = random.Random(1)
    points = [[rng.gauss(0, 1) for _ in range(3)] for _ in range(50)]
    return [(x, (x[0] > 0) + 2 * (x[1] > x[2])) for x in points]


def ours(make):
    """The loss and all weights after each step."""
    model = MLP(WIDTHS, seed=2)
    path = []

    def record(step, loss):
        weights = [x for p in model.parameters() for x in p.data]
        path.append([loss, *weights])

    optimizer = make(model.parameters())
    train(model, optimizer, examples(), SIZE, EPOCHS, SEED, record)
    return torch.tensor(path, dtype=torch.float64)


@functools.cache
def of_torch(name):
    """The same with PyTorch alone, from the same weights and batches."""
    layers = []
    for inputs, outputs in pairwise(WIDTHS):
        layers += [nn.Linear(inputs, outputs, dtype=torch.float64), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    start = MLP(WIDTHS, seed=2).parameters()
    with torch.no_grad():
        for p, x in zip(model.parameters(), start, strict=True):
            p.copy_(torch.tensor(x.tolist(), dtype=torch.float64))
    optimizer = PAIRS[name][1](model.parameters())
    rng, path = random.Random(SEED), []
    for _ in range(EPOCHS):
        for features, classes in batches(examples(), SIZE, rng):
            x = torch.tensor(features.tolist(), dtype=torch.float64)
            loss = F.cross_entropy(model(x), torch.tensor(classes))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            weights = [p.detach().flatten() for p in model.parameters()]
            path.append(torch.cat([loss.detach()[None], *weights]))
    return torch.stack(path)


PAIRS = {
    "SGD": (lambda p: SGD(p, 0.2), lambda p: torch.optim.SGD(p, 0.2)),
    "momentum": (
        lambda p: SGD(p, 0.05, momentum=0.9),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    ),
    "Adam": (lambda p: Adam(p, 0.02), lambda p: torch.optim.Adam(p, 0.02)),
    "Adam, other settings": (
        lambda p: Adam(p, 0.02, (0.8, 0.95), 1e-3),
        lambda p: torch.optim.Adam(p, 0.02, (0.8, 0.95), 1e-3),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_weights_follow_torch_step_by_step(name):
    got, want = ours(PAIRS[name][0]), of_torch(name)
    assert len(got) == EPOCHS * 4
    # a step rounds some hundred times, by 1e-16 each, and the next ones
    # multiply that by a little more than 1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    # it does learn, so the comparison has gone somewhere
    assert want[-4:, 0].mean() < 0.7 * want[:4, 0].mean()


class NeverCleared(SGD):
    def step(self):
        held = getattr(self, "held", [[0.0] * len(p.data) for p in self.params])
        for p, old in zip(self.params, held, strict=True):
            p.grad = [a + b for a, b in zip(old, p.grad, strict=True)]
        self.held = [p.grad for p in self.params]
        super().step()


class Dampened(SGD):
    def step(self):
        for p in self.params:
            p.grad = [g * (1 - self.momentum) for g in p.grad]
        super().step()


class NoCorrection(Adam):
    def step(self):
        self.steps = 10**9
        super().step()


class EpsInsideTheRoot(Adam):
    def step(self):
        before = [p.data for p in self.params]
        super().step()
        c2 = 1 - self.betas[1] ** self.steps
        for p, old, squares in zip(
            self.params, before, self.squares, strict=True
        ):
            sizes = [
                (math.sqrt(s / c2) + self.eps) / math.sqrt(s / c2 + self.eps)
                for s in squares
            ]
            p.data = [
                x + (y - x) * size
                for x, y, size in zip(old, p.data, sizes, strict=True)
            ]


def leaky(x):
    return x * 0.99 + Tensor.__dict__["relu_as_it_is"](x) * 0.01


def no_bias(layer, x):
    return x @ layer.weight.T


def summed(scores, classes):
    return cross_entropy(scores, classes) * float(len(classes))


def shifted(scores, classes):
    return cross_entropy(scores, [*classes[1:], classes[0]])


FAULTS = {
    "gradients never cleared": ("SGD", lambda p: NeverCleared(p, 0.2)),
    "dampened": ("momentum", lambda p: Dampened(p, 0.05, 0.9)),
    "no correction": ("Adam", lambda p: NoCorrection(p, 0.02)),
    "eps inside the root": (
        "Adam, other settings",
        lambda p: EpsInsideTheRoot(p, 0.02, (0.8, 0.95), 1e-3),
    ),
    "betas swapped": (
        "Adam, other settings",
        lambda p: Adam(p, 0.02, (0.95, 0.8), 1e-3),
    ),
    "sum for mean": ("SGD", mlp_from_scratch, "cross_entropy", summed),
    "classes of others": ("SGD", mlp_from_scratch, "cross_entropy", shifted),
    "no bias": ("SGD", Linear, "__call__", no_bias),
    "leaky": ("SGD", Tensor, "relu", leaky),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_framework_is_caught(fault, monkeypatch):
    name, *wrong = FAULTS[fault]
    mine, _ = PAIRS[name]
    if len(wrong) == 1:
        (mine,) = wrong
    else:
        monkeypatch.setattr(Tensor, "relu_as_it_is", Tensor.relu, raising=False)
        monkeypatch.setattr(*wrong)
    off = (ours(mine) - of_torch(name)).abs().max()
    assert not off < 1e-4


def test_gradients_of_a_layer_are_two_products_and_a_sum():
    x = torch.randn(5, 3, dtype=torch.float64)
    layer = Linear(3, 4, random.Random(0))
    inner, classes = tensor(x.tolist()), [0, 3, 1, 1, 2]
    cross_entropy(layer(inner), classes).backward()

    w = torch.tensor(layer.weight.tolist(), dtype=torch.float64)
    b = torch.tensor(layer.bias.tolist(), dtype=torch.float64)
    # (softmax - one-hot) / B, then by hand
    d = (x @ w.T + b).softmax(1)
    d[range(5), classes] -= 1
    d /= 5
    for got, want in (
        (layer.weight.grad, d.T @ x),
        (layer.bias.grad, d.sum(0)),
        (inner.grad, d @ w),
    ):
        got = torch.tensor(got, dtype=torch.float64).view_as(want)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_initial_weights_are_spread_as_those_of_torch():
    layer, peer = Linear(64, 64, random.Random(0)), nn.Linear(64, 64)
    for mine, theirs in (
        (layer.weight, peer.weight),
        (layer.bias, peer.bias),
    ):
        assert mine.shape == tuple(theirs.shape)
        assert max(map(abs, mine.data)) <= 1 / 8
        assert theirs.abs().max() <= 1 / 8
    got = torch.tensor(layer.weight.data)
    # 4096 draws: the standard deviation is known to 1%
    assert got.std() == pytest.approx(peer.weight.std().item(), rel=0.05)
    assert abs(got.mean()) < 0.005


def test_each_epoch_shows_every_example_once_in_another_order():
    data = [([float(i)], i % 3) for i in range(10)]
    rng = random.Random(0)
    orders = []
    for _ in range(3):
        seen, sizes = [], []
        for features, classes in batches(data, 4, rng):
            assert not features.needs_grad
            assert [int(x) % 3 for (x,) in features.tolist()] == classes
            seen += features.data
            sizes.append(len(classes))
        assert sizes == [4, 4, 2]
        assert sorted(seen) == list(range(10))
        orders.append(seen)
    assert orders[0] != orders[1] != orders[2]
    again = [x for f, _ in batches(data, 4, random.Random(0)) for x in f.data]
    assert again == orders[0]


def test_cross_entropy_of_large_scores_is_that_of_torch():
    scores = [[1e4, -1e4, 0.0], [3.0, 3.0, 3.0]]
    want = F.cross_entropy(
        torch.tensor(scores, dtype=torch.float64), torch.tensor([1, 2])
    )
    assert cross_entropy(tensor(scores), [1, 2]).item() == want.item()


def test_a_network_of_zeros_has_no_gradient_on_balanced_classes():
    model = MLP([2, 8, 2])
    for p in model.parameters():
        p.data = [0.0] * len(p.data)
    x = tensor([[0, 0], [0, 1], [1, 0], [1, 1]], needs_grad=False)
    loss = cross_entropy(model(x), [0, 1, 1, 0])
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert not any(g for p in model.parameters() for g in p.grad)


@pytest.mark.parametrize("value", [0.0, 0.1, -0.1])
def test_equal_units_do_not_learn_exclusive_or(value):
    data = [([0, 0], 0), ([0, 1], 1), ([1, 0], 1), ([1, 1], 0)]
    model = MLP([2, 8, 2])
    for p in model.parameters():
        p.data = [value] * len(p.data)
    losses = train(model, SGD(model.parameters(), 0.5), data, 4, 50)
    assert losses[-1] == pytest.approx(math.log(2), rel=1e-12)


def test_moons_are_two_half_circles():
    points = moons(40, noise=0)
    for (x, y), label in points:
        centre, side = ((1, 0.5), -1) if label else ((0, 0), 1)
        assert math.dist((x, y), centre) == pytest.approx(1)
        assert side * (y - centre[1]) >= -1e-9
    assert [label for _, label in points] == [0] * 20 + [1] * 20
    assert moons(40) == moons(40) != moons(40, seed=1)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_trace_ends_where_training_ends(optimizer):
    trace = boundary_trace(5, optimizer, 0.1, 12, 3)
    model = MLP([2, 5, 2], 3)
    if optimizer == "Adam":
        rule = Adam(model.parameters(), 0.1)
    else:
        rule = SGD(model.parameters(), 0.1, 0.9)
    data = moons(_moons.POINTS)
    losses = train(model, rule, data, _moons.SIZE, 12, 3)
    assert len(losses) == 48

    def side(points):  # by PyTorch
        h = torch.tensor(points, dtype=torch.float64)
        for n, layer in enumerate(model.layers):
            w = torch.tensor(layer.weight.tolist(), dtype=torch.float64)
            b = torch.tensor(layer.bias.tolist(), dtype=torch.float64)
            h = (h.relu() if n else h) @ w.T + b
        return (h[:, 1] > h[:, 0]).tolist()

    last = trace[-1]
    cells = [cell for _, row in last.picture.rows for cell in row]
    middles = [
        (-1.5 + 0.25 * (i + 0.5), 1.5 - 0.25 * (j + 0.5))
        for j in range(10)
        for i in range(16)
    ]
    assert [cell.mark == "on" for cell in cells] == side(middles)
    right = sum(
        s == bool(c)
        for s, (_, c) in zip(side([x for x, _ in data]), data, strict=True)
    )
    mean = sum(losses[-4:]) / 4
    assert last.caption == (
        f"Epoch 12, step 48: loss {mean:.3f}. {right} of 96 points are on "
        "the right side."
    )
    assert last.below.rows[0][1][-1].text == f"{mean:.2f}"
    # each point lies in a cell, and shows there unless covered
    shown = {c.text for c in cells}
    assert shown == {"", "○", "●"}


def test_default_trace_separates_the_moons():
    trace = boundary_trace()
    assert 10 <= len(trace) <= 40
    assert trace[0].caption.startswith("Before the first step: 43 of 96")
    assert trace[-1].caption.endswith("96 of 96 points are on the right side.")
    assert all(len(f.below.columns) == 12 for f in trace)


def test_one_hidden_unit_or_too_long_steps_do_not():
    for given in (
        {"hidden": 1},
        {"lr": 10.0},
        {"lr": 10.0, "optimizer": "SGD"},
    ):
        right = int(
            boundary_trace(**given)[-1].caption.split(".")[2].split()[0]
        )
        assert right < 90


def test_sgd_wants_a_larger_learning_rate_than_adam():
    def loss(optimizer, lr):
        caption = boundary_trace(optimizer=optimizer, lr=lr)[-1].caption
        return float(caption.split("loss ")[1].split(". ")[0])

    assert loss("SGD", 0.5) < loss("Adam", 0.05) < loss("SGD", 0.05) / 5
    assert loss("Adam", 1.0) > 5 * loss("Adam", 0.05)


@pytest.mark.parametrize(
    ("do", "says"),
    [
        (lambda: MLP([3]), r"2 or more widths above 0, got \[3\]"),
        (lambda: MLP([3, 0, 2]), "2 or more widths above 0"),
        (
            lambda: cross_entropy(tensor([[1, 2]]), [0, 1]),
            "expected 1 classes, one a row, got 2",
        ),
        (
            lambda: list(batches([], 0, random.Random())),
            "size must be at least",
        ),
        (lambda: MLP([3, 2])(tensor([[1.0, 2.0]])), r"got \(1, 2\) @ \(3, 2\)"),
        (lambda: boundary_trace(hidden=0), "hidden must be 1 to 32, got 0"),
        (lambda: boundary_trace(lr=0), "lr must be above 0 and at most 10"),
        (lambda: boundary_trace(lr=math.nan), "lr must be above 0"),
        (lambda: boundary_trace(epochs=61), "epochs must be 12 to 60, got 61"),
    ],
)
def test_bad_input_is_refused(do, says):
    with pytest.raises(ValueError, match=says):
        do()
