"""Fused AdamW keeps to float64 over many steps, for every list of tensors."""

import math
import weakref

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant
from torch.optim.adamw import adamw
from torch.utils._python_dispatch import TorchDispatchMode

from warpmap import DEVICE
from warpmap.kernels.fused import fused_adam as module
from warpmap.kernels.fused.fused_adam import (
    BLOCK,
    CHUNK,
    _num_warps,
    adamw_reference,
    fused_adamw,
    make_table,
)

SMALL = 2 * BLOCK  # a chunk here, so that small tensors have several

# none, one, around a pack and a block, a chunk and a part of one
SIZES = [0, 1, 3, 4, BLOCK - 1, BLOCK, BLOCK + 3, 0, 2 * SMALL + 5]
RATES = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
STEPS = 4


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", SMALL)


def lists_of(sizes, dtype=torch.float32):
    """Parameters, gradients and two means of zeros."""
    params = [torch.randn(n, device=DEVICE).to(dtype) for n in sizes]
    zeros = [[torch.zeros(n, device=DEVICE) for n in sizes] for _ in "mv"]
    return params, [torch.empty_like(p) for p in params], *zeros


def ours(params, grads, exp_avgs, exp_avg_sqs, step, **rates):
    table = make_table(params, grads, exp_avgs, exp_avg_sqs)
    fused_adamw(table, step, **rates)


class Exact:
    """AdamW as the papers define it: the means as sums over all gradients.

    ``scale`` is what p would be if nothing cancelled: the largest p, and all
    steps with the gradients' magnitudes in the first mean.
    """

    def __init__(self, p, lr, betas, eps, weight_decay):
        self.p, self.scale = p.double(), p.double().abs()
        self.lr, self.betas, self.eps = lr, betas, eps
        self.decay = weight_decay
        self.grads = []

    def step(self, g):
        self.grads.append(g.double())
        t, (b1, b2) = len(self.grads), self.betas
        self.m, self.size, self.v = (
            sum(
                (1 - b) * b ** (t - 1 - i) * f(g)
                for i, g in enumerate(self.grads)
            )
            for b, f in ((b1, lambda g: g), (b1, torch.abs), (b2, torch.square))
        )
        below = (self.v / (1 - b2**t)).sqrt() + self.eps
        rate = self.lr / (1 - b1**t)
        self.p = self.p - self.lr * self.decay * self.p - rate * self.m / below
        self.scale = self.scale + rate * self.size / below


def row(x):
    return x.reshape(1, -1)


def check(op, lists=None, rates=RATES, steps=STEPS):
    """Several steps of ``op`` beside float64."""
    params, grads, exp_avgs, exp_avg_sqs = lists or lists_of(SIZES)
    exact = [Exact(p, **rates) for p in params]
    for step in range(1, steps + 1):
        for g, e in zip(grads, exact, strict=True):
            # of all magnitudes; the step hardly depends on it
            g.copy_(torch.randn_like(g) * 10 ** (3 - step))
            e.step(g)
        op(params, grads, exp_avgs, exp_avg_sqs, step, **rates)
    for p, m, v, e in zip(params, exp_avgs, exp_avg_sqs, exact, strict=True):
        if p.numel() == 0:
            continue
        # each step rounds p twice, and the step itself some ten times; the
        # means round three times a step, and remember it
        count = 16 * steps
        f32 = torch.float32
        assert_accurate(row(p), row(e.p), f32, scale=row(e.scale), steps=count)
        assert_accurate(row(m), row(e.m), f32, scale=row(e.size), steps=count)
        assert_accurate(row(v), row(e.v), f32, steps=count)


def torchs(lists):
    """A step of PyTorch's AdamW on copies, without the optimizer object."""
    params, _, exp_avgs, exp_avg_sqs = ([x.clone() for x in xs] for xs in lists)
    steps = [torch.zeros(()) for _ in params]
    beta1, beta2 = RATES["betas"]
    rates = {k: v for k, v in RATES.items() if k != "betas"}

    def step(grads):
        adamw(
            params,
            list(grads),
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            foreach=False,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            **rates,
        )

    step.params = params
    return step


