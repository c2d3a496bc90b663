"""A copy is exact for every address and length, and as wide as it says."""

from pathlib import Path

import pytest
import torch
from aot import compile_cuda, compile_sm90a
from kernel_checks import mutant

from warpmap import DEVICE
from warpmap.kernels.building_blocks import vectorized_access as module
from warpmap.kernels.building_blocks.vectorized_access import (
    THREADS,
    WIDTHS,
    copy_,
    copy_cuda_,
    plan_copy,
)

# none, one byte, a pack and its neighbours, a block and its neighbours
LENGTHS = [0, 1, 15, 16, 17, 31, 100, 16 * THREADS - 1, 16 * THREADS + 1]
GUARD = 7


def check_copy(copy, n, x_offset=0, y_offset=0, width=16):
    """The bytes arrive, and those around them stay as they were."""
    x = torch.randint(256, (n + 40,), dtype=torch.uint8, device=DEVICE)
    y = torch.full_like(x, GUARD)
    wanted = y.clone()
    wanted[y_offset : y_offset + n] = x[x_offset : x_offset + n]
    copied = copy(y[y_offset:][:n], x[x_offset:][:n], width)
    assert torch.equal(y, wanted)
    assert torch.equal(copied, x[x_offset:][:n].clone())


def check_plan(plan, x, y, n, width):
    """Packs are aligned, cover everything, and could not be wider."""
    found = plan(x, y, n, width)
    assert found.head + found.packs * found.width + found.tail == n
    assert found.packs >= 0
    assert 0 <= found.head < found.width
    assert 0 <= found.tail < found.width
    if found.packs:
        assert (x + found.head) % found.width == 0
        assert (y + found.head) % found.width == 0
    wider = [w for w in WIDTHS if found.width < w <= width]
    for w in wider:  # there is no head that aligns both
        assert all((x + h) % w or (y + h) % w for h in range(w))


def all_plans(plan):
    for x in range(17):
        for y in range(17):
            for n in (0, 1, 5, 16, 47):
                for width in WIDTHS:
                    check_plan(plan, x, y, n, width)


def test_plans_are_aligned_complete_and_as_wide_as_can_be():
    all_plans(plan_copy)


@pytest.mark.parametrize("y_offset", range(0, 16, 3))
def test_every_offset(y_offset):
    for x_offset in range(16):
        check_copy(copy_, 47, x_offset, y_offset)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_length(width):
    for n in LENGTHS:
        check_copy(copy_, n, 3, 3, width)
        check_copy(copy_, n, 3, 7, width)


