"""States merge in any order, and rows of any length are exact to rounding."""

import itertools
import math
import random
from fractions import Fraction
from functools import reduce

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant

from warpmap import DEVICE
from warpmap.kernels.normalization import _online
from warpmap.kernels.normalization import online_softmax as module
from warpmap.kernels.normalization._online import State, merge, online_trace
from warpmap.kernels.normalization._rows import DTYPES, programs_at_once
from warpmap.kernels.normalization.online_softmax import (
    _backward_launch,
    _forward_launch,
    online_softmax,
)

INF, NAN = float("inf"), float("nan")


# The state, in plain Python


def state_of(scores, values=None):
    """By the definition, not by merging."""
    values = values or [0.0] * len(scores)
    top = max(scores, default=-INF)
    exps = [math.exp(score - top) for score in scores]
    value = sum(e * v for e, v in zip(exps, values, strict=True))
    return State(top, math.fsum(exps), value)


def close(a, b):
    return a.max == b.max and all(
        math.isclose(x, y, rel_tol=1e-12, abs_tol=1e-300)
        for x, y in ((a.sum, b.sum), (a.value, b.value))
    )


def row(n, scale=30.0):
    return [random.gauss(0, scale) for _ in range(n)]


def test_one_score_after_another_gives_the_state_of_the_row():
    for n in (1, 2, 7, 100):
        scores, values = row(n), row(n)
        singles = [
            State(x, 1.0, v) for x, v in zip(scores, values, strict=True)
        ]
        assert close(reduce(merge, singles), state_of(scores, values))


def test_every_cut_and_every_order_give_the_same():
    scores, values = row(6), row(6)
    whole = state_of(scores, values)
    for i, j in itertools.combinations(range(7), 2):
        cuts = [slice(0, i), slice(i, j), slice(j, 6)]  # some are empty
        parts = [state_of(scores[c], values[c]) for c in cuts]
        for a, b, c in itertools.permutations(parts):
            assert close(merge(merge(a, b), c), whole)
            assert close(merge(a, merge(b, c)), whole)


def test_merging_commutes_exactly_and_the_empty_state_changes_nothing():
    for _ in range(50):
        a, b = state_of(row(3), row(3)), state_of(row(4), row(4))
        assert merge(a, b) == merge(b, a)
        assert merge(a, State()) == merge(State(), a) == a
    assert merge(State(), State()) == State()


def test_scores_that_overflow_alone_do_not_overflow_together():
    assert merge(State(3e4, 1.0), State(3e4, 1.0)) == State(3e4, 2.0)
    assert merge(State(-INF, 1.0), State(-3e38, 1.0)) == State(-3e38, 1.0)


def test_without_rescaling_the_state_is_wrong():
    def forgetful(a, b):
        return State(max(a.max, b.max), a.sum + b.sum)

    for scores in ([0.0, 1.0, 2.0], [2.0, 1.0, 0.0]):
        singles = [State(x, 1.0) for x in scores]
        assert reduce(forgetful, singles).max == 2
        assert not close(reduce(forgetful, singles), state_of(scores))


def test_a_state_by_hand():
    # 1 + 3 of the first stretch, 5 of the second, in units of 1/5 of the top
    state = merge(State(math.log(3), 4 / 3), State(math.log(5), 1.0))
    assert state.max == math.log(5)
    assert Fraction(state.sum).limit_denominator(1000) == Fraction(9, 5)


@pytest.mark.parametrize("lanes", [1, 2, 3, 50])
def test_lanes_do_not_change_the_result(lanes):
    scores = row(20)
    exact = torch.softmax(torch.tensor(scores, dtype=torch.float64), dim=0)
    got = torch.tensor(_online.online_softmax(scores, lanes))
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-30)


def test_the_trace_shows_what_happened_without_it():
    scores = "1 3 2 2 6 1 4 5"
    frames = online_trace(scores, lanes=2)
    numbers = [float(score) for score in scores.split()]
    results = _online.online_softmax(numbers, lanes=2)
    _, shown = frames[-1].picture.rows[1]
    assert [cell.text for cell in shown] == [f"{y:.2g}" for y in results]
    assert len(frames) == len(numbers) + 2
    # lane 0 at its third score: 1 and 2 shrink as 6 comes
    _, (top, total) = frames[4].below.rows[0]
    shrunk = math.exp(-4) + math.exp(-5)
    assert (top.text, total.text) == ("6", f"{shrunk + 1:.3g}")
    assert "6 is more than 2" in frames[4].caption
    assert len(online_trace("7", lanes=1)) == 2