def test_reference_agrees_with_float64_and_with_torch():
    check(adamw_reference)
    lists = lists_of([7, 30])
    right = torchs(lists)
    for step in range(1, 31):
        for g in lists[1]:
            g.normal_()
        right(lists[1])
        adamw_reference(*lists, step, **RATES)
    for p, q in zip(lists[0], right.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_reference_moves_80_bytes_an_element_in_8_kernels():
    moved = []

    class Meter(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            # an operator that works in place writes its first argument
            tensors = {id(t): t for t in args if isinstance(t, torch.Tensor)}
            moved.append(sum(4 * t.numel() for t in [*tensors.values(), out]))
            return out

    n = 1000
    lists = lists_of([n])
    lists[1][0].normal_()
    with Meter():
        adamw_reference(*lists, step=1)
    assert len(moved) == 8
    assert sum(moved) == 80 * n


@pytest.mark.sanitize
def test_agrees_with_float64():
    check(ours)


def test_agrees_with_torch_over_many_steps():
    lists = lists_of([5, 300])
    right, table = torchs(lists), make_table(*lists)
    for step in range(1, 41):
        for g in lists[1]:
            g.normal_()
        right(lists[1])
        fused_adamw(table, step, **RATES)
    for p, q in zip(lists[0], right.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize(
    "rates",
    [
        {**RATES, "betas": (0.0, 0.999), "weight_decay": 0.0},
        {**RATES, "betas": (0.9, 0.0), "eps": 0.1},
        {**RATES, "lr": 0.0},
    ],
    ids=str,
)
def test_other_rates(rates):
    check(ours, lists_of([33]), rates)


def test_addresses_that_16_does_not_divide():
    """Views, any of the four out of step: their neighbours stay as they are."""
    end = 8 + BLOCK + 88
    many = [torch.full((4, end + 92), 7.0, device=DEVICE) for _ in range(4)]
    lists = [[], [], [], []]
    for i in range(4):
        for j, tensors in enumerate(lists):
            x = many[i][j, 8 + (i == j) : end + (i == j)]
            x.zero_()
            tensors.append(x)
    lists[0][0].normal_()
    check(ours, lists)
    for i in range(4):
        for j in range(4):
            x = many[i][j]
            assert (x[: 8 + (i == j)] == 7).all()
            assert (x[end + (i == j) :] == 7).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_million_steps_later_the_corrections_are_gone():
    n = 9
    p, g, m, v = (torch.randn(n, device=DEVICE).abs() + 0.1 for _ in "pgmv")
    lists = [[p.clone()], [g], [m.clone()], [v.clone()]]
    ours(*lists, step=10**6, lr=0.1, eps=0.0, weight_decay=0.0)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    torch.testing.assert_close(lists[0][0], p - 0.1 * m / v.sqrt())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32])
def test_step_may_be_a_tensor(dtype):
    one, other = lists_of([40]), lists_of([40])
    other[0][0].copy_(one[0][0])
    for lists in (one, other):
        lists[1][0].fill_(0.3)
    step = torch.zeros((), dtype=dtype, device=DEVICE)
    for n in range(1, 4):
        ours(*one, n, **RATES)
        ours(*other, step.add_(1), **RATES)
    assert torch.equal(one[0][0], other[0][0])


def test_a_table_keeps_its_tensors_from_being_freed():
    lists = lists_of([5])
    table = make_table(*lists)
    gradient = weakref.ref(lists[1][0])
    lists[1][0] = None
    assert gradient() is not None
    del table
    assert gradient() is None


def test_no_tensors_and_only_empty_ones():
    fused_adamw(make_table([], [], [], []), 1)
    ours(*lists_of([0, 0]), 1)


# bfloat16


def bf16_steps(op, p, g, steps, **rates):
    """The parameter after some steps with one gradient."""
    lists = [[p.clone()], [g], [p.float() * 0], [p.float() * 0]]
    for step in range(1, steps + 1):
        op(*lists, step, **rates)
    return lists[0][0]


def check_rounding(op):
    """A bf16 lands on a neighbour of the float32, and on average on it."""
    n, steps = 2048, 3
    rates = {"lr": 0.00073, "weight_decay": 0.0}
    ones = torch.ones(n, dtype=torch.bfloat16, device=DEVICE)
    p = bf16_steps(op, ones, -ones, steps, **rates)
    assert p.dtype == torch.bfloat16
    # Adam's step is lr for a constant gradient; 2^-7 is the spacing above 1
    step = 2**-7
    ups = (p.double() - 1) / step
    assert torch.equal(ups, ups.round())
    assert 0 <= ups.min() <= ups.max() <= steps
    share = rates["lr"] / step
    sigma = math.sqrt(steps * share * (1 - share) / n)
    assert abs(ups.mean().item() - steps * share) < 5 * sigma
    both = steps * (steps - 1) * share**2  # expected pairs of steps up
    assert abs((ups * (ups - 1)).mean().item() - both) < 0.5 * both
    # every element, every step and every seed has a number of its own
    halves = ups.view(2, -1)
    assert not torch.equal(halves[0], halves[1])
    again = bf16_steps(op, ones, -ones, steps, **rates)
    assert torch.equal(p, again)
    other = bf16_steps(op, ones, -ones, steps, seed=7, **rates)
    assert not torch.equal(p, other)


def test_bf16_rounds_to_a_neighbour_and_without_bias():
    check_rounding(ours)


def test_two_tensors_round_by_other_numbers():
    params = [
        torch.ones(500, dtype=torch.bfloat16, device=DEVICE) for _ in "ab"
    ]
    zeros = [[torch.zeros(500, device=DEVICE) for _ in "ab"] for _ in "mv"]
    ours(params, [p.clone() for p in params], *zeros, 1)
    assert not torch.equal(*params)


def test_bf16_holds_what_float32_would_to_one_spacing():
    params, grads, m, v = lists_of(SIZES, torch.bfloat16)
    wide = [[x.float().clone() for x in xs] for xs in (params, grads, m, v)]
    for g, w in zip(grads, wide[1], strict=True):
        w.copy_(g.normal_())
    ours(params, grads, m, v, 1, **RATES)
    ours(*wide, 1, **RATES)
    for p, w in zip(params, wide[0], strict=True):
        assert ((p.float() - w).abs() <= w.abs() * 2**-7).all()
    for ours_, float32 in zip((m, v), wide[2:], strict=True):
        for x, y in zip(ours_, float32, strict=True):
            assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_stays_so():
    """A GPU's nan has all bits set: one more would make it -0."""
    nan, inf = math.nan, math.inf
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.tensor([nan, inf, -inf, 1, 1, 1], device=DEVICE)
        g = torch.tensor([1, 1, 1, nan, inf, 1], device=DEVICE)
        for _ in range(20 if DEVICE == "cuda" else 1):
            after = bf16_steps(ours, p.to(dtype), g.to(dtype), 1)
            assert after.isfinite().tolist() == [False] * 5 + [True]


# Bad input


def bad(change):
    lists = [[torch.zeros(4, 6, device=DEVICE) for _ in "ab"] for _ in "pgmv"]
    change(lists)
    return lists


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[1].pop(), "2 grads, as params, got 1"),
        (lambda x: x[2].__setitem__(1, x[2][1].T), r"exp_avgs\[1\] \(4, 6\)"),
        (lambda x: x[0].__setitem__(1, x[0][1].T), r"strides \(1, 6\)"),
        (lambda x: x[1].__setitem__(0, x[1][0].half()), "got .* torch.float16"),
        (
            lambda x: x[3].__setitem__(0, x[3][0].bfloat16()),
            r"exp_avg_sqs\[0\].*torch.float32.*bfloat16",
        ),
        (
            lambda x: x[3].__setitem__(0, x[3][0].to("meta")),
            r"exp_avg_sqs\[0\] on meta",
        ),
        (lambda x: x[0].__setitem__(1, x[0][0]), "list tied ones once"),
    ],
)
def test_bad_tensors_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        make_table(*bad(change))


