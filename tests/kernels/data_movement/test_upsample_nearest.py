"""Upsampling picks PyTorch's pixels, and its gradient returns to each."""

import pytest
import torch
import torch.nn.functional as F
from aot import compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant

from warpmap import DEVICE
from warpmap.kernels.data_movement import upsample_nearest as module
from warpmap.kernels.data_movement.upsample_nearest import (
    DTYPES,
    MAX_EXACT_SCALE,
    MAX_SIZE,
    NUM_WARPS,
    REPEATED_COLUMNS,
    _tile,
    source_index,
    upsample_nearest,
    upsample_nearest_reference,
)

LAYOUTS = {
    "first": torch.contiguous_format,
    "last": torch.channels_last,
}

# one pixel; twice, over several tiles of whole and cut rows; each axis by its
# own; three times, which the columns' kernel does not know; fractions; one
# axis kept; the first scale that float32 gets wrong
CASES = [
    ((1, 1, 1, 1), (2, 2)),
    ((2, 3, 20, 16), (40, 32)),
    ((1, 2, 33, 9), (66, 18)),
    ((1, 2, 5, 6), (5, 48)),
    ((1, 2, 3, 130), (24, 260)),
    ((2, 3, 4, 5), (12, 15)),
    ((1, 2, 21, 30), (31, 45)),
    ((2, 1, 7, 6), (7, 11)),
    ((1, 1, 1, 2), (2, 82)),
]


def normal(shape, dtype=torch.float32, layout="first"):
    x = torch.randn(shape, device=DEVICE).to(dtype)
    return x.contiguous(memory_format=LAYOUTS[layout])


def sources(size, new_size):
    """The same rule, from PyTorch's own forward pass."""
    ramp = torch.arange(float(size), device=DEVICE)[None, None, None]
    wide = F.interpolate(ramp, size=(1, new_size), mode="nearest")
    return wide.flatten().long()


def gradient(op):
    """From a function of (x, size), one of (x, dy) that gives dx."""

    def dx(x, dy):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(op(x, dy.shape[2:]), x, dy)[0]

    return dx


def strides(x):
    """Without those of dimensions of size 1, which place nothing."""
    return [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1]


def check_forward(op, x, size):
    y = op(x, size)
    expected = F.interpolate(x, size=tuple(size), mode="nearest")
    assert y.dtype == expected.dtype
    assert strides(y) == strides(expected)
    assert torch.equal(y, expected)


