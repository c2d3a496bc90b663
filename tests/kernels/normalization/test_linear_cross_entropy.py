"""The chunked loss and its gradients are those of all logits at once."""

import math

import pytest
import torch
import torch.nn.functional as F
from aot import compile_sm90a
from kernel_checks import assert_accurate, mutant
from torch.utils._python_dispatch import TorchDispatchMode

from warpmap import DEVICE
from warpmap.kernels.normalization import linear_cross_entropy as module
from warpmap.kernels.normalization.cross_entropy import DTYPES
from warpmap.kernels.normalization.linear_cross_entropy import (
    _linear_cross_entropy,
    _scale,
    chunk_rows,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)

M, C, V = 11, 24, 300
# a rest of 3, a rest of 1, all rows, more than there are
CHUNKS = [4, 10, 11, 64]


def made(dtype=torch.float32, shape=(M, C, V)):
    """Hidden states, weights and targets, every sixth of them ignored."""
    tokens, width, classes = shape
    hidden = torch.randn(tokens, width, device=DEVICE)
    weight = torch.randn(classes, width, device=DEVICE) * 2 / width**0.5
    target = torch.randint(classes, (tokens,), device=DEVICE)
    target[3::6] = -100
    return hidden.to(dtype), weight.to(dtype), target


def trained(f):
    """The loss times 3 and both gradients, as columns and matrices."""

    def run(hidden, weight, *rest, **options):
        leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
        loss = 3 * f(*leaves, *rest, **options)
        gradients = torch.autograd.grad(loss, leaves)
        return loss.detach().reshape(1, 1), *gradients

    return run


def by_torch(hidden, weight, target, **options):
    return F.cross_entropy(F.linear(hidden, weight), target, **options)


def check(f, hidden, weight, target, chunk, **options):
    """Against all logits in float64.

    A logit z is a sum of C products and stored, so it errs by u |z| and by
    what its terms add up to. Its exponential feels that once, and the log of
    their sum once more. The gradient of the logits is stored, and so is every
    product; that of the weights once a chunk.
    """
    h, w = hidden.double(), weight.double()
    loss, dh, dw = f(hidden, weight, target, chunk=chunk, **options)
    exact = trained(by_torch)(h, w, target, **options)

    ignored = target == options.get("ignore_index", -100)
    logits = F.linear(h, w)
    terms = F.linear(h.abs(), w.abs()).max().item()
    z = logits.abs().max().item()
    chosen = F.one_hot(target.masked_fill(ignored, 0), len(w))
    g = 3 * (logits.softmax(1) + chosen) * ~ignored[:, None]
    if options.get("reduction") != "sum":
        g /= max(1, (~ignored).sum().item())
    bound = {
        "stored": 2 + 2 * z,
        "steps": 60 + 6 * z + 16 * math.sqrt(h.shape[1]) * terms,
    }
    size = g.sum().reshape(1, 1) * (z + math.log(len(w)))
    assert loss.dtype == torch.float32
    u = {"dtype": hidden.dtype}
    loss = loss.to(hidden.dtype)  # it is made of stored logits
    assert_accurate(loss, exact[0], **u, scale=size, terms=len(w), **bound)
    scale = g @ w.abs()
    assert_accurate(dh, exact[1], **u, scale=scale, terms=len(w), **bound)
    bound["stored"] += math.ceil(len(h) / chunk)
    scale = g.T @ h.abs()
    assert_accurate(dw, exact[2], **u, scale=scale, terms=len(h), **bound)


