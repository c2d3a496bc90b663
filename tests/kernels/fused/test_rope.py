"""Rotary embedding turns pairs as complex numbers turn, forward and back."""

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import WRONG, assert_accurate, mutant
from torch.utils._python_dispatch import TorchDispatchMode

from warpmap import DEVICE
from warpmap.kernels.fused import rope as module
from warpmap.kernels.fused.rope import (
    DTYPES,
    _tile,
    interleave,
    rope,
    rope_cache,
    rope_reference,
)

S = 50  # rows of the tables
LAYOUTS = [False, True]  # half-split, interleaved


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def heads(B=2, T=5, H=3, Hkv=1, D=16, dtype=torch.float32):
    return normal((B, T, H, D), dtype), normal((B, T, Hkv, D), dtype)


def anywhere(B, T, dtype=torch.int64):
    return torch.randint(S, (B, T), dtype=dtype, device=DEVICE)


def turned(x, cos, sin, positions, interleaved):
    """In float64: complex numbers times complex numbers of length 1.

    Also the sum of what a sum has of magnitudes, before it cancels.
    """
    B, T, H, _ = x.shape
    R, x = 2 * cos.shape[1], x.double()
    if positions is None:
        positions = torch.arange(T, device=x.device)
    turn = torch.complex(cos.double(), sin.double())
    turn = turn[positions.expand(B, T)][:, :, None]
    if interleaved:
        z = torch.view_as_complex(
            x[..., :R].reshape(B, T, H, R // 2, 2).contiguous()
        )
    else:
        z = torch.complex(x[..., : R // 2], x[..., R // 2 : R])

    def whole(z):
        if interleaved:
            parts = torch.view_as_real(z).flatten(-2)
        else:
            parts = torch.cat((z.real, z.imag), dim=-1)
        return torch.cat((parts, x[..., R:]), dim=-1)

    return whole(z * turn), whole(torch.complex(z.abs(), z.abs())).abs()


def check(op, q, k, cos, sin, positions=None, interleaved=False):
    """Three roundings in float32: two products and their sum."""
    results = op(q, k, cos, sin, positions, interleaved)
    for x, y in zip((q, k), results, strict=True):
        exact, scale = turned(x, cos, sin, positions, interleaved)
        assert_accurate(
            y,
            exact,
            x.dtype,
            scale=torch.maximum(scale, exact.abs()),
            steps=3,
            framework=rope_reference(x, cos, sin, positions, interleaved),
        )
        R = 2 * cos.shape[1]
        assert torch.equal(y[..., R:], x[..., R:])


def gradient(op):
    """A function like ``rope`` whose results are gradients of q and k."""

    def backward(dyq, dyk, cos, sin, *rest):
        leaves = [t.new_zeros(t.shape, requires_grad=True) for t in (dyq, dyk)]
        results = op(*leaves, cos, sin, *rest)
        return torch.autograd.grad(results, leaves, (dyq, dyk))

    return backward


def check_backward(op, dyq, dyk, cos, sin, *rest):
    """The transpose of a rotation is the rotation back: sines change sign."""

    def as_if_forward(q, k, cos, sin, *rest):
        return gradient(op)(q, k, cos, -sin, *rest)

    check(as_if_forward, dyq, dyk, cos, -sin, *rest)


def test_reference_turns_by_hand():
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 1, 1, 5)
    # the first pair turns by 90 degrees, the second not, the rest stays
    half_split = rope_reference(x, cos, sin).flatten().tolist()
    assert half_split == [-3, 2, 1, 4, 5]
    by_neighbours = rope_reference(x, cos, sin, None, True).flatten().tolist()
    assert by_neighbours == [-2, 1, 3, 4, 5]


def test_reference_moves_52_bytes_an_element_of_bf16():
    moved = []

    class Meter(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            inputs = args[0] if isinstance(args[0], list | tuple) else args
            tensors = [t for t in (*inputs, out) if isinstance(t, torch.Tensor)]
            memory = [t.untyped_storage().data_ptr() for t in tensors]
            if memory[-1] not in memory[:-1]:  # a view moves nothing
                # heads have four dimensions, the tables have fewer
                moved.append(sum(t.nbytes for t in tensors if t.ndim == 4))
            return out

    cos, sin = rope_cache(4, 16, device="cpu")
    x = torch.randn(2, 4, 3, 16).bfloat16()
    with Meter():
        rope_reference(x, cos, sin)
    assert sum(moved) == 52 * x.numel()


def test_tables_hold_what_float64_says_at_far_positions():
    cos, sin = rope_cache(2**17, 8, base=500000.0)
    for position in (0, 1, 4096, 2**17 - 1):
        for i in range(4):
            angle = torch.tensor(
                position * 500000.0 ** (-i / 4), dtype=torch.float64
            )
            for table, exact in ((cos, angle.cos()), (sin, angle.sin())):
                assert abs(table[position, i].item() - exact.item()) <= 2**-24


def test_bf16_angles_are_wrong_at_far_positions():
    positions = torch.tensor([100, 10000])
    turns = 10000 ** (-torch.arange(0, 64, 2) / 64)
    exact = torch.outer(positions.double(), turns.double())
    rounded = torch.outer(positions.bfloat16(), turns.bfloat16())
    near, far = (rounded.double() - exact).abs().amax(dim=1).tolist()
    assert 0.05 < near < 1
    assert far > 10  # more than a full turn
    # two tokens at one angle
    assert torch.tensor(4096).bfloat16() == torch.tensor(4097).bfloat16()


# all of a head turns, a part of it; powers of two and others; as many heads
SHAPES = [
    {"D": 16, "R": 16},
    {"D": 20, "R": 6, "H": 6, "Hkv": 2},
    {"D": 48, "R": 48, "H": 2, "Hkv": 2},
    {"D": 3, "R": 2, "B": 1, "T": 1, "H": 1},
]


@pytest.mark.parametrize("interleaved", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_complex_numbers(shape, interleaved):
    shape = dict(shape)
    cos, sin = rope_cache(S, shape.pop("R"))
    q, k = heads(**shape)
    B, T = q.shape[:2]
    for positions in (None, anywhere(B, T)):
        check(rope, q, k, cos, sin, positions, interleaved)
    check_backward(rope, q, k, cos, sin, positions, interleaved)


@pytest.mark.parametrize("interleaved", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_rounded_once(dtype, interleaved):
    args = *heads(T=3, D=20, dtype=dtype), *rope_cache(S, 16)
    check(rope, *args, None, interleaved)
    check_backward(rope, *args, None, interleaved)


def test_positions_may_be_shared_by_the_batch_and_of_either_integer():
    q, k = heads()
    cos, sin = rope_cache(S, 16)
    for dtype in (torch.int32, torch.int64):
        check(rope, q, k, cos, sin, anywhere(1, 5, dtype)[0])
        check(rope, q, k, cos, sin, anywhere(5, 2, dtype).T)


def fused(dtype=torch.float32):
    """Queries and keys as views of what one projection wrote."""
    qkv = normal((2, 2, 4 + 2 + 2, 24), dtype)
    return qkv[:, :, :4], qkv[:, :, 4:6]


def heads_first():
    """As attention has them: heads before tokens."""
    q, k = normal((2, 4, 2, 24)), normal((2, 2, 2, 24))
    return q.transpose(1, 2), k.transpose(1, 2)


@pytest.mark.parametrize("interleaved", LAYOUTS)
def test_heads_may_lie_anywhere(interleaved):
    cos, sin = rope_cache(S, 24)
    for q, k in (fused(), heads_first()):
        check(rope, q, k, cos, sin, anywhere(2, 2), interleaved)
        check_backward(rope, q, k, cos, sin, None, interleaved)
    # gradients in any layout at all
    dyq, dyk = (normal((2, h, 24, 2)).permute(0, 3, 1, 2) for h in (4, 2))
    check_backward(rope, dyq, dyk, cos, sin, None, interleaved)


def test_a_permutation_leads_from_one_layout_to_the_other():
    q, k = heads(D=20)
    cos, sin = rope_cache(S, 12)
    order = [*interleave(12), *range(12, 20)]
    half_split = rope(q, k, cos, sin)
    neighbours = rope(q[..., order], k[..., order], cos, sin, None, True)
    for a, b in zip(half_split, neighbours, strict=True):
        assert torch.equal(a[..., order], b)


def test_turning_back_gives_what_was_there():
    q, k = heads()
    cos, sin = rope_cache(S, 16)
    for interleaved in LAYOUTS:
        turned = rope(q, k, cos, sin, None, interleaved)
        back = rope(*turned, cos, -sin, None, interleaved)
        torch.testing.assert_close(back, (q, k))


def test_scores_depend_on_the_distance_alone():
    q, k = heads(B=1, T=2, H=1, D=64)
    cos, sin = rope_cache(100_004, 64)

    def score(first):
        positions = torch.tensor([first, first + 3], device=DEVICE)
        a, b = rope(q, k, cos, sin, positions)
        return (a[0, 1, 0] * b[0, 0, 0]).sum()

    for first in (1, 1000, 100_000):
        torch.testing.assert_close(score(first), score(0), atol=1e-4, rtol=0)


def test_one_result_may_go_unused():
    cos, sin = rope_cache(S, 16)
    q, k = (t.requires_grad_() for t in heads())
    rope(q, k, cos, sin)[0].sum().backward()
    expected = gradient(rope)(torch.ones_like(q), torch.zeros_like(k), cos, sin)
    assert torch.equal(q.grad, expected[0])
    assert k.grad is None or not k.grad.any()


def test_second_derivatives_are_those_of_a_linear_function():
    cos, sin = rope_cache(S, 16)
    q, k = (t.requires_grad_() for t in heads(B=1, T=2))
    y, _ = rope(q, k, cos, sin)
    (dq,) = torch.autograd.grad((y**2).sum(), q, create_graph=True)
    torch.testing.assert_close(dq, 2 * q)  # turned forth and back
    (ddq,) = torch.autograd.grad(dq.sum(), q)
    torch.testing.assert_close(ddq, torch.full_like(q, 2))


def test_a_position_beyond_the_tables_makes_what_turns_nan():
    cos, sin = rope_cache(S, 16)
    positions = torch.tensor([0, S, -1, S - 1, 2**33], device=DEVICE)
    half = rope(*heads(B=1), *rope_cache(S, 8), positions)[0]
    assert half[:, 1, :, :8].isnan().all()  # what turns, and only that
    assert not half[..., 8:].isnan().any()
    for x in rope(*heads(B=1), cos, sin, positions):
        token_is_nan = x.isnan().all(dim=-1).all(dim=-1)[0].tolist()
        assert token_is_nan == [False, True, True, False, True]
        assert not x[:, [0, 3]].isnan().any()


@pytest.mark.parametrize("shape", [{"B": 0}, {"T": 0}, {"Hkv": 0}], ids=str)
def test_empty(shape):
    cos, sin = rope_cache(S, 16)
    q, k = (t.requires_grad_() for t in heads(**shape))
    a, b = rope(q, k, cos, sin)
    (a.sum() + b.sum()).backward()
    assert (a.shape, b.shape) == (q.shape, k.shape)
    assert (q.grad.shape, k.grad.shape) == (q.shape, k.shape)


TABLES = dict(zip(("cos", "sin"), rope_cache(S, 16), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(5, 3, 16)}, r"q \(B, T, H, D\).*\(5, 3, 16\)"),
        ({"k": torch.zeros(2, 5, 1, 8)}, r"\(2, 5, 3, 16\) and \(2, 5, 1, 8\)"),
        ({"q": torch.zeros(2, 5, 3, 16).double()}, "float64"),
        ({"k": torch.zeros(2, 5, 1, 16).half()}, "float32 and torch.float16"),
        ({"q": torch.zeros(2, 5, 16, 3).transpose(2, 3)}, "heads of q"),
        ({"cos": torch.zeros(S, 7)}, r"got \(50, 7\) and \(50, 8\)"),
        (dict.fromkeys(("cos", "sin"), torch.zeros(S, 9)), "from 2 to 16"),
        (dict.fromkeys(("cos", "sin"), torch.zeros(4, 8)), "5 rows of cos"),
        ({"sin": torch.zeros(S, 8).bfloat16()}, "sin .*float32.*bfloat16"),
        ({"cos": torch.zeros(8, S).T}, r"cos contiguous.*\(1, 50\)"),
        ({"cos": torch.zeros(S, 8, requires_grad=True)}, "detach"),
        ({"positions": torch.zeros(3).int()}, r"\(5,\) or \(2, 5\).*\(3,\)"),
        ({"positions": torch.zeros(5)}, "int32 or int64.*float32"),
        ({"sin": torch.zeros(S, 8, device="meta")}, "sin on.*meta"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    q, k = heads()
    given = {"q": q, "k": k, **TABLES, "positions": None, **change}
    for name, t in given.items():
        if t is not None and t.device.type != "meta" and t.is_leaf:
            given[name] = t.to(DEVICE)
    if "detach" in message:
        given["cos"] = given["cos"].detach().requires_grad_()
    with pytest.raises(ValueError, match=message):
        rope(**given)


@pytest.mark.parametrize("R", [0, 3, -2])
def test_an_odd_number_of_entries_has_no_pairs(R):
    with pytest.raises(ValueError, match=f"R must be even.*{R}"):
        rope_cache(4, R)


def test_operator_is_registered_as_torch_wants_it():
    q, k = (t.requires_grad_() for t in heads())
    op = torch.ops.warpmap.rope.default
    args = (q, k, *rope_cache(S, 16))
    torch.library.opcheck(op, (*args, anywhere(2, 5), True, False))


@pytest.mark.slow
def test_compiles_with_its_gradient_in_one_graph():
    def loss(q, k, cos, sin):
        a, b = rope(q * 2, k, cos, sin)
        return (a * b).square().sum(), b

    args = *heads(), *rope_cache(S, 16)
    fast = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (loss, fast):
        q, k = (t.clone().requires_grad_() for t in args[:2])
        grads.append(torch.autograd.grad(f(q, k, *args[2:])[0], (q, k)))
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.sanitize
def test_every_kernel_runs_at_its_edges():
    for D, R in ((128, 128), (80, 20)):
        for interleaved in LAYOUTS:
            q, k = heads(1, 3, 5, 3, D, torch.bfloat16)
            args = q, k, *rope_cache(S, R), anywhere(1, 3), interleaved
            check(rope, *args)
            check_backward(rope, *args)


# Faults: the checks above must see every one


def all_checks(op):
    for interleaved in LAYOUTS:
        q, k = heads(T=2, H=3, Hkv=2, D=20)
        rest = *rope_cache(S, 6), anywhere(2, 2), interleaved
        check(op, q, k, *rest)
        check_backward(op, q, k, *rest)
    check(op, *fused(), *rope_cache(S, 24), anywhere(2, 2))


def test_the_kernel_passes_the_checks_that_faults_must_fail():
    all_checks(rope)


# more columns are no mistake here: a head's rest is copied
@pytest.mark.parametrize("fault", sorted(WRONG.keys() - {"tail unmasked"}))
@pytest.mark.parametrize("which", [0, 1], ids="qk")
def test_a_wrong_result_is_caught(fault, which):
    def wrong(q, k, *rest):
        results = list(rope(q, k, *rest))

        def one(x):
            qk = [t.to(x.dtype) for t in (q, k)]
            qk[which] = x
            return rope(*qk, *rest)[which]

        results[which] = WRONG[fault](one)((q, k)[which])
        return results

    q, k = heads(T=2)
    with pytest.raises(AssertionError):
        check(wrong, q, k, *rope_cache(S, 16), anywhere(2, 2))


FAULTS = {
    "turned the other way": (
        "turned_a = a * cos - b",
        "turned_a = a * cos + b",
    ),
    "sine where cosine belongs": ("turned_b = b * cos", "turned_b = b * sin"),
    "forward again in backward": ("not inverse", "inverse"),
    "layout forgotten in backward": (
        "ctx.turn = interleaved,",
        "ctx.turn = False,",
    ),
    "positions left out": ("position * (R // 2)", "t * (R // 2)"),
    "positions of the first sequence": ("b * stride_pb", "0 * stride_pb"),
    "one position too far": (
        "tl.load(p_ptr).to(tl.int64)",
        "tl.load(p_ptr).to(tl.int64) + 1",
    ),
    "rest not copied": ("rest, k_rest,", "rest, 0 * k_rest,"),
    "rest one off": ("k_ptrs + rest, k_mask", "k_ptrs + rest - 1, k_mask"),
    "pairs one off": ("cols + R // 2, mask).to", "cols + R // 2 - 1, mask).to"),
    "tables in float16": (
        "_store_turned(yq_ptrs, q_a, q_b, cos,",
        "_store_turned(yq_ptrs, q_a, q_b, cos.to(tl.float16),",
    ),
    "strides of keys taken from queries": ("t * stride_kt", "t * stride_qt"),
    "last head left out": (
        "heads < H, kv_heads < Hkv",
        "heads < H - 1, kv_heads < Hkv",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_in_the_kernel_is_caught(fault, tmp_path):
    wrong = mutant(module, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        all_checks(wrong.rope)


# What the compiler makes of it


def compiled(H, Hkv, D, R, dtype, interleaved):
    blocks = _tile(H, Hkv, D, R)
    num_warps = blocks.pop("num_warps")
    names = [f"stride_{x}{d}" for x in "qk" for d in "bth"]
    return compile_sm90a(
        f"{module.__name__}:_rope_kernel",
        {
            **{f"{x}_ptr": f"*{dtype}:16" for x in ("q", "k", "yq", "yk")},
            **{f"{x}_ptr": "*fp32:16" for x in ("cos", "sin")},
            "positions_ptr": "*i64:16",
            **dict.fromkeys(names, "i32:16"),
            **{"stride_pb": "i32", "stride_pt": "i32", "T": "i32", "S": "i32"},
        },
        {
            **{"H": H, "Hkv": Hkv, "D": D, "R": R, **blocks},
            **{"INTERLEAVED": interleaved, "INVERSE": False},
        },
        num_warps=num_warps,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("H", "Hkv", "D", "R", "dtype", "interleaved"),
    [
        (32, 8, 128, 128, "bf16", False),
        (32, 8, 128, 128, "bf16", True),
        (64, 8, 128, 128, "fp32", False),
        (32, 32, 80, 32, "bf16", False),
    ],
)
def test_pairs_stay_in_registers_and_bytes_move_once(
    H, Hkv, D, R, dtype, interleaved
):
    kernel = compiled(H, Hkv, D, R, dtype, interleaved)
    assert kernel.spills == kernel.stack == 0
    # no pair crosses threads: no shared memory, no barrier
    assert kernel.shared == 0
    assert not any(op.startswith("BAR") for op in kernel.opcodes)
    # an element is stored once, and queries 16 bytes at a time
    itemsize = {"fp32": 4, "bf16": 2}[dtype]
    stored = {
        op: 16 if "128" in op else 8 if "64" in op else 4
        for op in kernel.opcodes
        if op.startswith("STG")
    }
    by_all = sum(kernel.opcodes[op] * n for op, n in stored.items())
    wide = kernel.opcodes["STG.E.128"] * 16
    rest = _tile(H, Hkv, D, R)["REST"] if R < D else 0
    columns = 2 * _tile(H, Hkv, D, R)["HALF"] + rest
    assert by_all * kernel.threads == (H + Hkv) * columns * itemsize
    assert wide * kernel.threads >= H * columns * itemsize


# On a GPU


@pytest.mark.gpu
def test_random_shapes_agree_with_complex_numbers():
    cos, sin = rope_cache(5000, 256)
    for _ in range(40):
        B, T, H, Hkv = (int(torch.randint(1, n, ())) for n in (5, 70, 40, 12))
        D = int(torch.randint(2, 257, ()))
        half = int(torch.randint(1, D // 2 + 1, ()))
        dtype = DTYPES[int(torch.randint(3, ()))]
        gap = int(torch.randint(9, ()))
        x = normal((B, T, H + Hkv, D + gap), dtype)[..., gap:]
        q, k = x[:, :, :H], x[:, :, H:]
        tables = cos[:, :half].contiguous(), sin[:, :half].contiguous()
        positions = torch.randint(5000, (B, T), device=DEVICE)
        interleaved = bool(torch.randint(2, ()))
        check(rope, q, k, *tables, positions, interleaved)
        check_backward(rope, q, k, *tables, positions, interleaved)


@pytest.mark.gpu
@pytest.mark.parametrize("heads_before_tokens", [False, True])
def test_more_than_2_to_the_31_elements(heads_before_tokens):
    H, D = 32, 128
    T = 2**31 // (H * D) + 3
    shape = (1, H, T, D) if heads_before_tokens else (1, T, H, D)
    q = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    q = q.transpose(1, 2) if heads_before_tokens else q
    k = normal((1, T, 1, D), torch.bfloat16)
    cos, sin = rope_cache(T, D)
    y, z = rope(q, k, cos, sin)
    ends = torch.tensor([0, 1, T // 2, T - 2, T - 1], device="cuda")
    check(
        lambda *_: (y[:, ends], z[:, ends]),
        *(q[:, ends], k[:, ends], cos, sin, ends),
    )


@pytest.mark.gpu
def test_runs_are_equal_bit_for_bit():
    q, k = heads(4, 1000, 32, 8, 128, torch.bfloat16)
    cos, sin = rope_cache(1000, 128)
    first = rope(q, k, cos, sin)
    for _ in range(20):
        again = rope(q, k, cos, sin)
        assert all(map(torch.equal, first, again))


@pytest.mark.gpu
def test_inductor_compiles_it():
    q, k = heads(2, 64, 8, 2, 128, torch.bfloat16)
    cos, sin = rope_cache(64, 128)

    def f(q, k):
        return rope(q + 1, k * 2, cos, sin)[0] * 2

    fast = torch.compile(f, fullgraph=True)
    torch.testing.assert_close(fast(q, k), f(q, k))


@pytest.mark.multi_gpu
def test_runs_on_the_gpu_that_holds_the_heads():
    q, k = (t.to("cuda:1") for t in heads())
    check(rope, q, k, *rope_cache(S, 16, device="cuda:1"))
