"""Whole numbers come out exactly, floats within a bound, in any split."""

import itertools
from operator import add

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import assert_accurate, mutant

from warpmap import DEVICE
from warpmap.kernels.data_movement import _scan as trees
from warpmap.kernels.data_movement import scan as module
from warpmap.kernels.data_movement._scan import (
    blelloch,
    hillis_steele,
    reduce_then_scan,
    scan_trace,
)
from warpmap.kernels.data_movement.scan import (
    _tile,
    depth,
    recurrence,
    scan,
)
from warpmap_site.traces import check as check_trace
from warpmap_site.traces import impure_imports

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def whole(N, top=1000):
    return torch.randint(-top, top, (N,), dtype=torch.int32, device=DEVICE)


# The trees


def join(a, b):
    """Associative, and in no other order."""
    return a + b


@pytest.mark.parametrize("n", [1, 2, 3, 8, 16, 37])
def test_trees_join_in_order(n):
    letters = [chr(97 + i % 26) for i in range(n)]
    right = list(itertools.accumulate(letters))
    assert hillis_steele(letters, join) == right
    for block in (1, 2, 5, 100):
        assert reduce_then_scan(letters, join, block) == right
    if n & (n - 1) == 0:
        assert blelloch(letters, join, "") == ["", *right[:-1]]


def test_trees_scan_recurrences():
    def compose(f, g):
        return g[0] * f[0], g[0] * f[1] + g[1]

    steps = [(t % 3 - 1, t) for t in range(16)]
    h, right = 0, []
    for a, b in steps:
        h = a * h + b
        right.append(h)
    assert [b for _, b in hillis_steele(steps, compose)] == right
    assert [b for _, b in reduce_then_scan(steps, compose)] == right
    assert [b for _, b in blelloch(steps, compose, (1, 0))][1:] == right[:-1]


@pytest.mark.parametrize("n", [2, 8, 64])
def test_trees_take_the_operations_and_steps_that_the_page_counts(n):
    log = n.bit_length() - 1
    steps = []
    hillis_steele(range(n), add, steps.append)
    assert len(steps) == log
    assert sum(s.operations for s in steps) == n * log - n + 1
    steps.clear()
    blelloch(range(n), add, 0, steps.append)
    assert len(steps) == 2 * log + 1  # the one in the middle does not add
    assert sum(s.operations for s in steps) == 2 * (n - 1)


@pytest.mark.parametrize(
    "algorithm", ["hillis_steele", "blelloch", "reduce_then_scan"]
)
def test_the_trace_shows_the_scan(algorithm):
    for n in (2, 4, 16, 64):
        frames = check_trace("scan_trace", scan_trace(algorithm, n))
        rows = frames[-1].picture.rows
        shown = [c.text for name, r in rows if "after" in name for c in r]
        right = list(itertools.accumulate(range(1, n + 1)))
        if algorithm == "blelloch":
            right = [0, *right[:-1]]
        assert shown == list(map(str, right))
    assert impure_imports(trees.__name__) == []


# The kernel


@pytest.fixture
def small(monkeypatch):
    """Tiles of 256 in groups of 4: many of both in a short vector."""
    monkeypatch.setattr(module, "_tile", lambda N: (256, 4, 1))


def check_whole(op, x):
    for exclusive in (False, True):
        right = list(itertools.accumulate(x.tolist(), initial=0))
        right = right[:-1] if exclusive else right[1:]
        assert op(x, exclusive).tolist() == right


def check_float(op, x, additions):
    """A result is a tree of additions, in whatever order, `depth` deep."""
    y, exact = op(x), x.double().cumsum(0)
    assert_accurate(
        y[None],
        exact[None],
        x.dtype,
        scale=x.double().abs().cumsum(0)[None],
        steps=0,
        terms=additions,
    )


@pytest.mark.sanitize
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("N", [1, 255, 256, 257, 1024, 1025, 2 * 1024, 2100])
def test_whole_numbers_are_exact(N):
    check_whole(scan, whole(N))


@pytest.mark.parametrize("N", [1, 300, 5000])
def test_whole_numbers_are_exact_in_tiles_as_measured(N):
    check_whole(scan, whole(N))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_keep_the_bound(dtype):
    for N in (1, 257, 2001):
        check_float(scan, normal(N, dtype), depth(N))
        y = scan(normal(N, dtype), exclusive=True)
        assert y[0] == 0


