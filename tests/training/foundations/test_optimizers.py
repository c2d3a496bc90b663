import copy
import functools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from warpmap import DEVICE
from warpmap.training.foundations import optimizers
from warpmap.training.foundations._newton_schulz import JORDAN, orthogonalize
from warpmap.training.foundations.optimizers import (
    SGD,
    Adafactor,
    Adam,
    AdamW,
    Lion,
    Muon,
)

CUBIC_AND_MORE = 15 / 8, -10 / 8, 3 / 8
# a scalar, a vector, tall and wide matrices, a stack of matrices
SHAPES = [(), (7,), (9, 4), (3, 8), (2, 3, 5)]
MATRICES = [(9, 4), (3, 8), (1, 5)]
STEPS = 30
# about twenty roundings a step, each seen through a division by what may be a
# hundred times smaller: far below the 1e-6 that a wrong rule exceeds
RTOL = 1e-11


class LionOfThePaper:
    """Algorithm 2 of Chen et al., one number at a time."""

    def __init__(self, params, lr, beta1=0.9, beta2=0.99, decay=0.1):
        self.params, self.lr = params, lr
        self.beta1, self.beta2, self.decay = beta1, beta2, decay
        self.m = [[0.0] * p.numel() for p in params]

    def step(self):
        for p, m in zip(self.params, self.m, strict=True):
            if p.grad is None:
                continue
            theta, g = p.flatten().tolist(), p.grad.flatten().tolist()
            for i in range(len(theta)):
                c = self.beta1 * m[i] + (1 - self.beta1) * g[i]
                sign = math.copysign(1.0, c) if c else 0.0
                theta[i] -= self.lr * (sign + self.decay * theta[i])
                m[i] = self.beta2 * m[i] + (1 - self.beta2) * g[i]
            p.copy_(torch.tensor(theta, dtype=p.dtype).view(p.shape))


def set_lr(optimizer, lr):
    optimizer.lr = lr
    for group in getattr(optimizer, "param_groups", []):
        group["lr"] = lr