DTYPES = [
    torch.bool,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float32,
    torch.int64,
    torch.complex128,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_bits(dtype):
    bits = torch.randint(256, (21, 16), dtype=torch.uint8, device=DEVICE)
    # a bool is 0 or 1; the others hold every pattern, nan among them
    x = bits > 127 if dtype == torch.bool else bits.view(dtype)
    y = copy_(torch.empty_like(x[1:]), x[1:])
    assert torch.equal(y.view(torch.uint8), x[1:].clone().view(torch.uint8))


@pytest.mark.sanitize
def test_shapes_and_every_kernel():
    for shape in ((), (0, 3), (5, 7, 2)):
        x = torch.randn(shape, device=DEVICE)
        y = torch.empty_like(x)
        assert copy_(y, x) is y
        assert torch.equal(y, x)
    for copy in [copy_, copy_cuda_] if DEVICE == "cuda" else [copy_]:
        for width in WIDTHS:
            check_copy(copy, 300, 5, 5, width)
            check_copy(copy, 300, 5, 1, width)


def test_a_gradient_is_not_followed():
    x = torch.randn(9, device=DEVICE, requires_grad=True)
    y = copy_(torch.empty(9, device=DEVICE), x)
    assert not y.requires_grad


@pytest.mark.parametrize(
    ("y", "x", "message"),
    [
        (torch.zeros(4), torch.zeros(5), r"like x, \(5,\).*got \(4,\)"),
        (torch.zeros(4), torch.zeros(4).half(), "float16.*got.*float32"),
        (torch.zeros(3, device="meta"), torch.zeros(3), "got.*on meta"),
        (torch.zeros(2, 3), torch.zeros(3, 2).T, r"x contig.*\(1, 2\)"),
        (torch.zeros(6)[::2], torch.zeros(3), r"y contig.*\(2,\)"),
    ],
)
def test_bad_input_is_refused_by_name(y, x, message):
    x, y = (
        t
        if t.is_meta
        else torch.empty_strided(
            t.shape, t.stride(), dtype=t.dtype, device=DEVICE
        )
        for t in (x, y)
    )
    with pytest.raises(ValueError, match=message):
        copy_(y, x)


def test_lazy_conjugates_and_negatives_are_refused():
    x = torch.ones(4, dtype=torch.complex64, device=DEVICE)
    for lazy in (x.conj(), torch._neg_view(x)):
        with pytest.raises(ValueError, match="x as it stands in memory"):
            copy_(torch.empty_like(x), lazy)


def test_overlap_width_and_length_are_refused():
    x = torch.zeros(10, device=DEVICE)
    for begin in (0, 1, 4):
        with pytest.raises(ValueError, match="overlap"):
            copy_(x[begin:][:5], x[:5])
    copy_(x[5:], x[:5])  # side by side is apart
    with pytest.raises(ValueError, match=r"width must be one of.*got 3"):
        copy_(x[5:], x[:5], width=3)
    with pytest.raises(ValueError, match=r"n_bytes must be.*got -1"):
        plan_copy(0, 0, -1)
    other = torch.zeros(2, 3, device="meta")
    for copy in (copy_, copy_cuda_):
        with pytest.raises(
            ValueError, match=r"tensors on (cuda|cpu), got meta"
        ):
            copy(other, other.clone())


# Faults: the checks above must see every one


def copy_checks(copy):
    for n in (1, 47, 16 * THREADS + 17):
        for offsets in ((0, 0), (3, 3), (3, 7)):
            check_copy(copy, n, *offsets)


def test_the_kernel_passes_the_checks_that_faults_must_fail():
    copy_checks(copy_)


KERNEL_FAULTS = {
    "head left out": ("tl.store(y_ptr + byte, x, byte < head)", "pass"),
    "tail left out": ("tl.store(y_ptr + end + byte, x, byte < tail)", "pass"),
    "tail begins at the packs": ("end = head +", "end = 0 * head +"),
    "one pack too many": ("mask = pack < packs", "mask = pack <= packs"),
    "one pack too few": ("mask = pack < packs", "mask = pack < packs - 1"),
    "all blocks do the first": ("tl.program_id(0).to(tl.int64)", "head * 0"),
    "too few blocks": ("-(-plan.packs // THREADS)", "plan.packs // THREADS"),
}
PLAN_FAULTS = {
    "width not lowered": (
        "(x_address - y_address) % width",
        "(x_address * 0) % width",
    ),
    "width lowered too far": ("width //= 2", "width = 1"),
    "head from the wrong side": ("-x_address % width", "x_address % width"),
    "head longer than the array": (
        "min(-x_address % width, n_bytes)",
        "-x_address % width",
    ),
}


@pytest.mark.parametrize("fault", KERNEL_FAULTS)
def test_a_mistake_in_the_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *KERNEL_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        copy_checks(wrong.copy_)


@pytest.mark.parametrize("fault", PLAN_FAULTS)
def test_a_mistake_in_the_plan_is_caught(fault, tmp_path):
    wrong = mutant(module, *PLAN_FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        all_plans(wrong.plan_copy)


# What the compilers make of the kernels

LOADS = {
    1: "LDG.E.U8",
    2: "LDG.E.U16",
    4: "LDG.E",
    8: "LDG.E.64",
    16: "LDG.E.128",
}


def check_width(kernel, width):
    """One load and store of a pack; one of a byte at either end."""
    assert kernel.spills == kernel.stack == 0
    memory = {
        op: n for op, n in kernel.opcodes.items() if op[:3] in ("LDG", "STG")
    }
    wanted = {"LDG.E.U8": 2, "STG.E.U8": 2}
    for op in (LOADS[width], LOADS[width].replace("LDG", "STG")):
        wanted[op] = wanted.get(op, 0) + 1
    assert memory == wanted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "packs"), [*((w, "i32") for w in WIDTHS), (16, "i64")]
)
def test_triton_loads_and_stores_whole_packs(width, packs):
    # nothing is known of the addresses and the length
    signature = {"x_ptr": "*u8", "y_ptr": "*u8", "head": "i32", "tail": "i32"}
    kernel = compile_sm90a(
        f"{module.__name__}:_copy_kernel",
        {**signature, "packs": packs},
        {"WIDTH": width, "BLOCK": THREADS},
        num_warps=THREADS // 32,
    )
    check_width(kernel, width)


@pytest.mark.slow
@pytest.mark.nvcc
def test_cuda_loads_and_stores_whole_packs():
    kernels = compile_cuda(Path(module.__file__).with_suffix(".cu"))
    assert {*kernels} == {f"copy_{width}" for width in WIDTHS}
    for width in WIDTHS:
        check_width(kernels[f"copy_{width}"], width)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("copy", [copy_, copy_cuda_])
def test_every_pair_of_offsets_and_length(copy, width):
    for n in (*LENGTHS, *range(40)):
        for x_offset in range(17):
            check_copy(copy, n, x_offset, 0, width)
            check_copy(copy, n, x_offset, x_offset % 5, width)


@pytest.mark.gpu
@pytest.mark.parametrize("copy", [copy_, copy_cuda_])
def test_random_places_and_lengths(copy):
    for _ in range(200):
        n = int(2 ** (24 * torch.rand(()).item()))
        a, b = (int(torch.randint(40, ())) for _ in "ab")
        check_copy(copy, n, a, b, WIDTHS[int(torch.randint(5, ()))])


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1, 16])
@pytest.mark.parametrize("copy", [copy_, copy_cuda_])
def test_more_than_2_to_the_31_bytes(copy, width):
    n = 2**31 + 2**20 + 5
    x = torch.randint(256, (n + 3,), dtype=torch.uint8, device="cuda")
    y = torch.full_like(x, GUARD)
    copy(y[3:], x[3:], width)
    assert torch.equal(y[3:], x[3:])
    assert (y[:3] == GUARD).all()


@pytest.mark.gpu
def test_more_than_2_to_the_31_packs_of_one_byte():
    x = torch.randint(256, (2**31 + 2**20,), dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    for copy in (copy_, copy_cuda_):
        assert torch.equal(copy(y.zero_()[1:], x[:-1], 1), x[:-1])


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_arrays():
    x = torch.randn(1000, device="cuda:1")
    for copy in (copy_, copy_cuda_):
        assert torch.equal(copy(torch.empty_like(x), x), x)