def test_other_dtypes_are_refused():
    lists = [[torch.zeros(4, device=DEVICE)] for _ in "pgmv"]
    lists[:2] = [[x.half() for x in xs] for xs in lists[:2]]
    with pytest.raises(ValueError, match=r"float32 or bfloat16, got .*float16"):
        make_table(*lists)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 0}, "step must be at least 1, got 0"),
        ({"step": torch.zeros(2)}, r"step as one number.*\(2,\)"),
        ({"step": torch.zeros((), device="meta")}, "on meta"),
        ({"step": 1, "betas": (0.9, 1.0)}, r"betas must be.*\(0.9, 1.0\)"),
    ],
)
def test_bad_rates_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        fused_adamw(make_table(*bad(lambda x: None)), **arguments)


# Faults: the checks above must see every one


def small_checks(op):
    check(op, lists_of([3, BLOCK + 3, 2 * SMALL + 5]), steps=2)


def changed_result(fault):
    """A planted fault, in the parameters that the kernel leaves."""

    def op(params, *rest, **rates):
        ours(params, *rest, **rates)
        stacked = torch.stack([params[1], params[1].flip(0)])
        params[1].copy_(WRONG[fault](lambda x: x)(stacked)[-1].flip(0))

    return op


@pytest.mark.parametrize("fault", sorted({*WRONG} - {"tail unmasked"}))
def test_a_wrong_result_is_caught(fault):
    with pytest.raises(AssertionError):
        small_checks(changed_result(fault))


