"""Every sum keeps a bound that follows from its order, to the last element."""

import math
from pathlib import Path

import pytest
import torch
from aot import compile_cuda, compile_sm90a
from kernel_checks import FLOAT32, mutant, unit_roundoff

from warpmap import DEVICE
from warpmap.kernels.data_movement import _ladder
from warpmap.kernels.data_movement import reduce as module
from warpmap.kernels.data_movement._ladder import (
    tree_steps,
    tree_sum,
    tree_trace,
    tree_work,
)
from warpmap.kernels.data_movement.reduce import (
    DTYPES,
    GRID,
    PER_BLOCK,
    THREADS,
    _tile,
    depth,
    ladder_sum,
    total,
)
from warpmap_site.traces import check as check_trace
from warpmap_site.traces import impure_imports

INF, NAN = float("inf"), float("nan")
# one; less than a warp; a block, less and more; blocks and some left over
SIZES = [1, 2, 31, 255, 256, 257, 4095, 5000, 16384, 40961]


def normal(size, dtype=torch.float32):
    return torch.randn(size, device=DEVICE).to(dtype)


def check(op, x, additions=None):
    """The error against the exact sum, by what rounding alone can explain.

    An element that goes through d additions is multiplied by at most d
    factors 1 + e, each |e| <= u, so the float32 sum is off by no more than
    d u / (1 - d u) times the sum of the magnitudes. One rounding to the
    result's dtype follows. `math.fsum` is exact but for one in float64.
    """
    y = op(x)
    assert (y.shape, y.dtype) == ((), x.dtype)
    values = x.flatten().tolist()
    exact, magnitude = math.fsum(values), math.fsum(map(abs, values))
    d = additions or depth(x.numel(), x.itemsize)
    u = FLOAT32.eps / 2
    before = d * u / (1 - d * u) * magnitude
    stored = unit_roundoff(x.dtype) * max(
        abs(exact) + before, torch.finfo(x.dtype).smallest_normal
    )
    bound = before + stored + FLOAT32.smallest_normal
    assert abs(y.item() - exact) <= bound, (y.item(), exact, bound)


# The kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_keeps_the_bound(size, dtype):
    check(total, normal(size, dtype))


@pytest.fixture
def three_programs(monkeypatch):
    """So that each walks through several blocks, without a long vector."""
    monkeypatch.setattr(module, "PROGRAMS", 3)


@pytest.mark.sanitize
@pytest.mark.usefixtures("three_programs")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_programs_walk_through_the_vector(dtype):
    for blocks in (3, 7, 9):
        BLOCK = _tile(2**20, dtype.itemsize)[1]
        check(total, normal(blocks * BLOCK, dtype))
        check(total, normal(blocks * BLOCK + 5, dtype))


def test_a_sum_of_whole_numbers_is_exact():
    x = torch.arange(-2500, 2600, device=DEVICE)
    assert total(x.float()).item() == x.sum().item()
    assert total(x.bfloat16().float()).item() == x.bfloat16().double().sum()


