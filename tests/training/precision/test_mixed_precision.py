import copy
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from warpmap import DEVICE
from warpmap.hardware.gpu.number_formats import (
    BF16,
    E4M3,
    E5M2,
    FP16,
    FP32,
    TF32,
    decode,
    encode,
)
from warpmap.training.precision.mixed_precision import (
    LossScaler,
    MasterWeights,
    round_to,
)

TORCH = {
    "BF16": (BF16, torch.bfloat16),
    "FP16": (FP16, torch.float16),
    "E5M2": (E5M2, torch.float8_e5m2),
}


def floats(bits):
    """fp32 numbers with these bits."""
    bits = torch.as_tensor(bits, dtype=torch.int64)
    return ((bits + 2**31) % 2**32 - 2**31).int().view(torch.float32)


def every_case():
    """Each upper half of an fp32 number, with lower halves that decide."""
    upper = torch.arange(2**16)[:, None] << 16
    # FP16 drops 13 bits: its half is at 0x1000 and at 0x3000, BF16's at 0x8000
    lower = [0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF]
    lower += [0x8000, 0x8001, 0xF000, 0xFFFF]
    return floats((upper + torch.tensor(lower)).flatten())


def same_bits(got, want):
    """Whether two fp32 tensors agree in every bit, but for kinds of nan."""
    assert got.dtype == want.dtype == torch.float32
    alike = got.view(torch.int32) == want.view(torch.int32)
    return bool((alike | (got.isnan() & want.isnan())).all())


@pytest.mark.parametrize("name", TORCH)
def test_rounding_agrees_with_torch_in_every_bit(name):
    form, dtype = TORCH[name]
    x = every_case()
    assert same_bits(round_to(x, form), x.to(dtype).float())


def test_tf32_rounds_as_fp16_does_with_the_range_of_bf16():
    # as many mantissa bits as FP16: in FP16's normal range they agree, and a
    # power of two moves any number into that range without rounding it
    x = every_case()
    x = x[x.isfinite() & (x.abs() >= 2.0**-126) & (x.abs() < 2.0**127)]
    mantissa, exponent = torch.frexp(x)  # 0.5 to 1
    want = torch.ldexp(mantissa.half().double(), exponent).float()
    assert same_bits(round_to(x, TF32), want)


@pytest.mark.parametrize("form", [BF16, TF32, FP16, E5M2], ids=str)
def test_rounding_agrees_with_the_codes_of_number_formats(form):
    x = floats(torch.randint(0, 2**32, (2000,)))
    edges = [0.0, -0.0, form.largest, -form.smallest, form.smallest / 2]
    x = torch.cat([x, torch.tensor([*edges, math.inf, -math.inf, math.nan])])
    want = [decode(form, encode(form, number)) for number in x.tolist()]
    assert same_bits(round_to(x, form), torch.tensor(want))


def rounding_faults():
    def truncate(x, form):
        d = 23 - form.mantissa
        return (x.view(torch.int32) >> d << d).view(torch.float32)

    def ties_away(x, form):
        d = 23 - form.mantissa
        half = 1 << (d - 1)
        return ((x.view(torch.int32) + half) >> d << d).view(torch.float32)

    def flush_subnormals(x, form):
        flushed = torch.zeros_like(x).copysign(x)
        small = x.abs() < form.smallest_normal
        return torch.where(small, flushed, round_to(x, form))

    def saturate(x, form):
        bound = form.largest
        return round_to(x, form).clamp(-bound, bound)

    return [truncate, ties_away, flush_subnormals, saturate]


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("fault", rounding_faults(), ids=lambda f: f.__name__)
def test_rounding_checks_catch(fault, name):
    form, dtype = TORCH[name]
    x = every_case()
    assert not same_bits(fault(x, form), x.to(dtype).float())


@pytest.mark.gpu
def test_tensor_cores_keep_ten_bits_of_an_fp32_number():
    x = torch.randn(256, 256, device="cuda")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    kept = x @ torch.eye(256, device="cuda")
    torch.set_float32_matmul_precision(before)
    assert same_bits(kept, round_to(kept, TF32))
    # up or down, whatever the unit does: less than a spacing away
    assert ((kept - x).abs() < 2.0**-10 * x.abs()).all()
    assert not same_bits(kept, x)