def wrong_op(old, new, folder):
    wrong = mutant(module, old, new, folder)
    wrong.CHUNK = SMALL

    def op(*lists_and_step, **rates):
        *lists, step = lists_and_step
        wrong.fused_adamw(wrong.make_table(*lists), step, **rates)

    return op


BELOW = "(tl.sqrt(v) * correction + eps)"
FAULTS = {
    "first mean not corrected": ("(1 - _power(BETA1, step))", "(1 + 0 * step)"),
    "corrections one late": ("_power(BETA1, step)", "_power(BETA1, step + 1)"),
    "second mean not corrected": (
        "(1 / tl.sqrt(1 - _power(BETA2, step)))",
        "(1 + 0 * _power(BETA2, step))",
    ),
    "no decay": ("p -= p * decay", "p -= 0 * decay"),
    "decay in the gradient": ("m = _mean(m, g,", "m = _mean(m, g + decay * p,"),
    "eps under the root": (BELOW, "(tl.sqrt(v + eps) * correction)"),
    "eps corrected too": (BELOW, "((tl.sqrt(v) + eps) * correction)"),
    "means swapped": ("m_ptr = arrays[2]", "m_ptr = arrays[3]"),
    "another tensor": ("tensor_of_chunk_ptr + chunk)", "tensor_of_chunk_ptr)"),
    "first chunk again": ("(chunk - tl.load(row_ptr", "(0 * tl.load(row_ptr"),
    "last element left": ("cols < left", "cols < left - 1"),
    "a block skipped": ("size), BLOCK", "size), 2 * BLOCK"),
    "mean not stored": ("tl.store(v_ptr + cols, v, mask)", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_in_the_kernel_is_caught(fault, tmp_path):
    with pytest.raises(AssertionError):
        small_checks(wrong_op(*FAULTS[fault], tmp_path))


ROUNDING_FAULTS = {
    "cut off": ("(random & 0xFFFF).to(tl.int32)", "(random & 0).to(tl.int32)"),
    "to nearest": ("(random & 0xFFFF)", "((random & 0) + 0x8000)"),
    "half of the numbers": ("(random & 0xFFFF)", "(random & 0x7FFF)"),
    "one number for all": ("number + cols", "cols * 0"),
    "one number for all steps": ("step.to(tl.int32) + seed", "seed"),
    "the seed ignored": ("step.to(tl.int32) + seed", "step.to(tl.int32)"),
}


@pytest.mark.parametrize("fault", ROUNDING_FAULTS)
def test_a_mistake_in_the_rounding_is_caught(fault, tmp_path):
    with pytest.raises(AssertionError):
        check_rounding(wrong_op(*ROUNDING_FAULTS[fault], tmp_path))


# What the compiler makes of it


@pytest.mark.parametrize(
    ("dtype", "step"),
    [(torch.float32, "i32"), (torch.bfloat16, "*i64:16")],
    ids=str,
)
def test_moves_16_bytes_at_a_time_and_leaves_room_for_others(dtype, step):
    kernel = compile_sm90a(
        f"{module.__name__}:_fused_adamw_kernel",
        {
            "table_ptr": "*i64:16",
            "tensor_of_chunk_ptr": "*i32:16",
            "step": step,
            "seed": "i32",
            **dict.fromkeys(("lr", "decay", "eps"), "fp32"),
        },
        {
            "BETA1": 0.9,
            "BETA2": 0.999,
            "BF16": dtype == torch.bfloat16,
            "CHUNK": CHUNK,
            "BLOCK": BLOCK,
        },
        num_warps=_num_warps(dtype.itemsize),
    )
    assert kernel.spills == kernel.stack == 0
    # a pack each of p and g, and as many elements of the two means
    packs = {torch.float32: 4, torch.bfloat16: 6}[dtype]
    assert kernel.opcodes["LDG.E.128"] == packs
    programs = 65536 // (kernel.registers * kernel.threads)
    assert programs * kernel.threads * packs * 16 >= 48 * 1024


# On a GPU


@pytest.mark.gpu
def test_random_lists_agree_with_float64():
    for _ in range(20):
        count = int(torch.randint(1, 60, ()))
        sizes = (2 ** (18 * torch.rand(count))).int().tolist()
        check(ours, lists_of(sizes))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    n = 2**31 + 2**20 + 5
    p = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    m, v = torch.zeros(n, device="cuda"), torch.zeros(n, device="cuda")
    ours([p], [p.clone()], [m], [v], 1, lr=0.5, weight_decay=0.0)
    for part in (p[:100], p[2**31 - 50 : 2**31 + 50], p[-100:]):
        assert ((part - 0.5).abs() <= 2**-8).all()
    assert (m == m[0]).all()
    assert (v == v[0]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_equal_bit_for_bit(dtype):
    lists = lists_of([1000, 100_003, 1 << 20], dtype)
    for g in lists[1]:
        g.normal_()
    results = []
    for _ in range(10):
        copies = [[x.clone() for x in tensors] for tensors in lists]
        for step in (1, 2):
            ours(*copies, step)
        results.append(torch.cat(copies[0]))
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.gpu
def test_a_cuda_graph_counts_its_steps():
    one, other = lists_of([70_000]), lists_of([70_000])
    for a, b in zip(one, other, strict=True):
        b[0].copy_(a[0].normal_() if a is one[1] else a[0])
    table, step = make_table(*one), torch.zeros((), device="cuda")
    fused_adamw(make_table(*lists_of([4])), step)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.add_(1)
        fused_adamw(table, step)
    for n in range(1, 4):
        graph.replay()
        ours(*other, n)
    assert torch.equal(one[0][0], other[0][0])


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_tensors():
    lists = [[x.to("cuda:1") for x in xs] for xs in lists_of([1000])]
    check(ours, lists)