@pytest.mark.parametrize(
    ("scores", "lanes", "message"),
    [
        ("", 2, "scores must be 1 to 16 numbers, got ''"),
        ("1 two", 2, "scores must be .*two"),
        ("1 inf", 2, "scores must be"),
        ("1 " * 17, 2, "scores must be 1 to 16"),
        ("1 2", 0, "lanes must be 1 to 8, got 0"),
        ("1 2", 9, "lanes must be 1 to 8, got 9"),
    ],
)
def test_a_trace_of_something_else_is_refused(scores, lanes, message):
    with pytest.raises(ValueError, match=message):
        online_trace(scores, lanes)


def test_no_lanes_are_refused():
    with pytest.raises(ValueError, match="lanes must be at least 1, got 0"):
        _online.online_softmax([1.0], lanes=0)


# The kernel


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).mul(3).to(dtype)


def block(dtype, N):
    """Elements of a piece, forward; backward has no more pieces."""
    lanes = _forward_launch(N * dtype.itemsize, 1)[1]
    assert lanes <= _backward_launch(1)[1]
    return lanes * 16 // dtype.itemsize


def steps(x):
    """Float32 roundings in exp(x - max) / sum, by their sensitivity.

    As in softmax's test: exp(t) feels t with sensitivity |t|, and t has three
    roundings, above and below the line. In the sum, exp(t) is a product over
    the pieces, whose t add up to the whole. Each piece adds three: two of its
    exp2 and the product. Below t = -104 exp is 0.
    """
    t = (x - x.amax(dim=1, keepdim=True)).double().abs().clamp(max=104)
    pieces = x.shape[1] // block(x.dtype, x.shape[1]) + 1
    return 6 * t.max().item() + 9 + 3 * (pieces + 1)


def check_forward(op, x, beside_torch=True):
    exact = torch.softmax(x.double(), dim=1)
    assert_accurate(
        op(x),
        exact,
        x.dtype,
        steps=steps(x),
        terms=x.shape[1],
        framework=torch.softmax(x, dim=1) if beside_torch else None,
    )


def gradient(op):
    """From a function of x, the function of (x, dy) that gives dx."""

    def dx(x, dy):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(op(x), x, dy)[0]

    return dx


def check_backward(dx, x, dy):
    """Against float64; what is subtracted in dx = y (dy - sum y dy) counts.

    y is stored in between, so it has the relative error of a stored result.
    It appears twice, so ``stored`` is 3 with dx itself.
    """
    torch_softmax = gradient(lambda x: torch.softmax(x, dim=1))
    exact = torch_softmax(x.double(), dy.double())
    y = torch.softmax(x.double(), dim=1)
    y = y.clamp(min=torch.finfo(x.dtype).smallest_normal)
    both = dy.double().abs() + (y * dy.double().abs()).sum(1, keepdim=True)
    assert_accurate(
        dx(x, dy),
        exact,
        x.dtype,
        scale=y * both,
        stored=3,
        steps=2 * steps(x) + 4,
        terms=x.shape[1],
        framework=torch_softmax(x, dy),
    )


# one element, less than a piece, exactly one or two, some and a rest
SHAPES = [(1, 1), (3, 781), (2, 16384), (1, 82001)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, dtype):
    x, dy = normal(shape, dtype), normal(shape, dtype)
    check_forward(online_softmax, x)
    check_backward(gradient(online_softmax), x, dy)


def test_shapes_have_one_piece_and_several_and_both_launches():
    pieces, launches = set(), set()
    for (_, N), dtype in itertools.product(SHAPES, DTYPES):
        pieces.add(-(-N // block(dtype, N)))
        launches.add(_forward_launch(N * dtype.itemsize, 1)[2])
    assert {1, 2} < pieces
    assert max(pieces) >= 5
    assert launches == {16, 32}


def several_rows_a_program():
    """More rows than programs, on this GPU or in the interpreter."""
    programs = programs_at_once(torch.empty(0, device=DEVICE), 2)
    return normal((2 * programs + 1, 50))


@pytest.mark.parametrize("order", ["rising", "falling", "late"])
def test_the_maximum_may_come_at_any_time(order):
    x = torch.linspace(-80, 10, 40000, device=DEVICE).repeat(2, 1)
    x = {"rising": x, "falling": x.flip(1), "late": x.clone()}[order]
    if order == "late":
        x[:, -1] = 500  # everything before it counts for nothing
    check_forward(online_softmax, x, beside_torch=False)


def strided():
    """Rows that lie apart, and end where the next matrix begins."""
    return normal((6, 20100))[::2, 50:20081]


def test_rows_may_lie_apart():
    check_forward(online_softmax, strided())
    check_backward(gradient(online_softmax), strided(), strided())
    one_row_many_times = normal((1, 33)).expand(5, 33)
    check_forward(online_softmax, one_row_many_times)


def test_gradient_may_have_any_layout():
    x = normal((3, 5))
    check_backward(gradient(online_softmax), x, normal((5, 3)).T)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    y = online_softmax(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_goes_where_torch_lets_it_go():
    # the row's beginning; nothing but zeros, or this last number, follows
    lowest = torch.finfo(torch.float32).min  # as masks are made of
    rows = [
        ([1, 2, NAN], 0),
        ([1, INF, 3], 0),
        ([NAN, -INF, -INF], -INF),
        ([-INF, -INF, -INF], -INF),
        ([-INF, 2, -INF], -INF),  # lanes, and pieces, of -inf alone
        ([1, 2, lowest], lowest),
        ([lowest, lowest, lowest], lowest),
        ([1, 2, 3], 0),
    ]
    forth = torch.tensor([start + [rest] * 20000 for start, rest in rows])
    for x in (forth.to(DEVICE), forth.to(DEVICE).flip(1)):
        y, expected = online_softmax(x), torch.softmax(x, dim=1)
        torch.testing.assert_close(y, expected, equal_nan=True)
        assert y.isnan().all(dim=1).tolist() == [True] * 4 + [False] * 4


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4), r"\(M, N\).*\(4,\)"),
        (torch.zeros(2, 3, dtype=torch.float64), "float64"),
        (torch.zeros(2, 3, device="meta"), "on meta|got meta"),
        (torch.zeros(3, 2).T, r"strides \(1, 2\)"),
    ],
)
def test_bad_input_is_refused_by_name(x, message):
    if x.device.type != "meta":
        x = torch.empty_strided(
            x.shape, x.stride(), dtype=x.dtype, device=DEVICE
        ).zero_()
    with pytest.raises(ValueError, match=message):
        online_softmax(x)