@pytest.mark.usefixtures("small")
def test_exclusive_is_inclusive_one_place_on():
    x = normal(2100)
    assert torch.equal(scan(x, exclusive=True)[1:], scan(x)[:-1])


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_stays_in_what_follows():
    x = normal(1500)
    x[600] = float("inf")
    assert scan(x)[:600].isfinite().all()
    assert (scan(x)[600:] == float("inf")).all()
    x[1300] = float("-inf")
    assert scan(x)[1300:].isnan().all()


def test_of_nothing_is_nothing():
    assert scan(normal(0)).shape == (0,)
    assert recurrence(normal((3, 0)), normal((3, 0))).shape == (3, 0)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("exclusive", [False, True])
def test_gradient_is_the_scan_from_the_end(exclusive):
    x, dy = normal(700).requires_grad_(), normal(700)
    (dx,) = torch.autograd.grad(scan(x, exclusive), x, dy)
    exact = dy.double().flip(0).cumsum(0).flip(0)
    if exclusive:
        exact -= dy.double()
    torch.testing.assert_close(dx.double(), exact, rtol=0, atol=1e-4)


def test_the_operator_is_registered_as_torch_wants_it():
    op = torch.ops.warpmap.scan.default
    torch.library.opcheck(
        op,
        (normal(30).requires_grad_(), False),
        test_utils=("test_schema", "test_faketensor"),
    )


def loop(a, b):
    """The recurrence one after another, in float64."""
    h, out = torch.zeros_like(a[:, 0]).double(), []
    for t in range(a.shape[1]):
        h = a[:, t].double() * h + b[:, t].double()
        out.append(h)
    return torch.stack(out, 1)


def check_recurrence(op, a, b):
    """Each of log2 N compositions rounds three times, of what |a| leaves."""
    assert_accurate(
        op(a, b),
        loop(a, b),
        a.dtype,
        scale=loop(a.abs(), b.abs()),
        steps=3 * a.shape[1].bit_length(),
        terms=a.shape[1],
    )


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_recurrence_agrees_with_a_loop(dtype):
    for shape in ((1, 1), (2, 31), (1, 1100)):
        a = (torch.rand(shape, device=DEVICE) * 2 - 1).to(dtype)
        check_recurrence(recurrence, a, normal(shape, dtype))
    a, b = normal((2, 90), dtype)[:, 3:] / 4, normal((2, 94), dtype)[:, 7:]
    check_recurrence(recurrence, a, b)


def test_a_factor_of_zero_starts_a_segment():
    heads = torch.rand(1, 1300, device=DEVICE) < 0.05
    b = whole(1300)[None]
    h = recurrence((~heads).float(), b.float())[0].tolist()
    total = 0
    for head, value, found in zip(heads[0], b[0].tolist(), h, strict=True):
        total = value + (0 if head else total)
        assert total == found


def test_a_single_column_may_have_any_stride():
    b = normal((1, 4)).T
    assert torch.equal(recurrence(b, b), b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scan(torch.zeros(3, 3)), r"vector, got \(3, 3\)"),
        (lambda: scan(torch.zeros(8)[::2]), r"strides \(2,\)"),
        (lambda: scan(torch.zeros(3).double()), "got torch.float64"),
        (lambda: scan(torch.zeros(3, device="meta")), "got meta"),
        (
            lambda: recurrence(torch.zeros(1, 3), torch.zeros(1, 4)),
            r"equal shapes.* \(1, 3\)",
        ),
        (lambda: recurrence(*[torch.zeros(3)] * 2), r"rows \(M, N\)"),
        (lambda: recurrence(*[torch.zeros(4, 3).T] * 2), r"strides \(1, 3\)"),
        (lambda: recurrence(*[torch.zeros(1, 3).int()] * 2), "int32"),
        (
            lambda: recurrence(*[normal((1, 3)).requires_grad_()] * 2),
            "no gradient",
        ),
        (lambda: blelloch([1, 2, 3], add, 0), "n must be .* got 3"),
        (lambda: reduce_then_scan([1], add, 0), "block must be .* got 0"),
        (lambda: scan_trace("other"), "algorithm must be .* got 'other'"),
        (lambda: scan_trace(n=12), "n must be .* got 12"),
        (lambda: scan_trace(n=128), "n must be .* got 128"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Faults: the checks above must see every one


def all_checks(op):
    check_whole(op, whole(2100))
    check_float(op, normal(2001), depth(2001))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, e=False: scan(x, e) * 0,
        lambda x, e=False: scan(x, not e),
        lambda x, e=False: scan(x.half(), e).to(x.dtype),
        lambda x, e=False: scan(x, e).roll(1),
    ],
    ids=["zero", "other kind", "half", "shifted"],
)
def test_a_wrong_result_is_caught(wrong):
    all_checks(scan)
    with pytest.raises((AssertionError, ValueError)):
        check_whole(wrong, whole(2100))
    with pytest.raises(AssertionError):
        check_float(wrong, normal(2001), depth(2001))


