"""Elementwise operators are exact to rounding, for every shape and stride."""

import itertools
from pathlib import Path

import pytest
import torch
from aot import compile_cuda, compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant

from warpmap import DEVICE
from warpmap.kernels.cuda import cuda_kernel
from warpmap.kernels.data_movement import elementwise as module
from warpmap.kernels.data_movement.elementwise import (
    DTYPES,
    NUM_WARPS,
    RUNGS,
    _tile,
    merge_dims,
    multiply,
    multiply_cuda,
    silu,
    silu_cuda,
)

# one, around a pack of 4 and of 8, around a tile, tiles and a part of one
LENGTHS = [1, 3, 4, 5, 7, 8, 9, 511, 1025, 9001]
SHAPES = [
    ((), ()),
    ((1, 1), (1,)),
    ((5, 48), (48,)),  # a row
    ((5, 48), (5, 1)),  # a column
    ((5, 47), ()),
    ((1, 33), (70, 1)),  # every pair
    ((300, 3), (3,)),  # many rows a tile
    ((3, 1500), (3, 1)),  # many tiles a row
    ((2, 3, 4, 5), (4, 5)),
    ((2, 3, 4, 5), (3, 1, 1)),  # three dimensions stay: copied
    ((4, 1, 6), (5, 1)),
]


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).mul(3).to(dtype)


def flat(x):
    return x.reshape(1, -1)


def check(op, exact, *inputs, steps=1, scale=None, torchs=None):
    """An operator beside the same in float64."""
    y, right = op(*inputs), exact(*(x.double() for x in inputs))
    assert y.shape == right.shape
    assert_accurate(
        flat(y),
        flat(right),
        inputs[0].dtype,
        steps=steps,
        scale=None if scale is None else flat(scale),
        framework=None if torchs is None else flat(torchs(*inputs)),
    )


def check_multiply(op, a, b):
    check(op, torch.mul, a, b, torchs=torch.mul)


def exact_silu(x):
    return x * torch.sigmoid(x)


def silu_steps(x):
    """exp(t) feels t, and so the two roundings before it, |t| times.

    Beyond it an exp2, a sum, a quotient and a product: 2 units each at most.
    """
    return 2 * x.abs().max().item() + 8 if x.numel() else 8


def check_silu(op, x):
    check(op, exact_silu, x, steps=silu_steps(x))


def gradient(op):
    """From a function of inputs, the function of (*inputs, dy)."""

    def backward(*given):
        *inputs, dy = given
        inputs = [x.detach().requires_grad_() for x in inputs]
        return torch.autograd.grad(op(*inputs), inputs, dy)

    return backward


def check_silu_gradient(dx, x, dy):
    s = torch.sigmoid(x.double())
    check(
        dx,
        lambda x, dy: gradient(exact_silu)(x, dy)[0],
        x,
        dy,
        steps=2 * silu_steps(x) + 4,
        scale=dy.double().abs() * s * (1 + x.double().abs() * (1 - s)),
    )


# The shapes


def offsets(shape, stride):
    """Where the elements lie, in order."""
    return [
        sum(i * s for i, s in zip(index, stride, strict=True))
        for index in itertools.product(*map(range, shape))
    ]


def check_merge(merge, shape, *strides):
    merged = merge(shape, *strides)
    sizes = [size for size, *_ in merged]
    for n, stride in enumerate(strides):
        steps = [dim[n + 1] for dim in merged]
        assert offsets(sizes, steps) == offsets(shape, stride)
    for (_, *outer), (size, *inner) in itertools.pairwise(merged):
        assert outer != [size * step for step in inner]
    assert 1 not in sizes


def all_merges(merge):
    check_merge(merge, (), (), ())
    for a, b in SHAPES:
        x, y = torch.broadcast_tensors(torch.empty(a), torch.empty(b))
        check_merge(merge, x.shape, x.stride(), y.stride())
    dense = torch.empty(4, 3, 2)
    for order in itertools.permutations(range(3)):
        x = dense.permute(order)
        check_merge(merge, x.shape, x.stride(), x.contiguous().stride())
        check_merge(merge, x.shape, x.stride(), x.stride())
        check_merge(merge, x.shape, x.stride())
    x = torch.empty(6, 8)[::2, :4]
    check_merge(merge, x.shape, x.stride(), x.contiguous().stride())


def test_merged_dimensions_walk_the_same_way_and_are_as_few_as_can_be():
    all_merges(merge_dims)
    assert merge_dims((4, 5, 6), (30, 6, 1), (0, 0, 0)) == [(120, 1, 0)]