def trajectory(make, shapes=SHAPES, scale=1.0, dtype=torch.float64):
    """Every parameter after every step; some have no gradient at times."""
    generator = torch.Generator().manual_seed(1)

    def random(shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        return x.to(DEVICE, dtype)

    params = [random(shape) for shape in shapes]
    optimizer = make(params)
    path = []
    for step in range(STEPS):
        for i, p in enumerate(params):
            # of other sizes from step to step and from row to row
            g = random(p.shape) * scale * (1 + step % 5) * 4.0**-i
            p.grad = None if (step + i) % 4 == 1 else g
        set_lr(optimizer, 0.05 / (1 + step))
        optimizer.step()
        path.append([p.clone() for p in params])
    return path


def assert_same(got, want, rtol=RTOL):
    for step, (g, w) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(
            g, w, rtol=rtol, atol=rtol, msg=lambda m, s=step: f"step {s}: {m}"
        )


def theirs(name, **settings):
    def make(params):
        return getattr(torch.optim, name)(params, lr=0.05, **settings)

    return make


def muon_of_torch(params):
    return torch.optim.Muon(
        params, lr=0.05, adjust_lr_fn="match_rms_adamw", weight_decay=0.1
    )


OTHER = 0.05, (0.8, 0.95), 1e-3, 0.1  # lr, betas, eps, weight_decay
theirs_with_other = {"betas": OTHER[1], "eps": OTHER[2], "weight_decay": 0.1}
PAIRS = {
    "SGD": (lambda p: SGD(p, 0.05), theirs("SGD", momentum=0.9), SHAPES),
    "Adam": (lambda p: Adam(p, 0.05), theirs("Adam"), SHAPES),
    "Adam, decay in the gradient": (
        lambda p: Adam(p, *OTHER),
        theirs("Adam", **theirs_with_other),
        SHAPES,
    ),
    "AdamW": (
        lambda p: AdamW(p, *OTHER),
        theirs("AdamW", **theirs_with_other),
        SHAPES,
    ),
    "Adafactor": (
        lambda p: Adafactor(p, 0.05),
        theirs("Adafactor"),
        # PyTorch keeps rows and columns of a scalar out of its vectors
        [(7,), (9, 4), (3, 8), (2, 3, 5)],
    ),
    "Lion": (
        lambda p: Lion(p, 0.05, weight_decay=0.1),
        lambda p: LionOfThePaper(p, 0.05),
        SHAPES,
    ),
    # both multiply in bfloat16, the same products in the same order
    "Muon": (lambda p: Muon(p, 0.05), muon_of_torch, MATRICES),
}


@functools.cache
def wanted(name):
    _, reference, shapes = PAIRS[name]
    return trajectory(reference, shapes)


@pytest.mark.parametrize("name", PAIRS)
def test_agrees_with_torch_step_by_step(name):
    ours, _, shapes = PAIRS[name]
    assert_same(trajectory(ours, shapes), wanted(name))


def test_muon_agrees_with_torch_in_float64_throughout(monkeypatch):
    # torch always multiplies in bfloat16; here it is told another
    monkeypatch.setattr(
        torch.Tensor, "bfloat16", lambda x: x.double().clone(), raising=True
    )
    assert_same(
        trajectory(lambda p: Muon(p, 0.05, dtype=None), MATRICES),
        trajectory(muon_of_torch, MATRICES),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw_agrees_with_torch_in_training_precision(dtype):
    got = trajectory(lambda p: AdamW(p, 0.05), dtype=dtype)
    want = trajectory(theirs("AdamW", foreach=True), dtype=dtype)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


class NoCorrection(Adam):
    def _update(self, p, g, step, state):
        super()._update(p, g, 10**9, state)


class EpsInsideTheRoot(Adam):
    def _update(self, p, g, step, state):
        b1, b2 = self.betas
        mean = state["mean"].lerp_(g, 1 - b1) / (1 - b1**step)
        square = state["square"].lerp_(g * g, 1 - b2) / (1 - b2**step)
        p.sub_(mean / (square + self.eps).sqrt(), alpha=self.lr)


class OneCountForAll(AdamW):
    def step(self):
        self.steps = [max(self.steps)] * len(self.steps)
        super().step()


class Dampened(SGD):
    def _update(self, p, g, step, state):
        super()._update(p, g * (1 - self.momentum), step, state)


class OneMemory(Lion):
    def _update(self, p, g, step, state):
        state["mean"].lerp_(g, 1 - self.betas[1])
        p.mul_(1 - self.lr * self.weight_decay)
        p.sub_(state["mean"].sign(), alpha=self.lr)


class NoNesterov(Muon):
    def _update(self, p, g, step, state):
        state["mean"].lerp_(g, 1 - self.momentum)
        p.mul_(1 - self.lr * self.weight_decay)
        update = orthogonalize(state["mean"])
        p.sub_(update, alpha=0.2 * math.sqrt(max(p.shape)) * self.lr)


class RateOfTheSmallerSide(Muon):
    def _update(self, p, g, step, state):
        before = p * (1 - self.lr * self.weight_decay)
        super()._update(p, g, step, state)
        p.copy_(before + (p - before) * (min(p.shape) / max(p.shape)) ** 0.5)


class AbsoluteSteps(Adafactor):
    def _update(self, p, g, step, state):
        before = p.clone()
        super()._update(p, g, step, state)
        size = before.square().mean().sqrt().clamp(min=self.eps)
        p.copy_(before + (p - before) / size)


FAULTS = {
    "dampened": ("SGD", lambda p: Dampened(p, 0.05)),
    "no correction": ("Adam", lambda p: NoCorrection(p, 0.05)),
    "eps inside the root": (
        "Adam, decay in the gradient",
        lambda p: EpsInsideTheRoot(p, *OTHER),
    ),
    "decay in the gradient": ("AdamW", lambda p: Adam(p, *OTHER)),
    "betas swapped": (
        "AdamW",
        lambda p: AdamW(p, 0.05, (0.95, 0.8), 1e-3, 0.1),
    ),
    "one count for all": ("AdamW", lambda p: OneCountForAll(p, *OTHER)),
    "a constant memory": ("Adafactor", lambda p: Adafactor(p, 0.05, decay=0)),
    "not clipped": ("Adafactor", lambda p: Adafactor(p, 0.05, clip=math.inf)),
    "absolute steps": ("Adafactor", lambda p: AbsoluteSteps(p, 0.05)),
    "one memory": ("Lion", lambda p: OneMemory(p, 0.05, weight_decay=0.1)),
    "no Nesterov": ("Muon", lambda p: NoNesterov(p, 0.05)),
    "smaller side": ("Muon", lambda p: RateOfTheSmallerSide(p, 0.05)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_rule_is_caught(fault):
    name, wrong = FAULTS[fault]
    got = trajectory(wrong, PAIRS[name][2])
    with pytest.raises(AssertionError):
        assert_same(got, wanted(name), rtol=1e-6)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)], ids=str)
def test_newton_schulz_changes_singular_values_only(shape):
    g = torch.randn(shape, dtype=torch.float64, device=DEVICE)
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    a, b, c = JORDAN
    s /= s.norm()
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    got = orthogonalize(g, dtype=None)
    torch.testing.assert_close(got, u * s @ vh, rtol=0, atol=1e-12)
    # a round more, the wrong polynomial, or no division is seen
    for wrong in (
        orthogonalize(g, 6, dtype=None),
        orthogonalize(g, coefficients=CUBIC_AND_MORE, dtype=None),
    ):
        assert (wrong - got).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)], ids=str)
