"""A transpose is the same bits in other places, for every shape and stride."""

from pathlib import Path

import pytest
import torch
from aot import compile_cuda, compile_sm90a
from kernel_checks import WRONG, mutant

from warpmap import DEVICE
from warpmap.hardware.gpu.memory_coalescing import coalesce
from warpmap.kernels.building_blocks.shared_memory_and_bank_conflicts import (
    swizzle,
    wavefronts,
)
from warpmap.kernels.data_movement import transpose as module
from warpmap.kernels.data_movement.transpose import (
    BITS,
    MAX_SHORT,
    RUNGS,
    _is_thin,
    _thin_tile,
    _tile,
    transpose,
    transpose_cuda,
)

# one element, a row, a column, tiles in part, several tiles both ways, of
# sides that 16 divides or not, long tiles, thin ones, batches
SHAPES = [
    (1, 1),
    (1, 70),
    (70, 1),
    (5, 7),
    (64, 64),
    (65, 130),
    (260, 70),
    (144, 256),
    (16, 300),
    (300, 16),
    (3, 2500),
    (2500, 3),
    (2, 9, 40),
    (2, 4, 37),
    (2, 37, 4),
    (2, 33, 33),
    (2, 260, 40),
]
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
]


def noise(shape, dtype=torch.float32):
    """Every pattern of bits may come: nan, inf and -0 too."""
    if dtype == torch.bool:
        return torch.rand(shape, device=DEVICE) < 0.5
    size = torch.empty(0, dtype=dtype).element_size()
    bytes_ = torch.randint(
        0, 256, (*shape, size), dtype=torch.uint8, device=DEVICE
    )
    return bytes_.view(dtype).squeeze(-1)


def equal_bits(a, b):
    kind = BITS[b.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(kind), b.view(kind))


def check(op, x):
    """Every bit at its place, by indices that are worked out one by one."""
    *batch, M, N = x.shape
    y = op(x)
    assert y.shape == (*batch, N, M)
    assert y.is_contiguous()
    n = torch.arange(N, device=DEVICE)[:, None]
    m = torch.arange(M, device=DEVICE)[None, :]
    assert equal_bits(y, x[..., m, n].contiguous())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_element_finds_its_place(shape):
    check(transpose, noise(shape))


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_every_dtype_are_kept(dtype):
    for shape in ((150, 70), (144, 256), (3, 50), (50, 3)):
        check(transpose, noise(shape, dtype))


def views():
    """Matrices that do not lie in memory as they read."""
    base = noise((40, 90))
    yield base[3:30, 5:71]
    yield base[::2, ::3]
    yield base.T
    yield noise((1, 33)).expand(20, 33)
    yield noise((20, 1)).expand(20, 33)
    yield noise((3, 40, 5)).transpose(0, 1)
    yield noise((3, 4, 50)).permute(2, 0, 1)
    yield noise((4, 50)).expand(3, 4, 50)
    yield noise((5, 200))[:, ::2]  # thin, but in pieces


@pytest.mark.parametrize("i", range(len(list(views()))))
def test_any_strides(i):
    check(transpose, list(views())[i])


def test_conjugates_and_negatives_are_not_forgotten():
    z = torch.randn(5, 6, dtype=torch.complex64, device=DEVICE).conj()
    assert z.is_conj()
    torch.testing.assert_close(transpose(z), z.T.contiguous(), rtol=0, atol=0)
    assert z.imag.is_neg()
    torch.testing.assert_close(
        transpose(z.imag), z.imag.T.contiguous(), rtol=0, atol=0
    )


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 4, 2), (2, 0, 3)])
def test_empty(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    y = transpose(x)
    y.sum().backward()
    assert y.shape == x.mT.shape
    assert x.grad.shape == shape


def gradient(op):
    """From a function of x, the function of dy that gives dx."""

    def dx(dy):
        x = torch.zeros_like(dy.mT).requires_grad_()
        return torch.autograd.grad(op(x), x, dy)[0]

    return dx


def check_gradient(op):
    for shape in ((5, 3), (70, 65), (2, 33, 20)):
        check(gradient(op), torch.randn(shape, device=DEVICE))
    check(gradient(op), torch.randn(1, 1, device=DEVICE).expand(4, 30))
    check(gradient(op), torch.randn(9, 7, device=DEVICE).T)


def test_gradient_is_the_transposed_gradient():
    check_gradient(transpose)


def test_gradients_of_every_order_agree_with_differences():
    x = torch.randn(3, 4, dtype=torch.float64, device=DEVICE)
    x.requires_grad_()
    torch.autograd.gradcheck(transpose, x)
    torch.autograd.gradgradcheck(lambda x: transpose(x) ** 3, x)


def test_operator_is_registered_as_torch_wants_it():
    x = torch.randn(2, 5, 20, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.warpmap.transpose.default, (x,))


def test_compiles_with_its_gradient_in_one_graph():
    def loss(x):
        return (transpose(x * 2) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 9, device=DEVICE, requires_grad=True)
    (dx,) = torch.autograd.grad(compiled(x), x)
    torch.testing.assert_close(dx, 8 * x.detach(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4), r"got \(4,\)"),
        (torch.zeros(1, 2, 3, 4), r"\(1, 2, 3, 4\).*flattened"),
        (torch.zeros(2, 2, dtype=torch.complex128), "complex128"),
        (torch.zeros(2, 3, device="meta"), "got meta"),
    ],
)
def test_bad_input_is_refused_by_name(x, message):
    if x.device.type != "meta":
        x = x.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        transpose(x)