def test_operators_are_registered_as_torch_wants_them():
    x = normal((3, 20)).requires_grad_()
    ops = torch.ops.warpmap
    torch.library.opcheck(ops.online_softmax.default, (x,))
    y, dy = online_softmax(x).detach(), normal((3, 20))
    torch.library.opcheck(ops.online_softmax_backward.default, (y, dy))


@pytest.mark.sanitize
def test_every_kernel_runs_at_its_edges():
    x, dy = normal((5, 20001), torch.bfloat16), normal((5, 20001))
    check_forward(online_softmax, x)
    check_backward(gradient(online_softmax), x, dy.bfloat16())


# Faults: the checks above must see every one


def forward_checks(op):
    check_forward(op, normal((5, 781)))
    check_forward(op, strided())
    check_forward(op, several_rows_a_program())


def backward_checks(dx):
    check_backward(dx, normal((5, 781)), normal((5, 781)))
    check_backward(dx, strided(), strided())
    x = several_rows_a_program()
    check_backward(dx, x, x.flip(0))


def test_the_kernel_passes_the_checks_that_faults_must_fail():
    forward_checks(online_softmax)
    backward_checks(gradient(online_softmax))


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_result_is_caught(fault):
    with pytest.raises(AssertionError):
        forward_checks(WRONG[fault](online_softmax))
    with pytest.raises(AssertionError):
        backward_checks(WRONG[fault](gradient(online_softmax)))


STEP = "tl.num_programs(0)):"  # of both kernels
FORWARD_FAULTS = {
    "half of the rows left to nobody": (
        f"{STEP}\n        # 64-bit",
        f"2 * {STEP}\n        # 64-bit",
    ),
    "sums not rescaled": ("sums *= tl.exp2((maxs - base) * LOG2_E)", "pass"),
    "lanes merged without rescaling": (
        "tl.sum(sums * tl.exp2((maxs - top) * LOG2_E), axis=0)",
        "tl.sum(sums, axis=0)",
    ),
    "maximum not carried on": ("            maxs = tops\n", ""),
    "a lane that saw only -inf forgotten": (
        'tl.where(tops == -float("inf"), 0.0, tops)',
        "tops",
    ),
    "padding takes part": (', -float("inf"))\n', ")\n"),
    "first piece read for all": (
        'load(x_row + start + cols, mask, "evict_last"',
        'load(x_row + cols, mask, "evict_last"',
    ),
    "pieces stored in one place": (
        "y_row + start + cols, y, mask",
        "y_row + cols, y, mask",
    ),
    "not divided by the sum": (" * LOG2_E) * scale", " * LOG2_E)"),
}
BACKWARD_FAULTS = {
    "half of the rows left to nobody": (
        f"{STEP}\n        row =",
        f"2 * {STEP}\n        row =",
    ),
    "sum left out": ("y * (dy - mean)", "y * dy"),
    "only the last piece summed": (
        "            sums += tl.sum(y * dy, axis=1)",
        "            sums = tl.sum(y * dy, axis=1)",
    ),
    "sum in float16": ("tl.sum(y * dy,", "tl.sum((y * dy).to(tl.float16),"),
    "gradient of the first row for all": (
        "dy_ptr + row * stride_dym",
        "dy_ptr",
    ),
}


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("fault", FORWARD_FAULTS)
def test_a_mistake_in_the_forward_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *FORWARD_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        forward_checks(wrong.online_softmax)


