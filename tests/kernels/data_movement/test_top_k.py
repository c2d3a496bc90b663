"""Exactly what a stable descending sort begins with, ties and nan included."""

import re

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import mutant

from warpmap import DEVICE
from warpmap.kernels.data_movement import top_k as module
from warpmap.kernels.data_movement.top_k import (
    DTYPES,
    MAX_K,
    MAX_PRODUCT,
    _group_size,
    _maxima_tile,
    _select_tile,
    _short_tile,
    top_k,
)

INF, NAN = float("inf"), float("nan")


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def check(op, x, k):
    """Values are PyTorch's to the bit; of equal ones the first comes first."""
    values, indices = op(x, k)
    assert values.dtype == x.dtype
    assert indices.dtype == torch.int64
    # on the CPU: on a GPU PyTorch puts NaNs with a sign bit at the other end
    x, values, indices = x.cpu(), values.cpu(), indices.cpu()
    right = torch.sort(x, dim=1, descending=True, stable=True)
    assert torch.equal(indices, right.indices[:, :k])
    for theirs in (right.values[:, :k], torch.topk(x, k, dim=1).values):
        assert torch.equal(
            values.nan_to_num(nan=7.0), theirs.nan_to_num(nan=7.0)
        )


SHORT = [((1, 1), 1), ((3, 7), 7), ((9, 40), 1), ((5, 256), 8), ((2, 601), 16)]
# groups of 1, of 2 with one left over, of 8 with a part of a group
LONG = [((1, 30), 30), ((1, 101), 25), ((2, 1100), 17), ((1, 1030), 5)]


