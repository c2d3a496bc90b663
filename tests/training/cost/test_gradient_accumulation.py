import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from warpmap import DEVICE
from warpmap.training.cost.gradient_accumulation import (
    IGNORE,
    AccumulatingLinear,
    MainGrads,
    accumulate,
    add_product,
    mean_of_means,
)
from warpmap.training.precision.mixed_precision import MasterWeights

V, C = 11, 8


class Net(nn.Module):
    """A tied head, a bias, a layer of each kind, a frozen one."""

    def __init__(self, linear=AccumulatingLinear):
        super().__init__()
        self.embedding = nn.Embedding(V, C)
        self.up = linear(C, 16)
        self.fixed = linear(16, 16, bias=False).requires_grad_(False)
        self.down = nn.Linear(16, C)
        self.head = linear(C, V, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.up(self.embedding(tokens)).tanh()
        return self.head(self.down(self.fixed(x)))


def net(dtype=torch.float64, linear=AccumulatingLinear):
    torch.manual_seed(3)
    return Net(linear).to(DEVICE, dtype)


def batch(lengths, T=9):
    """Answers of these lengths, padded to ``T``."""
    inputs = torch.randint(0, V, (len(lengths), T), device=DEVICE)
    targets = torch.randint(0, V, (len(lengths), T), device=DEVICE)
    ends = torch.tensor(lengths, device=DEVICE)[:, None]
    return inputs, targets.masked_fill(
        torch.arange(T, device=DEVICE) >= ends, IGNORE
    )


def pieces(whole, sizes):
    return list(zip(whole[0].split(sizes), whole[1].split(sizes), strict=True))


def gradients(how, batches):
    model = net()
    loss = how(model, batches)
    return loss, [p.grad for p in model.parameters() if p.requires_grad]


def one_large_batch(model, batches):
    """What all must equal: the mean over the targets, in one pass."""
    inputs, targets = (torch.cat(t) for t in zip(*batches, strict=True))
    loss = F.cross_entropy(model(inputs).mT, targets, ignore_index=IGNORE)
    loss.backward()
    return loss.item()


def disagree(how, lengths, sizes):
    """Largest error against one large batch, beside the largest gradient."""
    torch.manual_seed(0)
    whole = batch(lengths)
    want_loss, want = gradients(one_large_batch, [whole])
    loss, got = gradients(how, pieces(whole, sizes))
    errors = [(a - b).abs().max() for a, b in zip(got, want, strict=True)]
    largest = max(g.abs().max() for g in want)
    return max(
        float(max(errors) / largest), abs(loss - want_loss) / abs(want_loss)
    )


LENGTHS = [9, 1, 4, 2, 9, 1]
SPLITS = [[6], [3, 3], [1, 5], [2, 1, 3], [1] * 6]
# some 100 additions a gradient in another order, 2^-53 of a sum each
ROUNDING = 1e-13


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_any_split_is_one_large_batch(sizes):
    assert disagree(accumulate, LENGTHS, sizes) < ROUNDING


def test_a_piece_without_targets_counts_for_nothing():
    assert disagree(accumulate, [3, 0, 2], [1, 1, 1]) < ROUNDING
    wrong, _ = gradients(mean_of_means, pieces(batch([3, 0]), [1, 1]))
    assert math.isnan(wrong)  # 0 / 0


def test_the_mean_of_means_is_right_for_equal_counts_only():
    assert disagree(mean_of_means, [4] * 6, [2, 2, 2]) < ROUNDING
    assert disagree(mean_of_means, LENGTHS, [6]) < ROUNDING
    assert disagree(mean_of_means, LENGTHS, [1] * 6) > 0.1


def test_in_a_mean_of_means_a_token_of_a_short_piece_weighs_more():
    # the mean over all of N, each weighted by N / (pieces x its piece's count)
    torch.manual_seed(0)
    inputs, targets = batch([1, 9])
    _, got = gradients(mean_of_means, pieces((inputs, targets), [1, 1]))
    model = net()
    loss = F.cross_entropy(model(inputs).mT, targets, reduction="none")
    weight = torch.tensor([[10 / 2], [10 / 18]], device=DEVICE)
    ((loss * weight).sum() / 10).backward()
    want = [p.grad for p in model.parameters() if p.requires_grad]
    torch.testing.assert_close(got, want)


def faulty(divide):
    def how(model, batches):
        total = 0.0
        for inputs, targets in batches:
            loss = F.cross_entropy(
                model(inputs).mT, targets, reduction="sum"
            ) / divide(batches, targets)
            loss.backward()
            total += loss.item()
        return total

    return how


@pytest.mark.parametrize(
    "divide",
    [
        lambda batches, targets: 1,
        lambda batches, targets: sum(t.numel() for _, t in batches),
        lambda batches, targets: (targets != IGNORE).sum(),
        lambda batches, targets: len(batches) * (targets != IGNORE).sum(),
        lambda batches, targets: len(batches) * targets.numel(),
    ],
    ids=["sum", "padding", "no pieces", "mean of means", "padded means"],
)
@pytest.mark.parametrize("sizes", SPLITS[1:], ids=str)
def test_checks_catch(divide, sizes):
    assert disagree(faulty(divide), LENGTHS, sizes) > 1e-3


def with_main_grads():
    model = net()
    weights = MasterWeights(model, torch.float64)
    return model, weights, MainGrads(model, weights.masters)


def test_main_grads_are_the_gradients_of_autograd():
    whole = batch(LENGTHS)
    plain = net(linear=nn.Linear)
    for _ in range(2):  # the second time after `zero`
        want_loss = accumulate(plain, pieces(whole, [2, 1, 3]))
    for p in plain.parameters():
        if p.grad is not None:
            p.grad /= 2  # two rounds have been added up
    model, weights, main = with_main_grads()
    for _ in range(2):
        main.zero()
        loss = accumulate(model, pieces(whole, [2, 1, 3]))
    assert loss == want_loss  # the forward pass is the same
    assert all(p.grad is None for p in model.parameters())
    for master, p in zip(weights.masters, plain.parameters(), strict=True):
        assert (master.grad is None) == (not p.requires_grad)
        if p.grad is not None:
            scale = p.grad.abs().max()
            assert (master.grad - p.grad).abs().max() < ROUNDING * scale


def test_gradients_pass_through_an_accumulating_layer():
    layer = AccumulatingLinear(5, 3).to(DEVICE).double()
    layer.main_grad = torch.zeros_like(layer.weight)
    x = torch.randn(2, 4, 5, dtype=torch.float64, device=DEVICE)
    assert torch.autograd.gradcheck(layer, [x.requires_grad_()])


def test_one_piece_in_bf16_is_what_collect_gives():
    whole = batch(LENGTHS)
    collected, added = (net(torch.float32, nn.Linear) for _ in range(2))
    first = MasterWeights(collected, torch.bfloat16)
    second = MasterWeights(added, torch.bfloat16)
    MainGrads(added, second.masters)
    accumulate(collected, [whole])
    accumulate(added, [whole])
    first.collect()
    for got, want in zip(second.masters, first.masters, strict=True):
        assert got.requires_grad == (got.grad is not None)
        if got.grad is not None:
            assert got.grad.dtype == torch.float32
            assert torch.equal(got.grad, want.grad)


def test_after_zero_grad_the_sum_is_found_again():
    model, weights, main = with_main_grads()
    optimizer = torch.optim.SGD(list(weights.masters), lr=0.1)
    accumulate(model, [batch(LENGTHS)])
    optimizer.zero_grad()  # sets None
    main.zero()
    accumulate(model, [batch(LENGTHS)])
    assert weights.masters[0].grad.abs().sum() > 0


def sums(K=200, M=8, N=16, B=16):
    """The sum of K products of bf16, in four ways, and how far it may err."""
    exact = torch.zeros(M, N, dtype=torch.float64, device=DEVICE)
    size, dw = exact.clone(), torch.bfloat16
    in_fp32, fused = exact.float(), exact.float()
    in_bf16 = exact.to(dw)
    for _ in range(K):
        a = torch.randn(M, B, device=DEVICE).to(dw)
        b = (torch.randn(B, N, device=DEVICE) + 0.5).to(dw)
        exact += a.double() @ b.double()
        size += a.double().abs() @ b.double().abs()
        product = a @ b  # rounded to bf16
        in_fp32 += product
        in_bf16 += product
        add_product(fused, a, b)
    # products of bf16 are exact in fp32; K B terms are added in fp32, each
    # sum off by at most 2^-24 of what has been added
    return exact, fused, in_fp32, in_bf16, K * B * 2.0**-24 * size


def test_a_fused_sum_errs_as_fp32_does():
    exact, fused, in_fp32, in_bf16, bound = sums()
    assert ((fused - exact).abs() <= bound).all()
    # one rounding of each product to bf16 shows, a sum in bf16 more so
    far = (in_fp32 - exact).norm(), (in_bf16 - exact).norm()
    assert 10 * (fused - exact).norm() < far[0] < far[1] / 3


def overwrites(total, a, b):
    total.copy_(a.to(total.dtype) @ b.to(total.dtype))


def rounds(total, a, b):
    total.copy_((total + a.float() @ b.float()).bfloat16())


def subtracts(total, a, b):
    total.addmm_(a.to(total.dtype), b.to(total.dtype), alpha=-1)


@pytest.mark.parametrize("fault", [overwrites, rounds, subtracts])
def test_the_bound_catches(fault, monkeypatch):
    monkeypatch.setitem(globals(), "add_product", fault)
    exact, fused, _, _, bound = sums()
    assert not ((fused - exact).abs() <= bound).all()


def test_a_sum_in_bf16_stops_growing():
    model = nn.Linear(1, 1, bias=False).to(DEVICE, torch.bfloat16)
    for _ in range(1000):
        model(torch.ones(1, 1, device=DEVICE).bfloat16()).sum().backward()
    assert model.weight.grad.item() == 256.0


class NewTensors(TorchDispatchMode):
    """Notes how many values each result of an operation holds."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {
            a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)
        }
        for t in out if isinstance(out, tuple) else [out]:
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in old:
                self.sizes.append(t.numel())
        return out


def largest_in_backward(layer):
    # on the CPU: there the backward pass runs in this thread
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    y = layer(x).sum()
    with NewTensors() as new:
        y.backward()
    return max(new.sizes)


def test_no_gradient_of_the_weight_is_stored():
    layer = AccumulatingLinear(64, 32, bias=False).double()
    assert largest_in_backward(layer) == 64 * 32
    layer.main_grad = torch.zeros_like(layer.weight)
    assert largest_in_backward(layer) == 2 * 64


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="got 2 without any"):
        accumulate(net(), pieces(batch([0, 0]), [1, 1]))
    with pytest.raises(ValueError, match=r"got \(2, 2\), \(2, 3\), \(4, 2\)"):
        add_product(torch.ones(2, 2), torch.ones(2, 3), torch.ones(4, 2))
    model = net()
    with pytest.raises(ValueError, match="got 0"):
        MainGrads(model, [])
    with pytest.raises(ValueError, match="2 parameters in order"):
        MainGrads(nn.Linear(1, 1), [torch.zeros(1)] * 2)