def cancelling(size, dtype):
    """Numbers from tiny to huge, whose sum is nearly nothing."""
    x = normal(size, torch.float32)
    top = math.log2(torch.finfo(dtype).max) - 18
    x = (x * torch.exp2(torch.rand_like(x) * 2 * top - top)).to(dtype)
    both = torch.cat([x, -x, x[:1]])
    return both[torch.randperm(len(both), device=DEVICE)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(dtype):
    check(total, cancelling(3001, dtype))
    # not less: the interpreter loses subnormal bfloat16
    tiny = torch.finfo(dtype).smallest_normal * (1 + normal(5000).abs())
    check(total, torch.where(normal(5000) > 0, tiny, -tiny).to(dtype))
    if dtype == torch.float16:
        large = torch.full((4001,), 65504.0, dtype=dtype, device=DEVICE)
        large[::2] *= -1
        check(total, large)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_not_finite_is_as_in_torch():
    for values in ([1, INF], [INF, -INF], [NAN, 1], [-INF, 2, -INF]):
        x = torch.tensor(values * 100, device=DEVICE)
        torch.testing.assert_close(total(x), x.sum(), equal_nan=True)
    x = torch.full((9,), 6e4, dtype=torch.float16, device=DEVICE)
    assert total(x).item() == x.sum().item() == INF


def test_any_shape_and_any_place_in_memory():
    check(total, normal((3, 5, 7)))
    check(total, normal(()))
    for dtype in DTYPES:
        for first in (1, 2, 5):
            check(total, normal(9000, dtype)[first:])


def test_of_nothing_is_zero():
    x = torch.empty(3, 0, device=DEVICE, requires_grad=True)
    y = total(x)
    y.backward()
    assert y.item() == 0
    assert x.grad.shape == x.shape


def test_gradient_is_what_comes_in_everywhere():
    x = normal((4, 6)).requires_grad_()
    (total(x) * 3).backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


def test_has_second_derivatives():
    x = normal(5).requires_grad_()
    (dx,) = torch.autograd.grad(total(x) ** 2, x, create_graph=True)
    (ddx,) = torch.autograd.grad(dx[0], x)
    assert torch.equal(ddx, torch.full_like(x, 2))


def test_the_operator_is_registered_as_torch_wants_it():
    op = torch.ops.warpmap.total.default
    torch.library.opcheck(op, (normal((3, 20)).requires_grad_(),))


def test_compiles_with_its_gradient_in_one_graph():
    def loss(x):
        return total(x * 2) ** 2

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = normal(300).requires_grad_()
    for a, b in zip(
        torch.autograd.grad(loss(x), x),
        torch.autograd.grad(compiled(x), x),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: total(torch.zeros(3, dtype=torch.float64)), "float64"),
        (lambda: total(torch.zeros(3, dtype=torch.int32)), "int32"),
        (lambda: total(torch.zeros(3, device="meta")), "got meta"),
        (lambda: total(torch.zeros(4, 4).T), r"strides \(1, 4\)"),
        (lambda: total(torch.zeros(8)[::2]), r"strides \(2,\)"),
        (lambda: depth(-1, 4), "N must be at least 0, got -1"),
        (lambda: ladder_sum(torch.zeros(3)), "on a GPU, got cpu"),
        (lambda: ladder_sum(torch.zeros(3), "v9"), "rung of .* got 'v9'"),
        (lambda: ladder_sum(torch.zeros(3).half()), "float16"),
        (lambda: ladder_sum(torch.zeros(4, 4).T), r"strides \(1, 4\)"),
        (lambda: tree_steps("v9", 8), "tree must be .* got 'v9'"),
        (lambda: tree_steps("strided", 12), "threads .* got 12"),
        (lambda: tree_trace("strided", 512), "threads .* got 512"),
        (lambda: tree_trace("strided", 24), "threads .* got 24"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Faults: the check must see every one


def all_checks(op):
    """On vectors for three programs, with something left over."""
    for dtype in (torch.float32, torch.float16):
        BLOCK = _tile(2**20, dtype.itemsize)[1]
        check(op, normal(7 * BLOCK + 5, dtype))
        check(op, cancelling(3 * BLOCK + 2, dtype))


@pytest.mark.usefixtures("three_programs")
def test_the_kernel_passes_the_checks_that_faults_must_fail():
    all_checks(total)


@pytest.mark.usefixtures("three_programs")
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: total(x) * 0,
        lambda x: total(x) * NAN,
        lambda x: total(x[:-1]),
        lambda x: total(torch.cat([x, x[-1:]])),
        lambda x: total(x.half()).to(x.dtype),
        lambda x: x.cumsum(0, dtype=torch.float16)[-1].to(x.dtype),
        lambda x: total(x.view(-1)[:4096]),
    ],
    ids=["zero", "nan", "short", "long", "rounded", "half", "start"],
)
def test_a_wrong_result_is_caught(wrong):
    with pytest.raises(AssertionError):
        all_checks(wrong)