def test_newton_schulz_reaches_the_polar_factor(shape):
    g = torch.randn(shape, dtype=torch.float64, device=DEVICE)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    got = orthogonalize(g, 30, CUBIC_AND_MORE, dtype=None)
    # once near, each round cubes the error: what is left is rounding
    torch.testing.assert_close(got, u @ vh, rtol=0, atol=1e-12)
    # Muon's five rounds come near it, and no nearer
    off = torch.linalg.svdvals(orthogonalize(g, dtype=None)) - 1
    assert 0.01 < off.abs().max() <= 0.32
    # in bfloat16 the products are off by a few of its roundings
    rough = orthogonalize(g).double()
    assert (rough - orthogonalize(g, dtype=None)).abs().max() < 0.05


def test_five_rounds_keep_what_is_above_2_thousandths_near_1():
    s = torch.logspace(math.log10(0.002), 0, 100_001, dtype=torch.float64)
    a, b, c = JORDAN
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    assert 0.68 < s.min() < 0.69
    assert 1.20 < s.max() < 1.21


ALL = {
    "SGD": lambda p: SGD(p, 0.05),
    "Adam": lambda p: Adam(p, 0.05, eps=0),
    "AdamW": lambda p: AdamW(p, 0.05, eps=0),
    "Adafactor": lambda p: Adafactor(p, 0.05),
    "Lion": lambda p: Lion(p, 0.05),
    "Muon": lambda p: Muon(p, 0.05, dtype=None),
}


@pytest.mark.parametrize("name", ALL)
def test_only_sgd_minds_the_scale_of_the_loss(name):
    one = trajectory(ALL[name], MATRICES)
    thousand = trajectory(ALL[name], MATRICES, scale=1024.0)
    if name == "SGD":
        with pytest.raises(AssertionError):
            assert_same(thousand, one, rtol=0.1)
    else:
        assert_same(thousand, one, rtol=1e-9)


def test_muon_turns_with_the_matrix_and_adam_does_not():
    g = torch.randn(5, 5, dtype=torch.float64, device=DEVICE)
    turn, _ = torch.linalg.qr(torch.randn_like(g))

    def step(kind, g, **settings):
        p = torch.zeros_like(g)
        optimizer, p.grad = kind([p], 1.0, **settings), g
        optimizer.step()
        return p

    got, want = step(Muon, turn @ g, dtype=None), step(Muon, g, dtype=None)
    torch.testing.assert_close(got, turn @ want)
    off = step(Adam, turn @ g) - turn @ step(Adam, g)
    assert off.abs().max() > 0.1


def test_numbers_of_state_of_a_matrix():
    held = {}
    for name, make in ALL.items():
        (state,) = make([torch.zeros(30, 20, device=DEVICE)]).state
        held[name] = sum(x.numel() for x in state.values())
    means = {"SGD": 600, "Lion": 600, "Muon": 600}
    assert held == means | {"Adam": 1200, "AdamW": 1200, "Adafactor": 30 + 20}


