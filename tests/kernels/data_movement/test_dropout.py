"""Dropout draws Philox's numbers, the same forward and backward."""

import math

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import WRONG, mutant

from warpmap import DEVICE
from warpmap.kernels import tl, triton
from warpmap.kernels.data_movement import dropout as module
from warpmap.kernels.data_movement._philox import philox4x32
from warpmap.kernels.data_movement.dropout import (
    BLOCK,
    DTYPES,
    MAX_SEED,
    NUM_WARPS,
    dropout,
    dropout_reference,
    keep_mask,
    threshold,
)

# Random123, tests/kat_vectors: rounds, counter, key, result
KNOWN_ANSWERS = """
7  00000000 00000000 00000000 00000000 00000000 00000000 5f6fb709 0d893f64 4f121f81 4f730a48
7  ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 5207ddc2 45165e59 4d8ee751 8c52f662
7  243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""  # noqa: E501

# one element; a counter and one more; a tile, less or more by one; several
LENGTHS = [1, 9, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 333]
SEEDS = [0, 1, 2**32 + 5, MAX_SEED]


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def kept(n, p, seed, op=dropout):
    return op(torch.ones(n, device=DEVICE), p, seed) != 0


def test_what_is_dropped_is_zero_even_if_not_finite():
    mask = keep_mask(64, 0.5, seed=0).to(DEVICE)
    for value in (math.nan, math.inf, -math.inf):
        x = torch.full((64,), value, device=DEVICE)
        assert torch.equal(dropout(x, 0.5, seed=0) == 0, ~mask)
        assert torch.equal(dropout_reference(x, 0.5, seed=0) == 0, ~mask)


def check(op, x, p, seed):
    """Against the reference, and no element nearer than one rounding.

    One product in float32 by a scale that is rounded to float32, one rounding
    to the dtype (Triton's interpreter cuts off).
    """
    y = op(x, p, seed)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    assert y.is_contiguous()
    mask = keep_mask(x.numel(), p, seed).view(x.shape).to(x.device)
    exact = x.double() * mask * (2**16 / (2**16 - threshold(p)))
    assert torch.equal(y != 0, mask & (x != 0))
    bound = exact.abs() * (torch.finfo(x.dtype).eps + 2**-23) + 1e-37
    bound += torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
    assert ((y.double() - exact).abs() <= bound).all()


def gradient(op):
    def dx(x, p, seed):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(op(leaf, p, seed), leaf, x)[0]

    return dx


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_philox_gives_the_published_answers(line):
    rounds, *words = line.split()
    words = [int(word, 16) for word in words]
    answer = philox4x32(tuple(words[:4]), tuple(words[4:6]), int(rounds))
    assert list(answer) == words[6:]
    as_tensors = [torch.tensor([word]) for word in words]
    answer = philox4x32(as_tensors[:4], as_tensors[4:6], int(rounds))
    assert [word.item() for word in answer] == words[6:]


@triton.jit
def _draw_kernel(words_ptr, uniform_ptr, seed_ptr, first, N: tl.constexpr):
    i = tl.arange(0, N)
    seed = tl.load(seed_ptr)
    words = tl.randint4x(seed, first + i.to(tl.int64))
    for k in tl.static_range(4):
        tl.store(words_ptr + k * N + i, words[k])
    tl.store(uniform_ptr + i, tl.rand(seed, first + i.to(tl.int64)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("first", [0, 2**32 - 3, 2**40])
def test_triton_draws_the_same_numbers(seed, first):
    N = 8
    drawn = torch.empty(4, N, dtype=torch.int32, device=DEVICE)
    uniform = torch.empty(N, device=DEVICE)
    seeds = torch.tensor([seed], device=DEVICE)
    _draw_kernel[(1,)](drawn, uniform, seeds, first, N=N)
    high, low = divmod(seed, 2**32)
    for i in range(N):
        upper, lower = divmod(first + i, 2**32)
        words = philox4x32((lower, upper, 0, 0), (low, high))
        assert tuple(w % 2**32 for w in drawn[:, i].tolist()) == words
        # tl.rand folds the sign away, and scales to below 1
        signed = words[0] - 2**32 * (words[0] >> 31)
        magnitude = signed if signed >= 0 else -signed - 1
        assert math.isclose(uniform[i].item(), magnitude / 2**31, rel_tol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
def test_agrees_with_the_reference(n, dtype):
    check(dropout, normal(n, dtype), 0.3, seed=n)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0, 2**-16, 0.1, 0.5, 0.999, 1 - 1e-9])
def test_every_seed_and_rate(p, seed):
    check(dropout, normal(100), p, seed)


def test_the_reference_scales_what_stays():
    x = normal(1000)
    y = dropout_reference(x, 0.25, seed=3)
    mask = keep_mask(1000, 0.25, seed=3).to(DEVICE)
    torch.testing.assert_close(y, torch.where(mask, x / 0.75, 0.0))


def test_any_shape_and_strides_count_in_order():
    x = normal((6, 50))
    check(dropout, x.T, 0.4, seed=5)
    check(dropout, x[::2, 3:40], 0.4, seed=5)
    flat = dropout(x.flatten(), 0.4, seed=5)
    assert torch.equal(dropout(x, 0.4, seed=5).flatten(), flat)
    assert dropout(normal(()), 0.4, seed=5).shape == ()
    assert dropout(normal((0, 3))).shape == (0, 3)


def test_the_mask_does_not_depend_on_how_much_is_asked_for():
    long = kept(4 * BLOCK, 0.5, seed=7)
    for n in LENGTHS[:4]:
        assert torch.equal(kept(n, 0.5, seed=7), long[:n])


def test_the_mask_does_not_depend_on_the_tile():
    n = 3 * BLOCK + 5
    x, seed = torch.ones(n, device=DEVICE), torch.tensor([7], device=DEVICE)
    for tile, warps in ((256, 1), (4096, 8)):
        y = torch.empty_like(x)
        module._dropout_kernel[(triton.cdiv(n, tile),)](
            x, seed, y, n, threshold(0.5), 2.0, BLOCK=tile, num_warps=warps
        )
        assert torch.equal(y, dropout(x, 0.5, seed=7))


def test_forward_and_backward_drop_the_same():
    for dtype in DTYPES:
        x = normal(5000, dtype).requires_grad_()
        y = dropout(x, 0.4)  # a seed that only the graph knows
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx != 0, y.detach() != 0)
        check(gradient(dropout), normal(5000, dtype), 0.4, seed=2)


def test_the_second_derivative_is_the_same_mask_again():
    x, v = normal(100).requires_grad_(), normal(100).requires_grad_()
    (dx,) = torch.autograd.grad(dropout(x, 0.5, 1), x, v, create_graph=True)
    (dv,) = torch.autograd.grad(dx, v, torch.ones_like(v))
    assert torch.equal(dv != 0, kept(100, 0.5, 1))


def test_only_the_seed_is_kept_for_backward():
    sizes = []

    def pack(saved):
        sizes.append(saved.numel() * saved.itemsize)
        return saved

    x = normal(10000).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dropout(x * 2.0, 0.5)
    assert sizes == [8]


def test_seeds_come_from_torch_and_differ():
    x = normal(1000)
    torch.manual_seed(1)
    first, second = dropout(x), dropout(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(dropout(x), first)
    seed = torch.tensor([9], device=DEVICE)
    assert torch.equal(dropout(x, 0.5, seed), dropout(x, 0.5, 9))


# Is it random? n is large, so counts are normal: 5 sigma is 1 in 1.7 million


def off(count, n, share):
    """Standard deviations from what a binomial distribution expects."""
    return abs(count - n * share) / math.sqrt(n * share * (1 - share))


def check_random(op):
    n, seed = 2**16, 123
    for p in (0.1, 0.5, 0.9):
        share = 1 - threshold(p) / 2**16
        mask = kept(n, p, seed, op)
        assert off(int(mask.sum()), n, share) < 5
        # each of the eight places of a counter by its own
        for place in mask.view(-1, 8).unbind(1):
            assert off(int(place.sum()), n // 8, share) < 5
        # neighbours, near and far, agree as often as strangers
        for distance in (1, 2, 3, 4, 7, 8, 9, 16, 64, 2048, 2049):
            both = mask[:-distance] & mask[distance:]
            # pairs that share an element make this a little wider
            assert off(int(both.sum()), n - distance, share**2) < 8
        # and so do neighbouring seeds
        other = kept(n, p, seed + 1, op)
        assert off(int((mask & other).sum()), n, share**2) < 5


@pytest.mark.slow
def test_rates_are_binomial_and_neighbours_not_correlated():
    check_random(dropout)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.zeros(3, dtype=torch.float64), {}, "float64"),
        (torch.zeros(3, device="meta"), {}, "meta"),
        (torch.zeros(3), {"p": 1.0}, r"p must be .* got 1\.0"),
        (torch.zeros(3), {"p": -0.1}, r"p must be .* got -0\.1"),
        (torch.zeros(3), {"p": math.nan}, "p must be .* got nan"),
        (torch.zeros(3), {"seed": -1}, "seed must be .* got -1"),
        (torch.zeros(3), {"seed": 2**63}, "seed must be .* got 92"),
        (torch.zeros(3), {"seed": torch.zeros(1)}, "seed.*float32"),
        (torch.zeros(3), {"seed": torch.tensor(1)}, r"seed.*got \(\)"),
    ],
)
def test_bad_input_is_refused_by_name(x, options, message):
    if x.device.type != "meta":
        x = x.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        dropout(x, **options)


@pytest.mark.slow
def test_the_operator_is_registered_as_torch_wants_it():
    seed = torch.tensor([3], device=DEVICE)
    for x in (normal((4, 5)), normal((4, 5)).T):
        arguments = (x.requires_grad_(), seed, 0.5)
        torch.library.opcheck(torch.ops.warpmap.dropout.default, arguments)


@pytest.mark.slow
def test_compiles_with_its_gradient_in_one_graph():
    def loss(x):
        return (dropout(x * 2, 0.5, seed=4) ** 2).sum()

    x = normal((4, 9)).requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = (torch.autograd.grad(f(x), x)[0] for f in (loss, compiled))
    torch.testing.assert_close(a, b, rtol=0, atol=0)

    # with a seed of its own: drawn inside the graph, kept for its gradient
    drawn = torch.compile(dropout, fullgraph=True, backend="aot_eager")
    y = drawn(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx != 0, y.detach() != 0)


@pytest.mark.sanitize
def test_the_kernel_runs_at_its_edges():
    for n in (9, BLOCK + 1):
        check(dropout, normal(n, torch.bfloat16), 0.3, seed=1)
        check(gradient(dropout), normal(n, torch.bfloat16), 0.3, seed=1)


# Faults: the checks above must see every one


def checks(op):
    check(op, normal((3, 1000)), 0.3, seed=2**32 + 5)
    check(gradient(op), normal((3, 1000)), 0.3, seed=2**32 + 5)


@pytest.mark.parametrize("fault", ["all zeros", "last element unwritten"])
def test_a_wrong_result_is_caught(fault):
    def wrong(x, p, seed):
        return WRONG[fault](lambda x: dropout(x, p, seed))(x)

    checks(dropout)
    with pytest.raises(AssertionError):
        check(wrong, normal((3, 1000)), 0.3, seed=5)


FAULTS = {
    "not scaled": ("x * scale", "x"),
    "complement kept": ("halves >= tl", "halves < tl"),
    "signed comparison": (
        "halves >= tl.cast(drop, tl.uint32)",
        "halves.to(tl.int32, bitcast=True) >= drop",
    ),
    "a word twice": ("tl.join(w0, w2)", "tl.join(w0, w0)"),
    "a half twice": ("tl.join(words << 16, words)", "tl.join(words, words)"),
    "every tile the same": ("first // EACH + tl", "0 * first + tl"),
    "another seed backward": (
        "_dropout(dy, *ctx.saved_tensors, ctx.p)",
        "_dropout(dy, ctx.saved_tensors[0] + 1, ctx.p)",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_caught(fault, tmp_path):
    wrong = mutant(module, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        checks(wrong.dropout)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a word twice", "every tile the same"])
def test_what_is_not_random_fails_the_tests_of_randomness(fault, tmp_path):
    wrong = mutant(module, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check_random(wrong.dropout)


# What the compiler makes of the kernel


def compiled(dtype):
    return compile_sm90a(
        f"{module.__name__}:_dropout_kernel",
        {
            "x_ptr": f"*{dtype}:16",
            "y_ptr": f"*{dtype}:16",
            "seed_ptr": "*i64:16",
            "n": "i32:16",
            "drop": "i32",
            "scale": "fp32",
        },
        {"BLOCK": BLOCK},
        num_warps=NUM_WARPS,
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_moves_16_bytes_at_a_time(dtype):
    kernel = compiled(dtype)
    assert kernel.spills == kernel.stack == 0
    packs = BLOCK * {"bf16": 2, "fp32": 4}[dtype] // 16 // kernel.threads
    assert kernel.opcodes["LDG.E.128"] == packs
    assert kernel.opcodes["STG.E.128"] == packs
    # many threads at once hide the generator's arithmetic
    assert kernel.registers <= 32


def test_a_counter_serves_eight_elements():
    kernel = compiled("bf16")
    assert kernel.shared == 0  # decisions are made where the elements are
    each = BLOCK // kernel.threads
    high = ("IMAD.HI.U32", "IMAD.WIDE.U32")
    high_halves = sum(kernel.opcodes[name] for name in high)
    # two products a round, ten rounds, eight elements
    assert high_halves <= 2 * 10 * each // 8 + 3
    assert sum(kernel.opcodes.values()) < 24 * each


def test_arguments_of_1_which_a_launch_makes_constants_compile():
    pointers = {"x_ptr": "*fp32:16", "y_ptr": "*fp32:16", "seed_ptr": "*i64:16"}
    compile_sm90a(
        f"{module.__name__}:_dropout_kernel",
        {**pointers, "scale": "fp32"},
        {"n": 1, "drop": 1, "BLOCK": BLOCK},
        num_warps=NUM_WARPS,
    )


# On a GPU


@pytest.mark.gpu
def test_large_masks_agree_with_the_reference():
    for seed in range(10):
        n = int(torch.randint(1, 2**22, ()))
        dtype = DTYPES[seed % 3]
        check(dropout, normal(n, dtype), torch.rand(()).item(), seed)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 1000
    y = dropout(torch.ones(n, dtype=torch.bfloat16, device="cuda"), 0.5, 11)
    assert torch.equal(y[:4096] != 0, kept(4096, 0.5, 11))
    assert not torch.equal(y[-2000:] != 0, y[:2000] != 0)
    counters = torch.arange(n // 8 - 100, n // 8)
    zero = torch.zeros_like(counters)
    words = philox4x32((counters, zero, zero, zero), (11, 0))
    halves = [half for w in words for half in (w & 0xFFFF, w >> 16)]
    mask = torch.stack(halves, dim=1).flatten() >= threshold(0.5)
    assert torch.equal(y[-800:].cpu() != 0, mask)


@pytest.mark.gpu
def test_runs_are_equal_bit_for_bit():
    x = normal(10**6, torch.bfloat16)
    first = dropout(x, 0.1, 1)
    for _ in range(20):
        assert torch.equal(dropout(x, 0.1, 1), first)


@pytest.mark.gpu
def test_inductor_compiles_it():
    # nowhere zero, so that a zero was dropped: x + 1 would hit -1 + 1
    x = normal((64, 1000), torch.bfloat16).abs().requires_grad_()
    f = torch.compile(lambda x: dropout(x + 1, 0.3), fullgraph=True)
    y = f(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx != 0, y.detach() != 0)
    assert not torch.equal(f(x) != 0, y != 0)