@pytest.mark.parametrize("fault", BACKWARD_FAULTS)
def test_a_mistake_in_the_backward_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *BACKWARD_FAULTS[fault], tmp_path)
    check_forward(wrong.online_softmax, normal((5, 781)))
    with pytest.raises(AssertionError):
        backward_checks(gradient(wrong.online_softmax))


# What the compiler makes of the kernels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("direction", "row_bytes", "dtype"),
    [
        ("fwd", 2**17, "bf16"),
        ("fwd", 2**18, "bf16"),
        ("bwd", 2**18, "bf16"),
        ("bwd", 2**18, "fp32"),
    ],
)
def test_fits_in_registers_and_moves_16_bytes(direction, row_bytes, dtype):
    names = {"fwd": ["x", "y"], "bwd": ["y", "dy", "dx"]}[direction]
    vec = {"fp32": 4, "bf16": 8}[dtype]
    programs, LANES, num_warps = (
        _forward_launch(row_bytes, sms=1)
        if direction == "fwd"
        else _backward_launch(sms=1)
    )
    kernel = compile_sm90a(
        f"{module.__name__}:_online_{direction}_kernel",
        {
            **{f"{n}_ptr": f"*{dtype}:16" for n in names},
            **{f"stride_{n}m": "i32:16" for n in names},
            **{"M": "i32", "N": "i32:16"},
        },
        {"LANES": LANES, "VEC": vec},
        num_warps=num_warps,
    )
    assert kernel.spills == kernel.stack == 0
    memory = {op for op in kernel.opcodes if op.startswith(("LDG", "STG"))}
    # the first reading asks to stay in the cache, the second to go
    assert memory == {"LDG.E.EL.128", "LDG.E.EF.128", "STG.E.EF.128"}
    # as many programs at once as the launch counts on
    registers = 8 * -(-kernel.registers // 8)  # given out by eights
    assert programs * kernel.threads * registers <= 65536
    # two exponentials an element, and one a lane and piece for its sum
    if direction == "fwd":
        lanes = LANES // kernel.threads
        an_element = kernel.opcodes["MUFU.EX2"] / (lanes * vec)
        assert an_element == 2 + 2 / vec  # the merge of the lanes: once


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1000, 2**17, 2**31 + 40])
def test_more_than_2_to_the_31_elements(N):
    M = max(1, (2**31 + 3 * N) // N) if N < 2**31 else 1
    x = torch.empty(M, N, dtype=torch.bfloat16, device="cuda")
    if N < 2**31:
        x.normal_()
        ends = torch.tensor([0, 1, M // 2, M - 2, M - 1], device="cuda")
        y = online_softmax(x)
        check_forward(lambda _: y[ends], x[ends])
        del y
        dx = gradient(online_softmax)(x, x)
        check_backward(lambda *_: dx[ends], x[ends], x[ends])
    else:
        x.fill_(-INF)
        x[0, -1] = x[0, 0] = x[0, 2**31 - 1] = x[0, 2**31] = 5
        y = online_softmax(x)
        assert y[0, [-1, 0, 2**31 - 1, 2**31]].tolist() == [0.25] * 4
        assert y.count_nonzero().item() == 4


@pytest.mark.gpu
def test_rows_whose_pieces_32_bits_cannot_count_are_refused():
    x = torch.empty(1, 2**31 - 8, dtype=torch.bfloat16, device="cuda")
    with pytest.raises(ValueError, match="got 2147483640"):
        online_softmax(x)


@pytest.mark.gpu
def test_random_shapes_agree_with_float64():
    for _ in range(40):
        N = int(2 ** (19 * torch.rand(()).item()))
        M = int(torch.randint(1, 2**24 // N + 2, ()).clamp(max=400))
        dtype = DTYPES[int(torch.randint(3, ()))]
        gap = int(torch.randint(9, ()))
        x, dy = (normal((M, N + gap), dtype)[:, gap:] for _ in "xy")
        check_forward(online_softmax, x)
        check_backward(gradient(online_softmax), x, dy)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_equal_bit_for_bit(dtype):
    x, dy = normal((300, 2**17), dtype), normal((300, 2**17), dtype)
    first = online_softmax(x), gradient(online_softmax)(x, dy)
    for _ in range(20):
        assert torch.equal(online_softmax(x), first[0])
        assert torch.equal(gradient(online_softmax)(x, dy), first[1])


@pytest.mark.gpu
def test_inductor_compiles_it():
    x = normal((64, 100000), torch.bfloat16)
    compiled = torch.compile(
        lambda x: online_softmax(x + 1) * 2, fullgraph=True
    )
    torch.testing.assert_close(compiled(x), online_softmax(x + 1) * 2)