def test_reference_agrees_with_a_case_worked_by_hand():
    # logits log 2 and log 6: the losses are log 4 and log 4/3
    hidden = torch.ones(3, 1)
    weight = torch.tensor([[2.0], [6.0]]).log()
    target = torch.tensor([0, 1, -100])
    loss = linear_cross_entropy_reference(hidden, weight, target)
    torch.testing.assert_close(loss.item(), math.log(16 / 3) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_agrees_with_float64(chunk, dtype):
    check(trained(linear_cross_entropy), *made(dtype), chunk)


@pytest.mark.sanitize
def test_every_kernel_runs_in_chunks_with_a_rest():
    # float32: cuBLAS's kernels of 16-bit products break under racecheck
    inputs = made(torch.float32, (5, 16, 5000))
    loss, dhidden, dweight = trained(linear_cross_entropy)(*inputs, chunk=2)
    assert all(t.isfinite().all() for t in (loss, dhidden, dweight))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_rows_may_fill_a_chunk(reduction):
    hidden, weight, target = made()
    target[4:10] = 7
    options = {"reduction": reduction, "ignore_index": 7}
    target[target == -100] = 7
    check(trained(linear_cross_entropy), hidden, weight, target, 5, **options)
    _, dhidden, _ = trained(linear_cross_entropy)(
        hidden, weight, target, chunk=5, **options
    )
    assert (dhidden[4:10] == 0).all()


def test_layouts_may_be_any():
    hidden, weight, target = made()
    transposed = (t.T.contiguous().T for t in (hidden, weight))
    check(trained(linear_cross_entropy), *transposed, target, 6)
    apart = torch.stack([target, target], dim=1)[:, 1]
    check(trained(linear_cross_entropy), hidden, weight, apart, 6)


def test_the_result_does_not_depend_on_the_chunks():
    inputs = made()
    whole = trained(linear_cross_entropy)(*inputs, chunk=M)
    for chunk in CHUNKS:
        parts = trained(linear_cross_entropy)(*inputs, chunk=chunk)
        torch.testing.assert_close(parts, whole)


def test_sixteen_chunks_cost_the_weights_gradient_little_accuracy():
    """Each rounds once more; the errors are up as often as down."""
    hidden, weight, target = made(torch.float16, (32, C, V))
    exact = trained(by_torch)(hidden.double(), weight.double(), target)[2]

    def error(f, **options):
        dweight = trained(f)(hidden, weight, target, **options)[2]
        return (dweight.double() - exact).square().mean().sqrt()

    at_once = error(by_torch)
    assert error(linear_cross_entropy, chunk=32) < 1.5 * at_once
    assert error(linear_cross_entropy, chunk=2) < 4 * at_once


class Log(TorchDispatchMode):
    """Which operators run, and the bytes of the largest result."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.names.append(op.__name__.split(".")[0])
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.nbytes)
        return out


@pytest.mark.parametrize(
    ("wants", "products"),
    [
        ((True, True), 3),
        ((True, False), 2),
        ((False, True), 2),
        ((False, False), 1),
    ],
)
def test_no_tensor_is_larger_than_a_chunk_and_no_product_is_made_twice(
    wants, products
):
    inputs = made(shape=(M, 8, V))
    body = _linear_cross_entropy._init_fn  # as called by PyTorch
    with Log() as log:
        body(*inputs, -100, True, 4, *wants)
    made_products = [n for n in log.names if n in ("mm", "addmm_")]
    assert len(made_products) == products * 3  # chunks
    assert log.largest == 4 * 8 * V < 4 * M * V  # the weights'


def test_what_is_frozen_gets_no_gradient():
    hidden, weight, target = made()
    _, dhidden, dweight = trained(by_torch)(hidden, weight, target)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, target)
    (3 * loss).backward()
    torch.testing.assert_close(hidden.grad, dhidden)
    assert weight.grad is None
    hidden = hidden.detach()
    loss = linear_cross_entropy(hidden, weight.requires_grad_(), target)
    (3 * loss).backward()
    torch.testing.assert_close(weight.grad, dweight)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, target)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, by_torch(hidden, weight, target).detach())


def test_backward_hands_over_what_forward_made_without_a_copy(monkeypatch):
    kept = []

    def scale(x, factor):
        kept.append(x.data_ptr())
        _scale(x, factor)

    monkeypatch.setattr(module, "_scale", scale)
    hidden, weight, target = made()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    linear_cross_entropy(*leaves, target).backward()
    assert kept == [leaf.grad.data_ptr() for leaf in leaves]
    # the incoming gradient was 1: nothing was scaled, and nothing is lost
    _, *expected = trained(by_torch)(hidden, weight, target)
    for leaf, triple in zip(leaves, expected, strict=True):
        torch.testing.assert_close(3 * leaf.grad, triple)


def test_a_second_backward_is_refused():
    hidden, weight, target = made()
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_tokens():
    hidden, weight, target = made(shape=(0, C, V))
    loss, dhidden, dweight = trained(linear_cross_entropy)(
        hidden, weight, target, reduction="sum"
    )
    assert loss == 0
    assert dhidden.shape == (0, C)
    assert torch.equal(dweight, torch.zeros_like(weight))
    # a mean of none, as PyTorch has it
    assert linear_cross_entropy(hidden, weight, target).isnan()


def test_the_chunk_keeps_to_its_budget_in_whole_tiles():
    for V, itemsize in [(128256, 2), (32000, 2), (50257, 4), (10**9, 4)]:
        rows = chunk_rows(10**6, V, itemsize)
        assert rows % 128 == 0
        within = rows * V * itemsize <= module.CHUNK_BYTES
        assert within or rows == 128
        assert (rows + 128) * V * itemsize > module.CHUNK_BYTES
    assert chunk_rows(5, 128256, 2) == 5
    assert chunk_rows(0, 10, 2) == 1


INT = torch.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4)}, r"\(M, C\).*\(4,\)"),
        ({"weight": torch.zeros(0, 3)}, r"V at least 1.*\(0, 3\)"),
        ({"weight": torch.zeros(5, 2)}, "same width, got 3 and 2"),
        ({"weight": torch.zeros(5, 3).half()}, "float32 and torch.float16"),
        ({"hidden": torch.zeros(4, 3).double()}, "float64"),
        ({"target": torch.zeros(3, dtype=INT)}, r"\(4,\).*\(3,\)"),
        ({"target": torch.zeros(4)}, "int64.*float32"),
        ({"reduction": "none"}, "mean or sum, got 'none'"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(5, 3),
        "target": torch.zeros(4, dtype=INT),
        **change,
    }
    arguments = {
        k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v
        for k, v in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_another_device_is_refused():
    hidden, weight, target = made()
    with pytest.raises(ValueError, match="meta"):
        linear_cross_entropy(hidden, weight.to("meta"), target)


def test_operators_are_registered_as_torch_wants_them():
    hidden, weight, target = made()
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    ops = torch.ops.warpmap
    torch.library.opcheck(
        ops.linear_cross_entropy.default,
        (*leaves, target, -100, True, 4, True, True),
        # the fourth traces backward outside of torch.compile, where it is in
        # place; the next test compiles it
        test_utils=(
            "test_schema",
            "test_autograd_registration",
            "test_faketensor",
        ),
    )
    x, factor = torch.randn(5, device=DEVICE), torch.tensor(2.0, device=DEVICE)
    torch.library.opcheck(ops.scale.default, (x, factor))


@pytest.mark.slow
def test_compiles_with_its_gradients_in_one_graph():
    inputs = made()
    compiled = torch.compile(
        linear_cross_entropy, fullgraph=True, backend="aot_eager"
    )
    expected = trained(linear_cross_entropy)(*inputs, chunk=4)
    found = trained(compiled)(*inputs, chunk=4)
    torch.testing.assert_close(found, expected)


# Faults: the checks above must see every one

FAULTS = {
    "only the last chunk's weights": ("beta=int(start > 0)", "beta=0"),
    "old memory added": ("beta=int(start > 0)", "beta=1"),
    "first targets for all": (
        "target[rows], ignore_index)",
        "target[: len(logits)], ignore_index)",
    ),
    "first hidden states for all": (
        "addmm_(logits.T, hidden[rows]",
        "addmm_(logits.T, hidden[: len(logits)]",
    ),
    "rest left out": (
        "range(0, M, chunk)",
        "range(0, M // chunk * chunk, chunk)",
    ),
    "mean of a chunk": (
        "share / (target != ignore_index).sum()",
        "share / chunk",
    ),
    "ignored rows in the mean": ("(target != ignore_index).sum()", "M"),
    "probabilities for the gradient": (
        "lse, shares[rows], logits, ignore_index",
        "lse, shares[rows], logits.clone(), ignore_index",
    ),
    "incoming gradient left out": ("x * factor", "x"),
    "incoming gradient squared": ("x * factor", "x * factor * factor"),
    "scaled only in part": (
        "triton.cdiv(x.numel(), BLOCK)",
        "x.numel() // BLOCK",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_caught(fault, tmp_path):
    wrong = mutant(module, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check(trained(wrong.linear_cross_entropy), *made(), 4)


def test_scaling_moves_16_bytes_at_a_time_and_can_skip():
    kernel = compile_sm90a(
        f"{module.__name__}:_scale_kernel",
        {"x_ptr": "*bf16:16", "factor_ptr": "*fp32:16", "n": "i32:16"},
        {"BLOCK": 8192},
        num_warps=8,
    )
    assert kernel.spills == kernel.stack == 0
    assert kernel.opcodes["LDG.E.128"] == kernel.opcodes["STG.E.128"] == 4
    assert kernel.opcodes["EXIT"] >= 2  # at the end, and where factor is 1


# On a GPU


@pytest.mark.gpu
def test_peak_memory_is_a_chunk_and_the_gradients():
    tokens, width, classes = 4096, 1024, 64000
    hidden, weight, target = made(torch.bfloat16, (tokens, width, classes))
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    linear_cross_entropy(*leaves, target).backward()  # cuBLAS takes its own
    hidden.grad = weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(*leaves, target).backward()
    peak = torch.cuda.max_memory_allocated() - before
    gradients = 2 * (tokens + classes) * width
    assert peak < gradients + module.CHUNK_BYTES + 2**20
    assert peak < 0.3 * (3 * 2 * tokens * classes)


@pytest.mark.gpu
def test_scaling_more_than_2_to_the_31_elements():
    x = torch.ones(2**31 + 5, dtype=torch.bfloat16, device="cuda")
    _scale(x, torch.tensor(3.0, device="cuda"))
    assert x.min() == x.max() == 3


@pytest.mark.gpu
def test_random_shapes_agree_with_float64():
    for _ in range(30):
        shape = [int(2 ** (9 * torch.rand(()).item())) for _ in range(3)]
        dtype = DTYPES[int(torch.randint(3, ()))]
        chunk = int(torch.randint(1, shape[0] + 2, ()))
        check(trained(linear_cross_entropy), *made(dtype, shape), chunk)


@pytest.mark.gpu
def test_inductor_compiles_it():
    inputs = made(torch.bfloat16)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    expected = trained(linear_cross_entropy)(*inputs, chunk=4)
    found = trained(compiled)(*inputs, chunk=4)
    torch.testing.assert_close(found, expected)


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_weights():
    inputs = [t.to("cuda:1") for t in made()]
    check(trained(linear_cross_entropy), *inputs, 4)


class Made(TorchDispatchMode):
    """Remembers the largest tensor of zeros that anyone makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "zero" in func.__name__ and isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_backward_makes_no_zeros_for_what_nobody_asked():
    hidden = torch.randn(8, 16, device=DEVICE, requires_grad=True)
    weight = torch.randn(64, 16, device=DEVICE, requires_grad=True)
    target = torch.randint(64, (8,), device=DEVICE)
    loss = linear_cross_entropy(hidden, weight, target)
    with Made() as made:
        loss.backward()
    assert made.largest < hidden.numel()