# The operators


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
def test_every_length(n, dtype):
    check_multiply(multiply, normal(n, dtype), normal(n, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_broadcasts_either_way(shapes, dtype):
    a, b = (normal(shape, dtype) for shape in shapes)
    check_multiply(multiply, a, b)
    check_multiply(multiply, b, a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_agrees_with_float64(dtype):
    for n in LENGTHS[:-1]:
        check_silu(silu, normal(n, dtype))
    check_silu(silu, normal((3, 50, 7), dtype).transpose(0, 2))


def layouts():
    """Views of one shape that lie in memory in different ways."""
    return {
        "dense": normal((12, 40)),
        "rows apart": normal((12, 64))[:, 3:43],
        "every second row": normal((24, 40))[::2],
        "every second column": normal((12, 80))[:, ::2],
        "transposed": normal((40, 12)).T,
        "one row": normal((1, 40)).expand(12, 40),
        "one column": normal((12, 1)).expand(12, 40),
        "one number": normal(()).expand(12, 40),
        "odd address": normal(481)[1:].view(12, 40),
        "windows that overlap": normal(100).unfold(0, 40, 5)[:12],
    }


@pytest.mark.parametrize("layout", layouts())
def test_every_layout(layout):
    for other in layouts().values():
        check_multiply(multiply, layouts()[layout], other)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5)], ids=str)
def test_empty(shape):
    a = torch.empty(shape, device=DEVICE, requires_grad=True)
    multiply(silu(a), torch.ones((), device=DEVICE)).sum().backward()
    assert a.grad.shape == shape