@pytest.mark.sanitize
@pytest.mark.parametrize(("shape", "k"), [*SHORT, *LONG], ids=str)
def test_agrees_with_a_stable_sort(shape, k):
    check(top_k, normal(shape), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_index(dtype):
    few = torch.randint(-2, 3, (4, 90), device=DEVICE).to(dtype)
    check(top_k, few, 6)
    check(top_k, torch.zeros_like(few), 6)
    few = torch.randint(-2, 3, (1, 300), device=DEVICE).to(dtype)
    # neighbours that are equal, so that whole groups are
    check(top_k, few.sort(dim=1).values, 20)


def test_when_all_are_equal_the_first_are_taken():
    check(top_k, torch.zeros(1, 300, device=DEVICE), 20)


@pytest.mark.parametrize(("shape", "k"), [((3, 90), 9), ((1, 200), 40)])
def test_every_kind_of_number_has_its_place(shape, k):
    kinds = torch.tensor(
        [0.0, -0.0, INF, -INF, NAN, -NAN, 1e-45, -1e-45, 3.0, -3.0]
    ).to(DEVICE)
    x = kinds[torch.randint(len(kinds), shape, device=DEVICE)]
    check(top_k, x, k)
    check(top_k, torch.full(shape, -INF, device=DEVICE), k)
    x = torch.where(x.isnan() | (x > 0), -INF, x)
    check(top_k, x, k)


def test_values_keep_their_very_bits():
    x = torch.tensor([[-0.0, 0.0, -1.0]], device=DEVICE)
    values, indices = top_k(x, 2)
    assert indices.tolist() == [[0, 1]]
    assert values.signbit().tolist() == [[True, False]]


@pytest.mark.parametrize("k", [9, 18])
def test_the_largest_may_all_be_in_one_group(k):
    x = normal((1, 640))
    x[0, 320 : 320 + k] = 100 + torch.arange(k, device=DEVICE)
    check(top_k, x, k)


def test_rows_may_lie_apart():
    check(top_k, normal((2, 900))[:, 37:741], 18)
    check(top_k, normal((6, 90))[::2, 11:80], 4)


def test_of_no_rows():
    values, indices = top_k(normal((0, 5)), 3)
    assert values.shape == indices.shape == (0, 3)


def test_gradient_goes_where_the_values_came_from():
    x = normal((2, 300)).requires_grad_()
    (ours,) = torch.autograd.grad(top_k(x, 4)[0].square().sum(), x)
    (theirs,) = torch.autograd.grad(torch.topk(x, 4)[0].square().sum(), x)
    assert torch.equal(ours, theirs)


def test_the_operator_is_registered_as_torch_wants_it():
    op = torch.ops.warpmap.top_k.default
    torch.library.opcheck(
        op,
        (normal((2, 20)).requires_grad_(), 3),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_single_column_may_have_any_stride():
    x = torch.randn(1, 4, device=DEVICE).T
    assert torch.equal(top_k(x, 1)[0], x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k(torch.zeros(4), 1), r"rows \(M, N\), got \(4,\)"),
        (lambda: top_k(torch.zeros(4, 3).T, 1), r"strides \(1, 3\)"),
        (lambda: top_k(torch.zeros(2, 3).int(), 1), "got torch.int32"),
        (lambda: top_k(torch.zeros(2, 3, device="meta"), 1), "got meta"),
        (
            lambda: top_k(torch.zeros(2, 3, device=DEVICE), 0),
            "k must be from 1 to 3, got 0",
        ),
        (
            lambda: top_k(torch.zeros(2, 3, device=DEVICE), 4),
            "k must be from 1 to 3, got 4",
        ),
        (
            lambda: top_k(torch.zeros(1, 2000, device=DEVICE), 1025),
            "1 to 1024, got 1025",
        ),
        (
            lambda: top_k(torch.zeros(1, 1 << 16, device=DEVICE), 1024),
            "got 65536 x 1024",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_candidates_fit_whatever_the_shape():
    for log_k in range(11):
        for k in {2**log_k, min(MAX_K, 2**log_k + 2**log_k // 3)}:
            most = MAX_PRODUCT // k
            for N in {k, k + 1, 2 * k + 1, 9 * k, most // 2 + 1, most}:
                size = _group_size(N, k)
                groups = -(-N // size)
                assert groups >= k
                assert groups <= 16384
                assert k * size <= 8192


# Faults: the checks must see every one


def short_checks(op):
    check(op, normal((9, 101)), 6)
    few = torch.randint(-2, 3, (5, 99), device=DEVICE).float()
    few[few == 2] = -NAN
    check(op, few, 7)
    check(op, normal((3, 50)) - 9, 5)


def long_checks(op):
    x = normal((2, 341)) - 9
    x[1, 100:117] = 50 + torch.arange(17, device=DEVICE)
    check(op, x, 17)
    few = torch.randint(-2, 3, (1, 341), device=DEVICE).float()
    few[few == 2] = -NAN
    check(op, few, 17)


def test_the_kernels_pass_the_checks_that_faults_must_fail():
    short_checks(top_k)
    long_checks(top_k)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, k: (top_k(x, k)[0] * 0, top_k(x, k)[1]),
        lambda x, k: (top_k(x, k)[0], top_k(x, k)[1].roll(1, 1)),
        lambda x, k: tuple(t[:1].expand(len(x), k) for t in top_k(x, k)),
        lambda x, k: tuple(t.flip(1) for t in top_k(x, k)),
    ],
    ids=["zero", "indices off", "first row for all", "ascending"],
)
def test_a_wrong_result_is_caught(wrong):
    with pytest.raises(AssertionError):
        short_checks(wrong)


SHORT_FAULTS = {
    "negative numbers backwards": (
        "bits ^ ((bits >> 31) & 0x7FFFFFFF)",
        "bits",
    ),
    "nan is small": ("tl.where(size > 0x7F800000, 0x7FFFFFFF, keys)", "keys"),
    "last of equals first": (
        "tl.where(keys == largest, places, 0x7FFFFFFF)\n"
        "        place = tl.min(",
        "tl.where(keys == largest, places, -1)\n        place = tl.max(",
    ),
    "taken again": ("tl.where(places == place, LOWEST, keys)", "keys"),
    "two rows in one place": (
        "rows * stride_xm, rows * k",
        "rows * stride_xm, rows // 2 * k",
    ),
}
# none of these leaves a place unwritten, or writes one too many
LONG_FAULTS = {
    "minima of groups": ("tl.max(_key(x), axis=1)", "tl.min(_key(x), axis=1)"),
    "last of equals first": (
        "tl.cumsum(equal, 0) <= missing",
        "tl.sum(equal, 0) - tl.cumsum(equal, 0) < missing",
    ),
    "first groups instead of the best": (
        "group * SIZE + p",
        "number * SIZE + p",
    ),
    "first of a group for all": (" + places % SIZE", ""),
    "ascending": ("descending=True", "descending=False"),
    "places for values": (
        "(keys.to(tl.int64) << 32) |",
        "(keys.to(tl.int64) * 0) |",
    ),
}


@pytest.mark.parametrize("fault", SHORT_FAULTS)
def test_a_mistake_in_the_short_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *SHORT_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        short_checks(wrong.top_k)


@pytest.mark.parametrize("fault", LONG_FAULTS)
def test_a_mistake_in_the_long_kernels_is_caught(fault, tmp_path):
    wrong = mutant(module, *LONG_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        long_checks(wrong.top_k)


# What the compiler makes of it


def compiled(name, constexprs, num_warps, **types):
    kernel = compile_sm90a(
        f"{module.__name__}:{name}", types, constexprs, num_warps=num_warps
    )
    assert kernel.spills == kernel.stack == 0
    return kernel


def test_the_row_is_read_16_bytes_at_a_time():
    size = _group_size(128256, 50)
    BLOCK, num_warps = _maxima_tile(size)
    kernel = compiled(
        "_maxima_kernel",
        {"SIZE": size, "BLOCK": BLOCK},
        num_warps,
        x_ptr="*fp32:16",
        maxima_ptr="*i32:16",
        stride_xm="i32:16",
        N="i32:16",
        groups="i32",
        pieces="i32",
    )
    loads = kernel.opcodes["LDG.E.EF.128"]
    assert 16 * kernel.threads * loads == BLOCK * size * 4
    # several programs on a multiprocessor
    assert 4 * kernel.threads * kernel.registers <= 65536


@pytest.mark.slow
@pytest.mark.parametrize(("size", "candidates"), [(0, 16384), (32, 8192)])
def test_the_most_candidates_fit_in_registers(size, candidates):
    BLOCK, num_warps = _select_tile(candidates)
    compiled(
        "_select_kernel",
        {"SIZE": size, "BLOCK": BLOCK},
        num_warps,
        x_ptr="*fp32:16" if size else "*i32:16",
        groups_ptr="*i32:16",
        places_ptr="*i32:16",
        stride_xm="i32:16",
        N="i32:16",
        k="i32",
    )


@pytest.mark.slow
@pytest.mark.parametrize(("N", "k"), [(7, 7), (40, 1), (256, 8), (1024, 16)])
def test_a_short_row_stays_in_its_warp(N, k):
    # Triton 3.6 reduces wrongly after a reshape, over lanes of other rows
    BLOCK_M, BLOCK_N, num_warps = _short_tile(N)
    kernel = compiled(
        "_short_kernel",
        {
            "K": 1 << (k - 1).bit_length(),
            "BLOCK_M": BLOCK_M,
            "BLOCK_N": BLOCK_N,
        },
        num_warps,
        x_ptr="*fp32:16",
        values_ptr="*fp32:16",
        indices_ptr="*i64:16",
        stride_xm="i32:16",
        M="i32",
        N="i32:16",
        k="i32",
    )
    loop = kernel.ptx.split("Inner Loop Header")[1].split("bra")[0]
    assert "bar.sync" not in loop
    lanes = {int(n) for n in re.findall(r"shfl.*bfly.*, (\d+), 31", loop)}
    if N >= 128:  # all 32 lanes hold the same row
        assert not lanes
        assert 16 * kernel.threads * kernel.opcodes["LDG.E.128"] == 4096
        assert kernel.opcodes["REDUX.MAX.S32"] == BLOCK_M
    else:  # neighbouring lanes
        assert lanes == {2**i for i in range(max(lanes).bit_length())}


# On a GPU


@pytest.mark.gpu
def test_random_shapes():
    for _ in range(80):
        N = int(2 ** (1 + 17 * torch.rand(()).item()))
        most = min(N, MAX_K, MAX_PRODUCT // N)
        k = int(most ** torch.rand(()).item())
        M = int(torch.randint(1, 300, ()))
        dtype = DTYPES[int(torch.randint(3, ()))]
        gap = int(torch.randint(9, ()))
        check(top_k, normal((M, N + gap), dtype)[:, gap:], k)


@pytest.mark.gpu
@pytest.mark.parametrize(("N", "k"), [(128256, 50), (256, 8)])
def test_more_than_2_to_the_31_elements(N, k):
    M = 2**31 // N + 3
    x = torch.empty(M, N, dtype=torch.bfloat16, device="cuda").normal_()
    values, indices = top_k(x, k)
    ends = torch.tensor([0, 1, M // 2, M - 2, M - 1], device="cuda")
    check(lambda _, k: (values[ends], indices[ends]), x[ends], k)


@pytest.mark.gpu
def test_runs_are_equal():
    x = torch.randint(-9, 9, (300, 50000), device="cuda").float()
    first = top_k(x, 100)
    for _ in range(20):
        again = top_k(x, 100)
        assert all(map(torch.equal, first, again))


@pytest.mark.gpu
def test_inductor_compiles_it():
    x = normal((64, 3000))
    compiled = torch.compile(lambda x: top_k(x * 2, 50)[0] + 1, fullgraph=True)
    assert torch.equal(compiled(x), top_k(x * 2, 50)[0] + 1)


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_matrix():
    check(top_k, normal((4, 5000)).to("cuda:1"), 20)