class Calls(TorchDispatchMode):
    """Counts what would be launched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_adamw_takes_eight_calls_however_many_tensors():
    def calls(kind, tensors):
        params = [torch.zeros(3, device=DEVICE) for _ in range(tensors)]
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer = kind(params, 0.1)
        with Calls() as counted:
            optimizer.step()
        return len(counted.names)

    assert calls(AdamW, 1) == calls(AdamW, 50) == 8
    assert calls(Adam, 50) == 50 * calls(Adam, 1)


@pytest.mark.parametrize("name", ALL)
def test_resuming_changes_no_bit(name, tmp_path):
    def run(params, optimizer, steps):
        for step in steps:
            for p in params:
                p.grad = torch.cos(p * (step + 1))
            optimizer.step()

    start = [torch.randn(4, 6, device=DEVICE) for _ in range(3)]
    whole = [p.clone() for p in start]
    run(whole, ALL[name](whole), range(8))

    half = [p.clone() for p in start]
    first = ALL[name](half)
    run(half, first, range(4))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = ALL[name](half)
    second.load_state_dict(saved)
    run(half, second, range(4, 8))
    assert all(map(torch.equal, half, whole))

    # without the state the rest would be another run
    lost = [p.clone() for p in start]
    run(lost, ALL[name](lost), range(4))
    run(lost, ALL[name](lost), range(4, 8))
    assert not all(map(torch.equal, lost, whole))


def test_a_loaded_state_is_a_copy():
    p = torch.ones(3, device=DEVICE)
    first, second = AdamW([p], 0.1), AdamW([p], 0.1)
    p.grad = torch.ones_like(p)
    first.step()
    saved = copy.deepcopy(first.state_dict())
    second.load_state_dict(first.state_dict())
    second.step()
    assert first.steps == saved["steps"] == [1]
    torch.testing.assert_close(first.state_dict(), saved, rtol=0, atol=0)


def test_a_state_of_something_else_is_refused_and_nothing_changes():
    p, q = torch.ones(3, device=DEVICE), torch.ones(4, device=DEVICE)
    optimizer = AdamW([p, q], 0.1)
    for other in (
        AdamW([p], 0.1),
        AdamW([q, p], 0.1),
        AdamW([p, q, p.clone()], 0.1),
        AdamW([p.double(), q.double()], 0.1),
        Lion([p, q], 0.1),
    ):
        for state in other.state:
            for x in state.values():
                x.fill_(7)
        with pytest.raises(ValueError, match="expected state"):
            optimizer.load_state_dict(other.state_dict())
    short = AdamW([p, q], 0.1).state_dict() | {"steps": [1]}
    with pytest.raises(ValueError, match="expected state 1"):
        optimizer.load_state_dict(short)
    assert optimizer.steps == [0, 0]
    assert not any(x.any() for s in optimizer.state for x in s.values())


def test_without_gradients_nothing_happens():
    p = torch.ones(3, device=DEVICE)
    optimizer = AdamW([p], 0.1)
    optimizer.step()
    assert optimizer.steps == [0]
    assert p.tolist() == [1, 1, 1]
    p.grad = torch.ones_like(p)
    optimizer.zero_grad()
    assert p.grad is None


def test_empty_tensors_and_zero_gradients():
    for name in ("SGD", "Adam", "AdamW", "Lion"):
        p, q = torch.ones(0, 3, device=DEVICE), torch.ones(2, device=DEVICE)
        p.grad, q.grad = torch.ones_like(p), torch.zeros_like(q)
        getattr(optimizers, name)([p, q], 0.1).step()
        assert q.isfinite().all()
    for name in ("Adafactor", "Muon"):
        p = torch.ones(2, 3, device=DEVICE)
        p.grad = torch.zeros_like(p)
        getattr(optimizers, name)([p], 0.1).step()
        assert p.isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: AdamW([], 0.1), "got none"),
        (lambda p: AdamW([p, p], 0.1), "without repeats"),
        (lambda p: AdamW([p], -1), "lr must be finite and at least 0, got -1"),
        (lambda p: AdamW([p], 0.1, (0.9, 1.0)), r"betas must be in \[0, 1\)"),
        (lambda p: AdamW([p], 0.1, eps=-1), "eps must be"),
        (lambda p: Lion([p], 0.1, weight_decay=math.nan), "weight_decay must"),
        (lambda p: SGD([p], 0.1, momentum=1), "momentum must be"),
        (lambda p: Adafactor([p], clip=0), "clip must be above 0"),
        (lambda p: Muon([p], 0.1), r"expected matrices, got shape \(3,\)"),
        (lambda p: orthogonalize(p), r"expected a matrix \(M, N\), got"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(torch.ones(3))