FAULTS = {
    "own tile counted twice": ("others < tile, DTYPE", "others <= tile, DTYPE"),
    "start left out": ("before += start", "before += 0"),
    "group's own sum left out": ("group + 1, before + own", "group + 1, own"),
    "last tile left out of the next start": (
        "group + 1, before + own)",
        "group + 1, before)",
    ),
    "group one tile short": ("group * GROUP + tl", "group * GROUP + 1 + tl"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_in_the_kernel_is_caught(fault, tmp_path, monkeypatch):
    wrong = mutant(module, *FAULTS[fault], tmp_path)
    monkeypatch.setattr(wrong, "_tile", lambda N: (256, 4, 1))
    with pytest.raises(AssertionError):
        all_checks(wrong.scan)


# What the compiler makes of it


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_reads_and_writes_16_bytes_at_a_time_four_programs_on_an_sm(dtype):
    BLOCK, GROUP, num_warps = _tile(2**28)
    kernel = compile_sm90a(
        f"{module.__name__}:_scan_kernel",
        {
            **{f"{n}_ptr": f"*{dtype}:16" for n in "xy"},
            **{"board_ptr": "*i64:16", "N": "i32:16", "tiles": "i32"},
        },
        {"EXCLUSIVE": False, "BLOCK": BLOCK, "GROUP": GROUP},
        num_warps=num_warps,
    )
    assert kernel.spills == kernel.stack == 0
    moved = BLOCK * (2 if dtype == "bf16" else 4)
    for op in ("LDG.E.128", "STG.E.128"):
        assert 16 * kernel.threads * kernel.opcodes[op] == moved
    assert 4 * kernel.threads * kernel.registers <= 65536
    # a word at a time, from L2 and not from an SM's own cache
    assert kernel.opcodes["LDG.E.64.STRONG.SYS"] >= 2
    assert kernel.opcodes["ATOMG.E.EXCH.64.STRONG.GPU"] == 2


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.int32, *FLOATS], ids=str)
def test_random_lengths(dtype):
    for _ in range(40):
        N = int(2 ** (24 * torch.rand(()).item()))
        gap = int(torch.randint(9, ()))
        if dtype == torch.int32:
            x = whole(N + gap, top=2**31 - 1)[gap:]
            assert torch.equal(scan(x), x.long().cumsum(0).int())
        else:
            check_float(scan, normal(N + gap, dtype)[gap:], depth(N))


@pytest.mark.gpu
def test_runs_are_equal_bit_for_bit():
    x = normal(2**25 + 77)
    first = scan(x)
    for _ in range(50):
        assert torch.equal(scan(x), first)


@pytest.mark.gpu
@pytest.mark.parametrize("exclusive", [False, True])
def test_more_than_2_to_the_31_elements(exclusive):
    N = 2**31 + 5003
    y = scan(torch.ones(N, dtype=torch.int32, device="cuda"), exclusive)
    places = torch.tensor([0, 2**31 - 1, 2**31, N - 1], device="cuda")
    right = (places + (0 if exclusive else 1)).int()  # wraps around
    assert torch.equal(y[places], right)


@pytest.mark.gpu
def test_inductor_compiles_it():
    x = normal(3000)
    compiled = torch.compile(lambda x: scan(x + 1) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), scan(x + 1) * 2)


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_vector():
    check_float(scan, normal(9000).to("cuda:1"), depth(9000))