FAULTS = {
    "end left out": ("lanes < N - full", "lanes < 0"),
    "end added by all": ("if program == 0:", "if program >= 0:"),
    "padding of ones": ("other=0.0", "other=1.0"),
    "blocks left out": (
        "tl.num_programs(0).to(tl.int64) * BLOCK",
        "tl.num_programs(0).to(tl.int64) * BLOCK * 2",
    ),
    "all walk the same way": (
        "first = program.to(tl.int64) * BLOCK",
        "first = program.to(tl.int64) * 0",
    ),
    "elements rounded": (
        "sums += x.to(",
        "sums += x.to(tl.float16).to(",
    ),
    "sum in float16": (
        "total = tl.sum(sums, axis=0)",
        "total = tl.sum(sums.to(tl.float16), axis=0).to(tl.float32)",
    ),
    "partial sums rounded": (
        "x.new_empty(programs, dtype=torch.float32)",
        "x.new_empty(programs, dtype=torch.float16)",
    ),
    "second stage left out": ("_launch(sums, out)", "out.copy_(sums[0])"),
    "last program's sum lost": (
        "_launch(sums, out)",
        "_launch(sums[:-1], out)",
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_in_the_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *FAULTS[fault], tmp_path)
    wrong.PROGRAMS = 3
    with pytest.raises(AssertionError):
        all_checks(wrong.total)


# The trees of the first rungs

TREES = ["interleaved", "strided", "sequential"]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("threads", [1, 2, 32, 256])
def test_a_tree_adds_every_cell_once(tree, threads):
    values = [3**i for i in range(threads)]
    assert tree_sum(values, tree) == sum(values)
    gone = set()
    for step in tree_steps(tree, threads):
        # who is read is not written: there is no race
        read, written = ({a[k] for a in step} for k in (2, 1))
        assert not read & written
        assert not (read | written) & gone
        assert len(read) == len(written) == len({a.thread for a in step})
        gone |= read
    assert gone == set(range(1, threads))


def test_work_is_what_the_page_says():
    assert [tree_work(t) for t in TREES] == [
        _ladder.Work(8, 47, 47),
        _ladder.Work(8, 12, 47),
        _ladder.Work(8, 12, 12),
    ]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("threads", [2, 32, 256])
def test_the_trace_shows_the_sum(tree, threads):
    frames = check_trace("tree_trace", tree_trace(tree, threads))
    last = frames[-1]
    assert len(frames) == threads.bit_length()
    want = tree_sum(range(threads), tree)
    assert last.picture.rows[0][1][0].text == str(want)
    assert last.caption.endswith(f"the sum, {want}.")
    for frame, step in zip(frames[1:], tree_steps(tree, threads), strict=True):
        shown = [c.text for _, cells in frame.below.rows for c in cells]
        assert {i: t for i, t in enumerate(shown) if t} == {
            add.to: str(add.thread) for add in step
        }


def test_the_trace_runs_where_there_is_no_torch():
    assert impure_imports(_ladder.__name__) == []


# The ladder, one rung after another


def block_sums(v):
    """A number for each of 256 threads, added up as block_sum does it."""
    v = v.view(-1, 8, 32)
    for step in (16, 8, 4, 2, 1):
        v = v + v[..., torch.arange(32) ^ step]
    v = v[..., 0]
    for step in (4, 2, 1):
        v = v + v[..., torch.arange(8) ^ step]
    return v[..., 0]


def packs(v):
    return (v[..., 0] + v[..., 1]) + (v[..., 2] + v[..., 3])


def walk(x, blocks):
    """What each thread of `sum_grid` has in the end; zeros add nothing."""
    n, width = len(x), 4 * THREADS * blocks
    rows = -(-n // width)
    v = torch.nn.functional.pad(x, (0, rows * width - n))
    v = packs(v.view(rows, blocks * THREADS, 4))
    i = 4 * torch.arange(blocks * THREADS, device=x.device)
    mine, row = [torch.zeros_like(v[0]) for _ in range(4)], 0
    while row + 3 < rows:
        four = i + (row + 3) * width + 4 <= n
        for k in range(4):
            one = torch.where(four, v[row + k], 0)
            mine[k] = mine[k] + one
        for k in range(4):
            mine[0] = mine[0] + torch.where(four, 0, v[row + k])
        row += 4
    for k in range(row, rows):
        mine[0] = mine[0] + v[k]
    return (mine[0] + mine[1]) + (mine[2] + mine[3])


def stage(x, rung):
    """The partial sums of one launch, by the very additions of the kernel."""
    if rung == "grid":
        blocks = min(GRID, -(-len(x) // PER_BLOCK[rung]))
        return block_sums(walk(x, blocks))
    v = torch.nn.functional.pad(x, (0, -len(x) % PER_BLOCK[rung]))
    v = v.view(-1, PER_BLOCK[rung] // THREADS, THREADS)
    if rung == "packed":
        v = packs(v.reshape(-1, 2, THREADS, 4))
    if v.shape[1] == 2:
        v = v[:, :1] + v[:, 1:]
    v = v[:, 0].clone()
    if rung in ("shuffle", "packed"):
        return block_sums(v)
    tree = rung if rung in TREES else "sequential"
    for step in tree_steps(tree, THREADS):
        _, to, source = torch.tensor(step).T
        v[:, to] = v[:, to] + v[:, source]
    return v[:, 0]


def by_hand(x, rung):
    x = x.flatten()
    while True:
        x = stage(x, rung)
        if len(x) == 1:
            return x.view(())


def additions(rung, n):
    """The most additions that an element goes through on a rung."""
    blocks = max(1, -(-n // PER_BLOCK[rung]))
    loaded = {"first_add": 1, "last_warp": 1, "shuffle": 1, "packed": 3}
    inside = 8 + loaded.get(rung, 0)
    if rung == "grid":
        blocks = min(blocks, GRID)
        # four neighbours, then loads one after another, then four sums
        inside = 8 + 2 + -(-n // (4 * THREADS * blocks)) + 2
    return inside + (additions(rung, blocks) if blocks > 1 else 0)


LADDER_SIZES = [1, 3, 255, 256, 257, 2049, 4097, 100_003]


@pytest.mark.parametrize("rung", PER_BLOCK)
def test_every_rung_adds_in_an_order_that_keeps_its_bound(rung):
    for n in LADDER_SIZES:
        check(lambda x: by_hand(x, rung), normal(n), additions(rung, n))
    for n in (5, 1000):
        x = cancelling(n, torch.float32)
        check(lambda x: by_hand(x, rung), x, additions(rung, len(x)))


# What the compilers make of it


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_loads_16_bytes_at_a_time_and_fills_an_sm(dtype):
    itemsize = 4 if dtype == "fp32" else 2
    _, BLOCK, num_warps = _tile(2**28, itemsize)
    kernel = compile_sm90a(
        f"{module.__name__}:_sum_kernel",
        {"x_ptr": f"*{dtype}:16", "sums_ptr": "*fp32:16", "N": "i32"},
        {"BLOCK": BLOCK},
        num_warps=num_warps,
    )
    assert kernel.spills == kernel.stack == 0
    loads = kernel.opcodes["LDG.E.EF.128"]
    assert 16 * kernel.threads * loads == BLOCK * itemsize
    # of the programs that share 65536 registers 64 KiB are under way
    programs = 65536 // (kernel.threads * kernel.registers)
    assert programs * BLOCK * itemsize >= 65536
    assert not any(op.startswith(("ATOM", "RED")) for op in kernel.opcodes)


@pytest.mark.nvcc
def test_cuda_has_the_loads_and_barriers_that_the_page_counts():
    kernels = compile_cuda(Path(module.__file__).with_suffix(".cu"))
    found = {}
    for rung in PER_BLOCK:
        kernel = kernels[f"sum_{rung}"]
        assert kernel.spills == kernel.stack == 0
        found[rung] = (
            sum(n for op, n in kernel.opcodes.items() if op.startswith("BAR")),
            "LDG.E.128" in kernel.opcodes,
        )
    assert found == {
        "interleaved": (8, False),
        "strided": (8, False),
        "sequential": (8, False),
        "first_add": (8, False),
        "last_warp": (3, False),
        "shuffle": (1, False),
        "packed": (1, True),
        "grid": (1, True),
    }


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("rung", PER_BLOCK)
def test_every_rung_adds_as_the_page_says_to_the_last_bit(rung):
    for n in [*LADDER_SIZES, 2**22 + 3, 2**23]:
        x = normal(n)
        assert torch.equal(ladder_sum(x, rung), by_hand(x, rung)), n
    x = cancelling(50_000, torch.float32)
    check(lambda x: ladder_sum(x, rung), x, additions(rung, len(x)))
    assert ladder_sum(normal(0), rung).item() == 0


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("rung", PER_BLOCK)
def test_every_rung_runs(rung):
    x = normal(10_001)
    check(lambda x: ladder_sum(x, rung), x, additions(rung, len(x)))


@pytest.mark.gpu
def test_the_ladder_wants_aligned_data():
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        ladder_sum(normal(9)[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_than_2_to_the_31_elements(dtype):
    n = 2**31 + 5003
    x = torch.zeros(n, dtype=dtype, device="cuda")
    places = torch.tensor([0, 2**31 - 1, 2**31, 2**31 + 4096, n - 1])
    x[places.cuda()] = torch.tensor([1.0, 2, 4, 8, 16]).to(x)
    assert total(x).item() == 31
    if dtype == torch.float32:
        for rung in PER_BLOCK:
            assert ladder_sum(x, rung).item() == 31, rung


@pytest.mark.gpu
def test_random_sizes_keep_the_bound():
    for _ in range(60):
        n = int(2 ** (20 * torch.rand(()).item()))
        dtype = DTYPES[int(torch.randint(3, ()))]
        gap = int(torch.randint(9, ()))
        check(total, normal(n + gap, dtype)[gap:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_equal_bit_for_bit(dtype):
    x = normal(2**24 + 77, dtype)
    first = total(x)
    for _ in range(50):
        assert torch.equal(total(x), first)


@pytest.mark.gpu
def test_inductor_compiles_it():
    x = normal(3000, torch.bfloat16)
    compiled = torch.compile(lambda x: total(x + 1) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), total(x + 1) * 2)


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_vector():
    check(total, normal(9000).to("cuda:1"))