@pytest.mark.filterwarnings("ignore:.*encountered in exp:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_is_not_finite_goes_where_torch_lets_it_go():
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, 1e38, -1e38, inf, -inf, nan], device=DEVICE)
    close = torch.testing.assert_close
    close(multiply(x, x[:, None]), x * x[:, None], equal_nan=True)
    close(silu(x), torch.nn.functional.silu(x), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_gradients_of_a_product(shapes, dtype):
    a, b = (normal(shape, dtype) for shape in shapes)
    dy = normal(torch.broadcast_shapes(*shapes), dtype)
    found = gradient(multiply)(a, b, dy)
    wide = [x.double() for x in (a, b, dy)]
    exact = gradient(torch.mul)(*wide)
    # the products are stored in the dtype before they are added up
    sizes = gradient(torch.mul)(*(x.abs() for x in wide))
    for x, dx, right, size in zip((a, b), found, exact, sizes, strict=True):
        assert dx.shape == x.shape
        assert_accurate(
            flat(dx),
            flat(right),
            dtype,
            scale=flat(size),
            stored=2,
            terms=max(1, dy.numel() // x.numel()),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_silu(dtype):
    def dx(x, dy):
        return gradient(silu)(x, dy)[0]

    for shape in ((1,), (7, 9), (3, 1024)):
        check_silu_gradient(dx, normal(shape, dtype), normal(shape, dtype))
    x = normal((6, 7), dtype)
    check_silu_gradient(dx, x, normal((7, 6), dtype).T)
    check_silu_gradient(dx, x, normal((), dtype).expand(6, 7))


def test_only_a_wanted_gradient_is_computed():
    a, b = normal(5).requires_grad_(), normal(5)
    multiply(a, b).sum().backward()
    assert a.grad is not None
    assert b.grad is None


def test_a_product_has_second_derivatives_and_silu_refuses_them():
    a, b = normal(5).requires_grad_(), normal(5).requires_grad_()
    (da,) = torch.autograd.grad(multiply(a, b).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(da.sum(), b)
    torch.testing.assert_close(second, torch.ones_like(b))
    (da,) = torch.autograd.grad(silu(a).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        da.sum().backward()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(2), torch.zeros(3), r"\(2,\) and \(3,\)"),
        (torch.zeros(2), torch.zeros(2).half(), "float32.*float16"),
        (torch.zeros(2).double(), torch.zeros(2).double(), "float64"),
        (torch.zeros(2).int(), torch.zeros(2).int(), "int32"),
        (torch.zeros(2), torch.zeros(2, device="meta"), "got.*meta"),
    ],
)
def test_bad_input_is_refused_by_name(a, b, message):
    a, b = (x if x.is_meta else x.to(DEVICE) for x in (a, b))
    with pytest.raises(ValueError, match=message):
        multiply(a, b)
    if b.dtype != torch.float32:
        with pytest.raises(ValueError, match=r"got \[torch.float64\]"):
            silu(b.double())


def test_operators_are_registered_as_torch_wants_them():
    a, b = normal((3, 5)).requires_grad_(), normal(5).requires_grad_()
    ops = torch.ops.warpmap
    torch.library.opcheck(ops.multiply.default, (a, b))
    torch.library.opcheck(ops.silu.default, (a,))
    a, b = a.detach(), normal((5, 3)).T
    torch.library.opcheck(ops.silu_backward.default, (a, b))


def test_compiles_with_its_gradient_in_one_graph():
    def loss(a, b):
        return (silu(multiply(a, b)) ** 2).sum()

    a, b = normal((4, 9)), normal(9)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    plain, graph = (gradient(f)(a, b, None) for f in (loss, compiled))
    torch.testing.assert_close(plain, graph, rtol=0, atol=0)


@pytest.mark.sanitize
def test_every_kernel():
    for n in (5, 1029):
        a, b = normal(n, torch.float16), normal(n, torch.float16)
        check_multiply(multiply, a, b)
        check_silu(silu, a)
        check_silu_gradient(lambda x, dy: gradient(silu)(x, dy)[0], a, b)
        if DEVICE == "cuda":
            check_cuda(a, b)
    check_multiply(multiply, normal((9, 40)), normal(40))
    check_multiply(multiply, normal((9, 40)), normal((9, 1)))
    if DEVICE == "cuda":
        a, row = normal((9, 40)), normal(40)
        assert torch.equal(multiply_cuda(a, row), a * row)


# Faults: the checks above must see every one


def multiply_checks(op):
    # pieces of something larger: a wrong kernel may read beyond their ends
    many = normal(21 * 512)
    check_multiply(op, normal((3, 501)), normal((3, 501)))
    check_multiply(op, normal((21, 512)), many[:512])
    check_multiply(op, normal((41, 100)), many[:41, None])
    check_multiply(op, normal((40, 12)).T, normal((12, 40)))


def silu_checks(op, dx):
    check_silu(op, normal((3, 501)))
    check_silu_gradient(dx, normal((3, 501)), normal((3, 501)))


def test_the_kernels_pass_the_checks_that_faults_must_fail():
    multiply_checks(multiply)
    silu_checks(silu, lambda x, dy: gradient(silu)(x, dy)[0])


# what lies beyond a row cannot reach an elementwise result
@pytest.mark.parametrize("fault", sorted({*WRONG} - {"tail unmasked"}))
def test_a_wrong_result_is_caught(fault):
    a, b = normal((3, 501)), normal((3, 501))
    with pytest.raises(AssertionError):
        check_multiply(WRONG[fault](multiply), a, b)
    with pytest.raises(AssertionError):
        check_silu(WRONG[fault](silu), a)


KERNEL_FAULTS = {
    "last element unwritten": ("cols < N, OP)", "cols < N - 1, OP)"),
    "a tile skipped": (
        "tile = tl.program_id(0)",
        "tile = tl.program_id(0) + 1",
    ),
    "no tile but the first": ("tile = tl.program_id(0)", "tile = 0"),
    "the other's rows": (
        "b_ptr + rows * stride_bm",
        "b_ptr + rows * stride_am % 512",
    ),
    "rows of the result overlap": ("rows * stride_ym", "rows // 2 * stride_ym"),
    "a column not repeated": ("if STRIDE_BN == 1:", "if STRIDE_AN == 1:"),
    "merged by one operand alone": (
        "merged[-1][1:] == tuple(size * step for step in steps)",
        "merged[-1][1] == size * steps[0]",
    ),
    "an inner stride taken for 1": ("max(dims[-1][1:]) > 1", "False"),
}
SILU_FAULTS = {
    "sign of the exponent": ("y = a * tl.sigmoid(a)", "y = a * tl.sigmoid(-a)"),
    "derivative of the sigmoid left out": ("* (1 + a * (1 - s))", ""),
    "derivative not times 1 - s": ("(1 + a * (1 - s))", "(1 + a)"),
    "gradient taken for the input": (
        "_silu_backward(*ctx.saved_tensors, dy)",
        "_silu_backward(dy, *ctx.saved_tensors)",
    ),
}


@pytest.mark.parametrize("fault", KERNEL_FAULTS)
def test_a_mistake_in_the_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *KERNEL_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        multiply_checks(wrong.multiply)


@pytest.mark.parametrize("fault", SILU_FAULTS)
def test_a_mistake_in_silu_is_caught(fault, tmp_path):
    wrong = mutant(module, *SILU_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        silu_checks(wrong.silu, lambda x, dy: gradient(wrong.silu)(x, dy)[0])


@pytest.mark.parametrize(
    "fault",
    [
        ("_multiply(dy, other)", "_multiply(dy, x)"),
        (".sum_to_size(x.shape)", ".mean().expand(x.shape)"),
    ],
    ids=["the wrong factor", "not summed"],
)
def test_a_mistake_in_the_gradients_is_caught(fault, tmp_path, monkeypatch):
    wrong = mutant(module, *fault, tmp_path)
    monkeypatch.setitem(globals(), "multiply", wrong.multiply)
    with pytest.raises(AssertionError):
        test_gradients_of_a_product(((5, 48), (48,)), torch.float32)


# What the compilers make of the kernels


def compiled(dtype, op, **known):
    itemsize = 4 if dtype == "fp32" else 2
    arrays = 1 if op == "silu" else 1 + known.get("STRIDE_BN", 1)
    BLOCK_M, BLOCK_N = _tile(known.get("cols", 4096), itemsize, arrays)
    ints = ["stride_am", "stride_bm", "stride_ym", "M", "N"]
    return compile_sm90a(
        f"{module.__name__}:_elementwise_kernel",
        {
            **{f"{x}_ptr": f"*{dtype}:16" for x in "aby"},
            **{i: known.get(i, "i32:16") for i in ints},
        },
        {
            "STRIDE_AN": 1,
            "STRIDE_BN": known.get("STRIDE_BN", 1),
            "OP": op,
            "BLOCK_M": BLOCK_M,
            "BLOCK_N": BLOCK_N,
        },
        num_warps=NUM_WARPS,
    )


def memory(kernel):
    names = ("LDG", "STG")
    return {o: n for o, n in kernel.opcodes.items() if o.startswith(names)}


INPUTS = {"multiply": 2, "silu": 1, "silu_backward": 2}


@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        ("multiply", "fp32"),
        ("multiply", "bf16"),
        ("silu", "fp16"),
        ("silu_backward", "bf16"),
    ],
)
def test_all_tiles_but_the_last_move_16_bytes_at_a_time(op, dtype):
    kernel = compiled(dtype, op, N="i32")  # any length
    assert kernel.spills == kernel.stack == 0
    scalar, size = {"fp32": ("", 4)}.get(dtype, (".U16", 8))
    packs = 2 // INPUTS[op]  # of each: a thread has two loads under way
    # 2048 threads fit on an SM, or half as many with twice the packs
    assert kernel.registers <= 32 * packs
    assert memory(kernel) == {
        "LDG.E.128": 2,
        "STG.E.128": packs,
        # the last tile: its mask breaks up the packs
        f"LDG.E{scalar}": 2 * size,
        f"STG.E{scalar}": packs * size,
    }


@pytest.mark.parametrize("cols", [64, 4096])
def test_rows_that_repeat_are_loaded_16_bytes_at_a_time(cols):
    kernel = compiled("fp16", "multiply", cols=cols)
    assert kernel.spills == kernel.stack == 0
    assert {*memory(kernel)} == {"LDG.E.128", "STG.E.128"}


def test_a_column_is_loaded_once_a_row():
    kernel = compiled("fp16", "multiply", STRIDE_BN=0, stride_bm="i32")
    assert kernel.spills == kernel.stack == 0
    # a whole tile takes one number of b, the last one repeats it in each pack
    assert memory(kernel) == {
        "LDG.E.128": 2 * 2,
        "STG.E.128": 2 * 2,
        "LDG.E.U16": 1 + 2 * 8,
    }


@pytest.mark.slow
@pytest.mark.nvcc
def test_cuda_rungs_are_as_wide_as_they_say():
    kernels = compile_cuda(Path(module.__file__).with_suffix(".cu"))
    assert len(kernels) == 3 * 5
    for name, kernel in kernels.items():
        assert kernel.spills == kernel.stack == 0
        assert kernel.registers <= 32
        wide = {"LDG.E.128", "STG.E.128"} & {*kernel.opcodes}
        assert len(wide) == (0 if "naive" in name or "grid" in name else 2)


# On a GPU


def check_cuda(a, b):
    for rung in RUNGS:
        assert torch.equal(multiply_cuda(a, b, rung), a * b)
    check_silu(silu_cuda, a)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_rungs_equal_torch_bit_for_bit(dtype):
    for n in (0, *range(1, 40), *LENGTHS, 2**20, 2**23 + 5):
        check_cuda(normal(n, dtype), normal(n, dtype))
    for M, N in ((1, 8), (3, 16), (7, 4096), (5000, 24), (100, 100_000)):
        a, row = normal((M, N), dtype), normal(N, dtype)
        assert torch.equal(multiply_cuda(a, row), a * row)


@pytest.mark.gpu
def test_cuda_refuses_what_packs_cannot_hold():
    x = normal(101)
    assert torch.equal(multiply_cuda(x[1:], x[1:], "naive"), x[1:] * x[1:])
    for bad, message in [
        (lambda: multiply_cuda(x[1:], x[1:]), "addresses that 16 divides"),
        (lambda: silu_cuda(x[1:]), "addresses that 16 divides"),
        (lambda: silu_cuda(x[::2]), "contiguous"),
        (lambda: multiply_cuda(x, x, "fast"), "rung must be one of"),
        (lambda: multiply_cuda(x[::2], x[::2]), "contiguous"),
        (lambda: multiply_cuda(normal((3, 5)), normal(5)), "whole packs"),
        (lambda: multiply_cuda(normal((3, 8)), normal(8), "naive"), "row of"),
        (lambda: multiply_cuda(normal((3, 8)), normal((3, 1))), "row of"),
    ]:
        with pytest.raises(ValueError, match=message):
            bad()


@pytest.mark.gpu
def test_random_shapes_and_strides_equal_torch_bit_for_bit():
    for _ in range(150):
        ndim = int(torch.randint(1, 5, ()))
        shape = torch.randint(1, [0, 9**6, 900, 90, 30][ndim], (ndim,)).tolist()
        dtype = DTYPES[int(torch.randint(3, ()))]
        operands = []
        for _ in "ab":
            kept = [n if torch.rand(()) < 0.7 else 1 for n in shape]
            order = torch.randperm(ndim).tolist()
            gap = int(torch.randint(3, ()))
            x = normal([kept[i] + gap for i in order], dtype)
            x = x.permute([order.index(i) for i in range(ndim)])
            operands.append(x[tuple(slice(gap, None) for _ in shape)])
        a, b = operands
        assert torch.equal(multiply(a, b), a * b), (shape, a.stride())


@pytest.mark.gpu
@pytest.mark.parametrize("repeated", ["nothing", "rows", "columns"])
def test_more_than_2_to_the_31_elements(repeated):
    M, N = 2**15 + 1, 2**16
    a = torch.randn(M, N, dtype=torch.bfloat16, device="cuda")
    shape = {"nothing": (M, N), "rows": (1, N), "columns": (M, 1)}[repeated]
    b = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    y = multiply(a, b)
    for rows in a.split(4096):  # without another tensor of that size
        first = rows.storage_offset() // N
        part = slice(first, first + len(rows))
        there = b[part] if len(b) == M else b
        assert torch.equal(y[part], rows * there)


@pytest.mark.gpu
@pytest.mark.parametrize("rung", RUNGS)
def test_cuda_beyond_2_to_the_31_elements(rung):
    n = 2**31 + 2**20 + 3
    a = torch.randn(n, dtype=torch.bfloat16, device="cuda")
    y = multiply_cuda(a, a, rung)
    for first in range(0, n, 2**29):
        part = slice(first, first + 2**29)
        assert torch.equal(y[part], a[part] * a[part])
    if rung == "packed":
        silu_cuda(a[: n - 3])


@pytest.mark.gpu
def test_the_last_tile_of_nearly_2_to_the_31_elements():
    n = 2**31 - 1
    a = torch.randn(n, dtype=torch.bfloat16, device="cuda")
    y = multiply(a, a)
    for part in (slice(2**20), slice(n - 2**20, n)):
        assert torch.equal(y[part], a[part] * a[part])


@pytest.mark.gpu
def test_cuda_threads_take_several_steps():
    a, row = normal((1000, 100)), normal(100)
    for name, b, more in (("row", row, (100,)), ("packed", a, ())):
        y = torch.empty_like(a)
        launch = cuda_kernel(module.__file__, f"multiply_{name}_float32")
        launch(3, 256, a, b, y, a.numel(), *more)
        assert torch.equal(y, a * b)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_equal_bit_for_bit(dtype):
    a, b = normal((1000, 3000), dtype), normal(3000, dtype)
    first = multiply(a, b), silu(a), gradient(silu)(a, a)[0]
    for _ in range(20):
        assert torch.equal(multiply(a, b), first[0])
        assert torch.equal(silu(a), first[1])
        assert torch.equal(gradient(silu)(a, a)[0], first[2])


@pytest.mark.gpu
def test_inductor_compiles_it():
    a, b = normal((64, 1000)), normal(1000)
    compiled = torch.compile(lambda a, b: silu(multiply(a + 1, b)) * 2)
    wanted = silu(multiply(a + 1, b)) * 2
    torch.testing.assert_close(compiled(a, b), wanted)


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_tensors():
    a, b = (normal(1000).to("cuda:1") for _ in "ab")
    check_multiply(multiply, a, b)
    check_cuda(a, b)