class Net(nn.Module):
    """Two layers, one of them tied, a buffer, a frozen parameter."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(8), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(3))
        self.register_buffer("table", torch.full((8,), 1 / 3))

    def forward(self, x):
        x = self.first(x).relu() + self.frozen
        return self.second(x) * self.table.to(x.dtype)


def test_masters_carry_what_the_model_rounds_off():
    model = Net().to(DEVICE)
    before = [p.detach().clone() for p in model.parameters()]
    weights = MasterWeights(model, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert model.table.dtype == torch.float32
    assert model.second.weight is model.first.weight
    for master, parameter, old in zip(
        weights.masters, model.parameters(), before, strict=True
    ):
        assert torch.equal(master, old)
        assert torch.equal(parameter, old.bfloat16())
        assert master.requires_grad == parameter.requires_grad


def test_collect_copies_in_fp32_and_clears():
    model = Net().to(DEVICE)
    weights = MasterWeights(model, torch.bfloat16)
    for _ in range(2):  # the second overwrites the first
        model(torch.randn(4, 8, device=DEVICE).bfloat16()).sum().backward()
        grads = [
            None if p.grad is None else p.grad.clone()
            for p in model.parameters()
        ]
        weights.collect()
        assert all(p.grad is None for p in model.parameters())
        for master, grad in zip(weights.masters, grads, strict=True):
            assert (master.grad is None) == (grad is None)
            if grad is not None:
                assert master.grad.dtype == torch.float32
                assert torch.equal(master.grad, grad.float())
    weights.collect()  # nothing new: a second step must not use old ones
    assert all(master.grad is None for master in weights.masters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_without_rounding_training_is_the_usual_one(dtype):
    model = Net().to(DEVICE, dtype)
    usual = copy.deepcopy(model)
    weights = MasterWeights(model, dtype)
    ours = torch.optim.AdamW(weights.masters, lr=0.01)
    theirs = torch.optim.AdamW(usual.parameters(), lr=0.01)
    for _ in range(5):
        x = torch.randn(4, 8, device=DEVICE, dtype=dtype)
        model(x).square().mean().backward()
        weights.collect()
        ours.step()
        weights.publish()
        theirs.zero_grad()
        usual(x).square().mean().backward()
        theirs.step()
    for parameter, want in zip(
        model.parameters(), usual.parameters(), strict=True
    ):
        assert torch.equal(parameter, want)


def mlp():
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)]
    return nn.Sequential(*layers).to(DEVICE)


class Ours:
    """fp16 weights, fp32 masters, our scaler."""

    def __init__(self, model, scale, interval, scaler=LossScaler):
        self.model = model
        self.weights = MasterWeights(model, torch.float16)
        self.optimizer = torch.optim.SGD(
            self.weights.masters, lr=0.05, momentum=0.9
        )
        self.scaler = scaler(scale, interval=interval)

    def step(self, x, y):
        loss = F.mse_loss(self.model(x.half()).float(), y)
        (loss * self.scaler.scale).backward()
        self.weights.collect()
        if self.scaler.unscale(self.weights.masters):
            self.optimizer.step()
            self.weights.publish()
        return self.scaler.scale, self.weights.masters


class Theirs:
    """fp32 weights under ``torch.autocast``, with torch's scaler."""

    def __init__(self, model, scale, interval):
        self.model = model
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=0.05, momentum=0.9
        )
        self.scaler = torch.amp.GradScaler(
            DEVICE, init_scale=scale, growth_interval=interval
        )

    def step(self, x, y):
        self.optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = F.mse_loss(self.model(x).float(), y)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale(), list(self.model.parameters())


def walk(scaler=LossScaler, steps=40):
    """Both, step by step; where the first difference is, or None."""
    torch.manual_seed(1)
    model = mlp()
    ours = Ours(copy.deepcopy(model), 2.0**20, 3, scaler)
    theirs = Theirs(model, 2.0**20, 3)
    scales, skipped = [], 0
    for i in range(steps):
        x = torch.randn(32, 16, device=DEVICE)
        y = torch.randn(32, 4, device=DEVICE) * (1e4 if i == 25 else 1)
        old = [p.detach().clone() for p in theirs.model.parameters()]
        got, masters = ours.step(x, y)
        want, parameters = theirs.step(x, y)
        scales.append(want)
        skipped += all(map(torch.equal, old, parameters))
        if got != want or not all(map(torch.equal, masters, parameters)):
            return i, scales, skipped
    return None, scales, skipped