@pytest.mark.parametrize(
    ("x", "rung", "message"),
    [
        (torch.zeros(2, 3), "best", "rung .* got 'best'"),
        (torch.zeros(3), "naive", r"got \(3,\)"),
        (torch.zeros(3, 2).T, "naive", r"strides \(1, 2\)"),
        (torch.zeros(1).expand(2**21, 1).contiguous(), "naive", "2097120"),
        (torch.zeros(2, 3, dtype=torch.half), "naive", "float16"),
        (torch.zeros(2, 3), "naive", "on cpu"),
    ],
)
def test_the_ladder_refuses_by_name(x, rung, message):
    with pytest.raises(ValueError, match=message):
        transpose_cuda(x, rung)


# Faults: the checks above must see every one


def checks(op):
    for shape in ((260, 70), (2, 33, 40), (3, 50), (2, 37, 3)):
        check(op, torch.randn(shape, device=DEVICE))
    for strided in ((40, 90), (5, 80)):  # the second is thin
        check(op, torch.randn(strided, device=DEVICE)[:, ::2])


def test_the_kernels_pass_the_checks_that_faults_must_fail():
    checks(transpose)


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_result_is_caught(fault):
    with pytest.raises(AssertionError):
        checks(WRONG[fault](transpose))


FAULTS = {
    "last column unwritten": ("(cols < N - n)", "(cols < N - n - 1)"),
    "last row unwritten": ("(rows < M - m)", "(rows < M - m - 1)"),
    "tiles walked past": ("tile % tiles_m * BLOCK_M", "0 * BLOCK_M"),
    "tiles counted along N": ("tile // tiles_m", "tile // (tiles // tiles_m)"),
    "stride of the columns ignored": ("* stride_xn\n    x =", "* 1\n    x ="),
    "first matrix for all": ("x_ptr += batch * stride_xb", "x_ptr += 0"),
    "all to the first matrix": ("(batch * N + n) * M", "n * M"),
    "tall: first column for all": (
        "long * SHORT + short,",
        "long * SHORT + 0 * short,",
    ),
    "wide: rows swapped": ("at % SHORT * BLOCK", "(at + 1) % SHORT * BLOCK"),
    "tall taken for wide": ("TALL=M > N", "TALL=M < N"),
    "thin: all to the first matrix": ("y_ptr += batch * L * SHORT", ""),
    "thin in pieces taken for whole": ("and x.is_contiguous()", ""),
    "tall: row too short": ("(at < SHORT * BLOCK) &", "(at < BLOCK) &"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_in_a_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        checks(wrong.transpose)


def test_a_mistake_in_the_gradient_is_caught(tmp_path):
    old = "lambda ctx, dy: _transpose(dy)"
    wrong = mutant(module, old, f"{old}.flip(-1)", tmp_path)
    checks(wrong.transpose)
    with pytest.raises(AssertionError):
        check_gradient(wrong.transpose)


# Tiles


def test_tiles_fit_the_matrix():
    for size in BITS:
        for M in (1, 2, 3, 16, 40, 64, 1000, 2**26):
            for N in (1, 5, 16, 100, 4096, 2**26):
                BLOCK_M, BLOCK_N, warps = _tile(M, N, size)
                assert BLOCK_M < 2 * M
                assert BLOCK_N < 2 * N
                assert 2048 * warps >= BLOCK_M * BLOCK_N  # 64 a thread
                assert warps <= 16
        assert _tile(16, 2**22, size) != _tile(2**22, 16, size)
        # where a matrix is large enough, no tile is small
        for M in (4, 16, 256, 2048):
            for N in (2**22 // M, 2**22 // M + 1):
                for shape in ((M, N), (N, M)):
                    BLOCK_M, BLOCK_N, _ = _tile(*shape, size)
                    assert BLOCK_M * BLOCK_N * size >= 8192


def test_thin_matrices_are_those_that_tiles_serve_badly():
    thin = {
        N
        for N in range(1, 40)
        if _is_thin(torch.empty(100, N, dtype=torch.bfloat16))
    }
    assert thin == {*range(2, MAX_SHORT + 1)} - {8}
    assert _is_thin(torch.empty(3, 100))
    assert not _is_thin(torch.empty(3, 100)[:, ::2])


# What the compiler makes of the kernels


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((8192, 8192), 2),
        ((8192, 8192), 4),
        ((2**22, 16), 2),
    ],
    ids=str,
)
def test_aligned_tiles_move_16_bytes_at_a_time(shape, size):
    BLOCK_M, BLOCK_N, num_warps = _tile(*shape, size)
    integer = f"i{8 * size}"
    kernel = compile_sm90a(
        f"{module.__name__}:_transpose_kernel",
        {
            **dict.fromkeys(("x_ptr", "y_ptr"), f"*{integer}:16"),
            **dict.fromkeys(("stride_xb", "stride_xm", "M", "N"), "i32:16"),
        },
        {"stride_xn": 1, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N},
        num_warps=num_warps,
    )
    assert kernel.spills == kernel.stack == 0
    each = BLOCK_M * BLOCK_N * size // (16 * kernel.threads)
    memory = {
        op: n
        for op, n in kernel.opcodes.items()
        if op.startswith(("LDG", "STG"))
    }
    assert memory == {"LDG.E.128": each, "STG.E.128": each}
    if size == 2 and shape[0] == shape[1]:  # turned by ldmatrix, as it reads
        assert kernel.opcodes["LDSM.16.MT88.4"]
    # bytes under way on a streaming multiprocessor, if registers allow it
    blocks = 65536 // (kernel.threads * (kernel.registers + 7) // 8 * 8)
    assert blocks * BLOCK_M * BLOCK_N * size >= 64 * 1024


def test_odd_tiles_move_an_element_at_a_time_without_spilling():
    BLOCK_M, BLOCK_N, num_warps = _tile(8191, 8193, 2)
    kernel = compile_sm90a(
        f"{module.__name__}:_transpose_kernel",
        {
            **dict.fromkeys(("x_ptr", "y_ptr"), "*i16:16"),
            **dict.fromkeys(("stride_xb", "stride_xm", "M", "N"), "i32"),
        },
        {"stride_xn": 1, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N},
        num_warps=num_warps,
    )
    assert kernel.spills == kernel.stack == 0
    memory = {op for op in kernel.opcodes if op.startswith(("LDG", "STG"))}
    assert memory == {"LDG.E.U16", "STG.E.U16"}


@pytest.mark.parametrize("tall", [True, False], ids=["tall", "wide"])
def test_thin_tiles_move_16_bytes_at_a_time(tall):
    SHORT_BLOCK, BLOCK, num_warps = _thin_tile(2**26, 3, 2)
    kernel = compile_sm90a(
        f"{module.__name__}:_thin_kernel",
        {"x_ptr": "*i16:16", "y_ptr": "*i16:16", "L": "i32:16"},
        {"TALL": tall, "SHORT": 3, "SHORT_BLOCK": SHORT_BLOCK, "BLOCK": BLOCK},
        num_warps=num_warps,
    )
    assert kernel.spills == kernel.stack == 0
    memory = {
        op: n
        for op, n in kernel.opcodes.items()
        if op.startswith(("LDG", "STG"))
    }
    assert memory == {"LDG.E.128": 3, "STG.E.128": 3}
    assert 3 * 16 * kernel.threads == 3 * BLOCK * 2  # nothing moved twice


# The ladder in CUDA C++


@pytest.mark.nvcc
def test_rungs_differ_in_shared_memory_only():
    kernels = compile_cuda(Path(module.__file__).with_suffix(".cu"))
    assert set(kernels) == {f"transpose_{rung}" for rung in RUNGS}
    for kernel in kernels.values():
        assert kernel.spills == kernel.stack == 0
        assert kernel.opcodes["LDG.E"] == kernel.opcodes["STG.E"] == 4
    reserved = 1024  # by CUDA, in every block
    shared = {
        rung: kernels[f"transpose_{rung}"].shared - reserved
        for rung in RUNGS[1:]
    }
    assert shared == {"tiled": 4096, "padded": 4224, "swizzled": 4096}
    assert "LDS" not in kernels["transpose_naive"].opcodes


# where an element of a tile is kept, as in the .cu
PLACES = {
    "tiled": lambda row, col: row * 32 + col,
    "padded": lambda row, col: row * 33 + col,
    "swizzled": lambda row, col: row * 32 + (col ^ row),
}


def test_swizzle_of_the_ladder_is_that_of_cute():
    for row in range(32):
        for col in range(32):
            plain, swizzled = PLACES["tiled"], PLACES["swizzled"]
            moved = swizzle(4 * plain(row, col), bits=5, base=2, shift=5)
            assert moved == 4 * swizzled(row, col)
    code = Path(module.__file__).with_suffix(".cu").read_text()
    assert "row * tile + (col ^ row)" in code


# table of the page: sectors of 32 floats, and cycles of the banks
@pytest.mark.parametrize(
    ("rung", "sectors", "cycles"),
    [("naive", 36, 0), ("tiled", 8, 33), ("padded", 8, 2), ("swizzled", 8, 2)],
)
def test_counts_of_the_page(rung, sectors, cycles):
    row = [4 * t for t in range(32)]
    column = [4 * 4096 * t for t in range(32)]
    written = column if rung == "naive" else row
    assert len(coalesce(row, 4)) + len(coalesce(written, 4)) == sectors
    if rung == "naive":
        return
    place = PLACES[rung]
    for j in range(32):
        stored = [4 * place(j, t) for t in range(32)]
        loaded = [4 * place(t, j) for t in range(32)]
        assert wavefronts(stored, 4) + wavefronts(loaded, 4) == cycles


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_transposes(rung):
    for shape in ((1, 1), (33, 31), (64, 96), (40, 130), (0, 4)):
        for dtype in (torch.float32, torch.int32):
            check(lambda x: transpose_cuda(x, rung), noise(shape, dtype))


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [(46400, 46400), (3, 2**15, 2**15), (2**30, 3), (3, 2**30), (2, 2**30, 3)],
    ids=str,
)
def test_more_than_2_to_the_31_elements(shape):
    x = torch.empty(shape, dtype=torch.int8, device="cuda").random_()
    assert torch.equal(transpose(x).mT, x)