def check_backward(dx, x, dy):
    """Against sums in float64 over the pixels that PyTorch's forward took.

    PyTorch's own gradient on a GPU rounds the edges of its sums apart from
    forward, so it is no yardstick.
    """

    def collect(large):
        for axis in (2, 3):
            index = sources(x.shape[axis], dy.shape[axis])
            shape = list(large.shape)
            shape[axis] = x.shape[axis]
            zeros = torch.zeros(shape, dtype=large.dtype, device=DEVICE)
            large = zeros.index_add(axis, index, large)
        return large

    got = dx(x, dy)
    assert strides(got) == strides(x)
    most = [dy.shape[i] // x.shape[i] + 2 for i in (2, 3)]
    assert_accurate(
        got,
        collect(dy.double()),
        x.dtype,
        scale=collect(dy.double().abs()),
        steps=1,
        terms=most[0] * most[1],
    )


@pytest.mark.parametrize("size", [1, 2, 3, 7, 30, 127])
def test_sources_are_those_of_torch(size):
    for new_size in range(size, 300):
        expected = sources(size, new_size).cpu()
        assert torch.equal(source_index(size, new_size), expected)


def test_float32_finds_whole_scales_up_to_40():
    for scale in range(1, MAX_EXACT_SCALE + 1):
        size = MAX_SIZE // scale
        exact = torch.arange(size).repeat_interleave(scale)
        assert torch.equal(source_index(size, size * scale), exact)
    counts = source_index(3, 3 * 41).bincount()
    assert counts.tolist() == [42, 41, 40]


def test_the_reference_agrees_with_torch():
    x = normal((2, 3, 4, 5))
    check_forward(upsample_nearest_reference, x, (7, 15))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
def test_agrees_with_torch_in_every_bit(shape, size, layout):
    check_forward(upsample_nearest, normal(shape, layout=layout), size)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
def test_gradient_agrees_with_float64(shape, size, layout):
    x = normal(shape, layout=layout)
    check_backward(gradient(upsample_nearest), x, normal((*shape[:2], *size)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(dtype, layout):
    for size in ((8, 12), (7, 9)):
        x = normal((1, 3, 4, 6), dtype, layout)
        check_forward(upsample_nearest, x, size)
        dy = normal((1, 3, *size), dtype)
        check_backward(gradient(upsample_nearest), x, dy)


def test_channels_may_need_several_tiles():
    x = normal((1, _tile(4, packs=2) + 5, 2, 1), layout="last")
    check_forward(upsample_nearest, x, (3, 2))
    dx = gradient(upsample_nearest)
    check_backward(dx, x, normal((*x.shape[:2], 3, 2)))


def test_gradient_may_have_any_layout():
    x = normal((2, 3, 4, 5))
    dx = gradient(upsample_nearest)
    check_backward(dx, x, normal((1, 1, 1, 1)).expand(2, 3, 8, 10))
    check_backward(dx, x, normal((2, 3, 10, 8)).mT)


def test_the_gradient_of_single_pixels_may_have_channels_last():
    dy = normal((1, 3, 2, 2), layout="last")
    dx = torch.ops.warpmap.upsample_nearest_backward(dy, 1, 1)
    torch.testing.assert_close(dx, dy.sum(dim=(2, 3), keepdim=True))


@pytest.mark.parametrize("shape", [(0, 3, 2, 2), (2, 0, 2, 2)], ids=str)
def test_empty(shape):
    x = torch.empty(shape, device=DEVICE, requires_grad=True)
    y = upsample_nearest(x, (4, 5))
    y.sum().backward()
    assert y.shape == (*shape[:2], 4, 5)
    assert x.grad.shape == shape


@pytest.mark.parametrize(
    ("x", "size", "message"),
    [
        (torch.zeros(2, 3, 4), (4, 8), r"images.*\(2, 3, 4\)"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int32), (4, 4), "int32"),
        (torch.zeros(1, 1, 2, 2, device="meta"), (4, 4), "meta"),
        (torch.zeros(1, 1, 4, 4)[..., ::2], (4, 4), r"strides \(16, 16, 4, 2"),
        (torch.zeros(1, 1, 0, 2), (4, 4), r"pixels.*\(1, 1, 0, 2\)"),
        (torch.zeros(1, 1, 4, 4), (4, 3), r"size.*\(4, 3\)"),
        (torch.zeros(1, 1, 4, 4), (4, MAX_SIZE + 1), "size.*32769"),
    ],
)
def test_bad_input_is_refused_by_name(x, size, message):
    if x.device.type != "meta":
        strides = x.stride()
        x = torch.empty_strided(
            x.shape, strides, dtype=x.dtype, device=DEVICE
        ).zero_()
    with pytest.raises(ValueError, match=message):
        upsample_nearest(x, size)


@pytest.mark.slow
def test_operators_are_registered_as_torch_wants_them():
    ops = torch.ops.warpmap
    x = normal((1, 2, 3, 4), layout="last").requires_grad_()
    torch.library.opcheck(ops.upsample_nearest.default, (x, 6, 8))
    dy = normal((1, 2, 6, 8))
    torch.library.opcheck(ops.upsample_nearest_backward.default, (dy, 3, 4))


def test_compiles_with_its_gradient_in_one_graph():
    def loss(x, size):
        return (upsample_nearest(x * 2, (6, 9)) ** 2).sum()

    def compiled(x, size):
        f = torch.compile(loss, fullgraph=True, backend="aot_eager")
        return f(x, size)

    for layout in LAYOUTS:
        x = normal((1, 2, 3, 4), layout=layout)
        a, b = (
            torch.autograd.grad(f(leaf, None), leaf)[0]
            for f in (loss, compiled)
            for leaf in [x.detach().requires_grad_()]
        )
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def checks(op):
    """All four kernels, at the ends of tiles and rows."""
    for shape, size in (CASES[2], CASES[8], ((1, 3, 5, 7), (7, 8))):
        for layout in LAYOUTS:
            x = normal(shape, layout=layout)
            check_forward(op, x, size)
            check_backward(gradient(op), x, normal((*shape[:2], *size)))


@pytest.mark.sanitize
def test_every_kernel_runs_at_its_edges():
    checks(upsample_nearest)


# Faults: the checks above must see every one


@pytest.mark.parametrize("fault", ["all zeros", "last element unwritten"])
def test_a_wrong_result_is_caught(fault):
    x, dy = normal((2, 3, 4, 6)), normal((2, 3, 8, 12))
    with pytest.raises(AssertionError):
        check_forward(WRONG[fault](upsample_nearest), x, (8, 12))
    with pytest.raises(AssertionError):
        check_backward(WRONG[fault](gradient(upsample_nearest)), x, dy)


FAULTS = {
    "rows not moved apart": (
        "q += q // W_out * ((SH - 1) * W_out)",
        "q += q // W_out * ((SH - 2) * W_out)",
    ),
    "tile begins where the row does": (
        "((first - row * W) * SW).to(tl.int32)",
        "(row * 0).to(tl.int32)",
    ),
    "one row forgotten": (
        "tl.store(y_ptr + q + r * W_out, y, mask_q)",
        "tl.store(y_ptr + q + r * W_out, y, mask_q & (r > 0))",
    ),
    "first row counted twice": (
        "tl.load(dy_ptr + q + r * W_out, mask_q, other=0.0)",
        "tl.load(dy_ptr + q, mask_q, other=0.0)",
    ),
    "sources rounded to the nearest": (
        "tl.floor(i.to(tl.float32) * scale)",
        "tl.floor(i.to(tl.float32) * scale + 0.5)",
    ),
    "sources in whole numbers": (
        "h = _source(q // W_out, scale_h, H)\n"
        "    w = _source(q % W_out, scale_w, W)",
        "h = q // W_out * H // H_out\n    w = q % W_out * W // W_out",
    ),
    "no slack for rounding": ("else 1\n", "else 0\n"),
    "no question in the gradient": (
        "(_source(row, scale_h, H) == h)",
        "(_source(row, scale_h, H) >= h)",
    ),
    "scale too large for float32 taken": (
        "MAX_EXACT_SCALE = 40",
        "MAX_EXACT_SCALE = 41",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_in_a_kernel_is_caught(fault, tmp_path):
    if fault == "scale too large for float32 taken":
        wrong = mutant(module, *FAULTS[fault], tmp_path)
        x, dy = normal((1, 1, 2, 2)), normal((1, 1, 2, 82))
        check_backward(gradient(upsample_nearest), x, dy)
        with pytest.raises(AssertionError):
            check_backward(gradient(wrong.upsample_nearest), x, dy)
        return
    wrong = mutant(module, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        checks(wrong.upsample_nearest)


# What the compiler makes of the kernels


def compiled_repeat(direction, dtype, SH, SW, large=False):
    names = {"fwd": ("x", "y"), "bwd": ("dy", "dx")}[direction]
    itemsize = {"fp32": 4, "fp16": 2}[dtype]
    return compile_sm90a(
        f"{module.__name__}:_repeat_{direction}_kernel",
        {
            **{f"{n}_ptr": f"*{dtype}:16" for n in names},
            **{"pixels": "i64:16" if large else "i32:16", "W": "i32:16"},
        },
        {"SH": SH, "SW": SW, "BLOCK": _tile(itemsize) // SW, "LARGE": large},
        num_warps=NUM_WARPS,
    )


def global_memory(kernel):
    names = ("LDG", "STG", "LDGSTS")
    return {n: c for n, c in kernel.opcodes.items() if n.startswith(names)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_twice_moves_16_bytes_of_the_large_image_at_a_time(dtype):
    forward = compiled_repeat("fwd", dtype, 2, 2)
    backward = compiled_repeat("bwd", dtype, 2, 2)
    assert forward.spills == backward.spills == 0
    assert global_memory(forward) == {"LDG.E.64": 1, "STG.E.128": 2}
    assert global_memory(backward) == {"LDG.E.128": 2, "STG.E.64": 1}
    # copies and sums stay in a thread's registers
    assert forward.shared == backward.shared == 0
    shuffles = {"SHFL.BFLY", "SHFL.IDX"}
    assert not shuffles & {*forward.opcodes, *backward.opcodes}


@pytest.mark.slow
def test_other_whole_scales_do_not_spill():
    for direction in ("fwd", "bwd"):
        for SH, SW in ((1, 1), (8, 8)):
            assert compiled_repeat(direction, "fp16", SH, SW).spills == 0
    assert {1, 2, 8} < {*REPEATED_COLUMNS}


def test_64_bit_division_is_left_to_large_tensors():
    small, large = (compiled_repeat("fwd", "fp16", 2, 2, b) for b in (0, 1))
    assert "CALL.REL.NOINC" not in small.opcodes
    assert "CALL.REL.NOINC" in large.opcodes
    assert global_memory(small) == global_memory(large)


@pytest.mark.slow
@pytest.mark.parametrize("D", [1, 64])
def test_gather_stores_16_bytes_at_a_time(D):
    sizes = ("H", "W", "H_out", "W_out") + (("D",) if D > 1 else ())
    for direction, names in (("fwd", ("x", "y")), ("bwd", ("dy", "dx"))):
        packs = 2 if direction == "fwd" else 1
        constants = {"BLOCK": _tile(2, packs) // D, "BLOCK_D": D}
        if D == 1:
            constants["D"] = 1
        if direction == "bwd":
            constants |= {"SLACK": 1, "MOST_H": 4, "MOST_W": 4}
        kernel = compile_sm90a(
            f"{module.__name__}:_gather_{direction}_kernel",
            {
                **{f"{n}_ptr": "*fp16:16" for n in names},
                **dict.fromkeys(sizes, "i32:16"),
                **dict.fromkeys(("scale_h", "scale_w"), "fp32"),
            },
            constants,
            num_warps=NUM_WARPS,
        )
        assert kernel.spills == 0
        assert kernel.opcodes["STG.E.128"] == packs
        if D > 1:  # neighbours in memory are taken together
            assert {n for n in global_memory(kernel) if "LDG" in n} == {
                "LDG.E.128"
            }


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["fwd", "bwd"])
def test_sizes_of_1_which_a_launch_makes_constants_compile(direction):
    names = {"fwd": ("x", "y"), "bwd": ("dy", "dx")}[direction]
    pointers = {f"{n}_ptr": "*fp32:16" for n in names}
    compile_sm90a(
        f"{module.__name__}:_repeat_{direction}_kernel",
        pointers,
        {"pixels": 1, "W": 1, "SH": 2, "SW": 2, "BLOCK": 256, "LARGE": False},
    )
    ones = dict.fromkeys(("H", "W", "H_out", "W_out", "D"), 1)
    most = {"SLACK": 1, "MOST_H": 3, "MOST_W": 3} if direction == "bwd" else {}
    compile_sm90a(
        f"{module.__name__}:_gather_{direction}_kernel",
        {**pointers, "scale_h": "fp32", "scale_w": "fp32"},
        {**ones, **most, "BLOCK": 512, "BLOCK_D": 1},
    )


# On a GPU


@pytest.mark.gpu
def test_random_shapes_agree():
    def draw(low, high):
        return int(torch.randint(low, high, ()))

    for _ in range(100):
        shape = (draw(1, 4), draw(1, 70), draw(1, 90), draw(1, 90))
        if draw(0, 2):
            size = shape[2] * draw(1, 10), shape[3] * draw(1, 10)
        else:
            size = draw(shape[2], 400), draw(shape[3], 400)
        layout = ("first", "last")[draw(0, 2)]
        x = normal(shape, DTYPES[draw(0, 3)], layout)
        check_forward(upsample_nearest, x, size)
        dy = normal((*shape[:2], *size), x.dtype)
        check_backward(gradient(upsample_nearest), x, dy)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [(2048, 4096), (2047, 4096)], ids=str)
def test_more_than_2_to_the_31_elements(size, layout):
    N, C = 5, 64
    x = torch.empty(
        (N, C, 1024, 2048),
        dtype=torch.float16,
        device="cuda",
        memory_format=LAYOUTS[layout],
    ).normal_()
    y = upsample_nearest(x, size)
    assert y.numel() > 2**31
    dx = torch.ops.warpmap.upsample_nearest_backward(y, 1024, 2048)
    for n in (0, N - 1):
        for c in (0, C - 1):
            image = x[n : n + 1, c : c + 1].contiguous()
            part = y[n : n + 1, c : c + 1].contiguous()
            check_forward(lambda *_, part=part: part, image, size)
            sums = dx[n : n + 1, c : c + 1].contiguous()
            check_backward(lambda *_, sums=sums: sums, image, part)


@pytest.mark.gpu
def test_runs_are_equal_bit_for_bit():
    for size in ((128, 128), (100, 101)):
        x = normal((8, 16, 64, 64), torch.float16)
        dy = normal((8, 16, *size), torch.float16)
        first = gradient(upsample_nearest)(x, dy)
        for _ in range(20):
            assert torch.equal(gradient(upsample_nearest)(x, dy), first)


@pytest.mark.gpu
def test_inductor_compiles_it():
    x = normal((2, 3, 64, 64), torch.float16)
    f = torch.compile(
        lambda x: upsample_nearest(x + 1, (128, 128)) * 2, fullgraph=True
    )
    expected = F.interpolate(x + 1, size=(128, 128), mode="nearest") * 2
    torch.testing.assert_close(f(x), expected)