def test_each_step_is_that_of_autocast_and_grad_scaler_in_every_bit():
    difference, scales, skipped = walk()
    assert difference is None
    # and the walk has met everything: calm, growth, overflow at both ends
    assert skipped >= 4
    assert scales[0] < 2.0**20
    assert any(b > a for a, b in pairwise(scales))
    assert any(b < a for a, b in pairwise(scales[20:]))


class NeverSkips(LossScaler):
    def unscale(self, params):
        super().unscale(params)
        return True


class ForgetsToUnscale(LossScaler):
    def unscale(self, params):
        scale, params = self.scale, list(params)
        finite = super().unscale(params)
        for p in params:
            p.grad *= scale
        return finite


class UnscalesByTheNextScale(LossScaler):
    def unscale(self, params):
        before, params = self.scale, list(params)
        finite = super().unscale(params)
        for p in params:
            p.grad *= before / self.scale
        return finite


class CountsOn(LossScaler):
    def unscale(self, params):
        calm = self._calm
        finite = super().unscale(params)
        self._calm = self._calm if finite else calm  # an overflow resets it
        return finite


class LooksAtOneGradient(LossScaler):
    def unscale(self, params):
        params = list(params)
        for p in params[1:]:
            p.grad.nan_to_num_(0, 0, 0)
        return super().unscale(params)


@pytest.mark.parametrize(
    "fault",
    [
        NeverSkips,
        ForgetsToUnscale,
        UnscalesByTheNextScale,
        CountsOn,
        LooksAtOneGradient,
    ],
)
def test_the_walk_catches(fault):
    assert walk(fault)[0] is not None


def test_nan_counts_as_overflow():
    scaler = LossScaler(4.0)
    w = torch.ones(2)
    w.grad = torch.tensor([1.0, math.nan])
    assert not scaler.unscale([w])
    assert scaler.scale == 2.0


def test_scaling_brings_gradients_back_that_fp16_would_lose():
    want = torch.logspace(-30, 4, 2000, base=2, device=DEVICE)
    lost = want.half().float()
    scaled = (want * 2.0**10).half().float() / 2.0**10
    assert ((lost == 0) == (want <= 2.0**-25)).all()
    assert (scaled > 0).all()
    # half a unit of 11 bits where the scaled number is normal
    normal = want * 2.0**10 >= 2.0**-14
    assert ((scaled - want).abs() <= 2.0**-11 * want)[normal].all()
    assert not ((lost - want).abs() <= 2.0**-11 * want)[normal].all()


@pytest.mark.parametrize(
    ("op", "want"),
    [
        (lambda x, h: x @ x, torch.bfloat16),
        (lambda x, h: F.linear(x, x), torch.bfloat16),
        (lambda x, h: h.relu(), torch.bfloat16),
        (lambda x, h: h + x, torch.float32),
        (lambda x, h: F.mse_loss(h, h), torch.float32),
        (lambda x, h: F.cross_entropy(h, h.argmax(1)), torch.float32),
    ],
)
def test_autocast_follows_the_rules_of_the_page(op, want):
    x = torch.randn(4, 4, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert op(x, x.bfloat16()).dtype == want


def test_autocast_on_the_cpu_leaves_softmax_as_it_is():
    h = torch.randn(4, 4).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert h.softmax(-1).dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.parametrize(
    "op",
    [
        lambda h: h.softmax(-1),
        lambda h: F.layer_norm(h, (4,)),
        torch.exp,
        torch.sum,
    ],
)
def test_autocast_on_a_gpu_widens(op):
    h = torch.randn(4, 4, device="cuda").bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        assert op(h).dtype == torch.float32


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"got torch\.float64"):
        round_to(torch.zeros(1, dtype=torch.float64), BF16)
    for form in (E4M3, FP32):
        with pytest.raises(ValueError, match="form must be BF16"):
            round_to(torch.zeros(1), form)
    with pytest.raises(ValueError, match=r"got torch\.int8"):
        MasterWeights(mlp(), torch.int8)
    with pytest.raises(ValueError, match="scale must be positive"):
        LossScaler(0.0)
    for bad in ({"growth": 1.0}, {"backoff": 1.0}, {"interval": 0}):
        with pytest.raises(ValueError, match=r"interval at least 1; got"):
            LossScaler(**bad)
    half = torch.ones(1).half()
    half.grad = half.clone()
    with pytest.raises(ValueError, match=r"got \[torch\.float16\]"):
        LossScaler().unscale([half])
    with pytest.raises(ValueError, match=r"got \[\]"):
        LossScaler().unscale([])