@pytest.mark.gpu
@pytest.mark.parametrize("rung", RUNGS)
def test_more_than_2_to_the_31_elements_on_the_ladder(rung):
    x = torch.empty(46400, 46400, dtype=torch.int32, device="cuda").random_()
    assert torch.equal(transpose_cuda(x, rung).T, x)


@pytest.mark.gpu
def test_strides_beyond_2_to_the_31():
    x = torch.empty(2**16, 2**16, dtype=torch.int8, device="cuda").random_()
    for view in (x[:, :65], x.T[:65], x[:: 2**15, ::2], x.T[-3:]):
        assert torch.equal(transpose(view).mT, view)


@pytest.mark.gpu
def test_random_shapes_dtypes_and_strides():
    def side(most):
        return int(most ** torch.rand(()).item()) + 1

    for _ in range(150):
        dtype = DTYPES[int(torch.randint(len(DTYPES), ()))]
        M, N, B = side(3000), side(3000), side(5)
        x = noise((B, M, N), dtype)
        if torch.rand(()) < 0.5:
            steps = [int(torch.randint(1, 4, ())) for _ in "bmn"]
            x = x[:: steps[0], :: steps[1], :: steps[2]]
        order = [(0, 1, 2), (1, 2, 0), (2, 0, 1), (0, 2, 1)]
        x = x.permute(order[int(torch.randint(4, ()))])
        check(transpose, x if torch.rand(()) < 0.5 else x[0])


@pytest.mark.gpu
def test_inductor_compiles_it():
    x = torch.randn(64, 1000, dtype=torch.bfloat16, device="cuda")
    compiled = torch.compile(lambda x: transpose(x + 1) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x), (x + 1).T * 2, rtol=0, atol=0)


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_matrix():
    x = torch.randn(100, 70, device="cuda:1")
    assert torch.equal(transpose(x).T, x)
    assert torch.equal(transpose_cuda(x).T, x)
