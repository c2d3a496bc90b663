import math
from pathlib import Path

import pytest
import torch

from warpmap import DEVICE
from warpmap.models.positions.rope import (
    rope_table,
    rotate,
    rotate_complex,
    rotate_interleaved,
    to_half_split,
    to_interleaved,
)

DOCS = Path(__file__).parents[3] / "docs/models/positions"
EPS = torch.finfo(torch.float64).eps
POSITIONS = [0, 1, 2, 17, 1000]
ROTATIONS = [rotate, rotate_interleaved, rotate_complex]
# which entries turn together, in words of their own for every layout
PAIRS = {
    rotate: lambda i, D: (i, i + D // 2),
    rotate_interleaved: lambda i, D: (2 * i, 2 * i + 1),
    rotate_complex: lambda i, D: (2 * i, 2 * i + 1),
}


def heads(T, D, H=3, B=2, dtype=torch.float64):
    return torch.randn(B, H, T, D, dtype=dtype, device=DEVICE)


def table(positions, D, base=10000.0, dtype=torch.float64):
    p = torch.as_tensor(positions, dtype=dtype, device=DEVICE)
    return rope_table(p, D, base)


def rotation_matrix(position, D, pair, base=10000.0):
    """One 2 x 2 turn a pair, everything else zero; Python floats."""
    R = torch.zeros(D, D, dtype=torch.float64)
    for i in range(D // 2):
        angle = position / base ** (2 * i / D)
        a, b = pair(i, D)
        R[a, a] = R[b, b] = math.cos(angle)
        R[b, a] = math.sin(angle)
        R[a, b] = -math.sin(angle)
    return R.to(DEVICE)


def by_matrix(x, positions, pair, base=10000.0):
    D = x.shape[-1]
    turns = [rotation_matrix(p, D, pair, base) for p in positions]
    return torch.einsum("tij,bhtj->bhti", torch.stack(turns), x)


def assert_turned(got, want, x, reach):
    """Equal but for rounding.

    An angle is wrong by a few steps of itself, so by ``4 reach EPS`` radians,
    which moves an entry by that times the size of its pair; the products and
    the sum round three times. The largest entry bounds every pair.
    """
    bound = (4 * reach + 8) * EPS * 2 * x.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=bound)


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("D", [2, 6, 64])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_agrees_with_the_block_diagonal_matrix(rotation, D, base):
    x = heads(len(POSITIONS), D)
    got = rotation(x, *table(POSITIONS, D, base))
    want = by_matrix(x, POSITIONS, PAIRS[rotation], base)
    assert_turned(got, want, x, reach=1000)


FAULTS = {
    "turns back": lambda x, c, s: rotate(x, c, -s),
    "the other layout": rotate_interleaved,
    "a pair late": lambda x, c, s: rotate(x, c.roll(1, -1), s.roll(1, -1)),
    "a position late": lambda x, c, s: rotate(x, c.roll(1, 0), s.roll(1, 0)),
    "float32 tables": lambda x, c, s: rotate(x, c.float(), s.float()),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_matrix_catches(fault):
    x = heads(len(POSITIONS), 6)
    wrong = FAULTS[fault](x, *table(POSITIONS, 6))
    want = by_matrix(x, POSITIONS, PAIRS[rotate])
    with pytest.raises(AssertionError):
        assert_turned(wrong, want, x, reach=1000)


def test_agrees_with_the_models_of_transformers():
    from transformers.models.deepseek_v3 import modeling_deepseek_v3
    from transformers.models.gptj import modeling_gptj
    from transformers.models.llama import modeling_llama
    from transformers.models.llama4 import modeling_llama4

    D, T = 8, len(POSITIONS)
    q, k = heads(T, D), heads(T, D)
    cos, sin = table(POSITIONS, D)
    twice = [torch.cat((t, t), dim=-1)[None] for t in (cos, sin)]

    for x, y in zip(
        (q, k), modeling_llama.apply_rotary_pos_emb(q, k, *twice), strict=True
    ):
        torch.testing.assert_close(rotate(x, cos, sin), y)

    late = q.transpose(1, 2)  # (B, T, H, D)
    y = modeling_gptj.apply_rotary_pos_emb(late, sin[None], cos[None])
    want = y.transpose(1, 2)
    torch.testing.assert_close(rotate_interleaved(q, cos, sin), want)

    turns = torch.complex(cos, sin)[None]
    y, _ = modeling_llama4.apply_rotary_emb(late, late, turns)
    want = y.transpose(1, 2)
    torch.testing.assert_close(  # which rounds to float32
        rotate_complex(q, cos, sin), want, rtol=1e-5, atol=1e-5
    )

    # reads neighbours and writes halves: the scores are the same
    y, z = modeling_deepseek_v3.apply_rotary_pos_emb_interleave(q, k, *twice)
    ours = [rotate_interleaved(x, cos, sin) for x in (q, k)]
    torch.testing.assert_close(ours[0] @ ours[1].mT, y @ z.mT)


def scores(q, k, rotation, positions):
    tables = table(positions, q.shape[-1])
    return rotation(q, *tables) @ rotation(k, *tables).mT


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_scores_depend_on_the_distance_alone(rotation):
    q, k = heads(9, 16), heads(9, 16)
    here = scores(q, k, rotation, range(9))
    later = scores(q, k, rotation, range(1000, 1009))
    # 16 products of entries below 5, angles wrong by 4 * 1000 steps
    torch.testing.assert_close(here, later, rtol=0, atol=16 * 25 * 4000 * EPS)

    uneven = scores(q, k, rotation, [*range(8), 1008])
    assert (uneven - here).abs().max() > 0.1


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_keeps_lengths_and_can_be_undone(rotation):
    x = heads(len(POSITIONS), 16)
    cos, sin = table(POSITIONS, 16)
    y = rotation(x, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(rotation(y, cos, -sin), x)
    assert torch.equal(y[:, :, 0], x[:, :, 0])  # position 0


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_positions_may_differ_by_sequence(rotation):
    x = heads(3, 4)
    positions = torch.tensor([[[0, 1, 2]], [[7, 0, 40]]], device=DEVICE)
    cos, sin = rope_table(positions.double(), 4)
    assert cos.shape == (2, 1, 3, 2)
    want = [
        rotation(x[b : b + 1], *table(positions[b, 0], 4)) for b in range(2)
    ]
    assert torch.equal(rotation(x, cos, sin), torch.cat(want))


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_gradients_agree_with_finite_differences(rotation):
    x = heads(2, 4, H=1, B=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rotation(x, *table([3, 9], 4)), x)


def test_float32_tables_are_right_far_out():
    """Angles in float32 are off by up to 0.03 radians at a million."""
    positions = torch.tensor([10**6, 10**6 + 1], device=DEVICE)
    cos, sin = rope_table(positions, 64)
    assert cos.dtype == sin.dtype == torch.float32
    pairs = torch.arange(0, 64, 2, device=DEVICE)
    narrow = positions.float()[:, None] * 10000.0 ** (-pairs / 64)
    worst = 0.0
    for row, p in enumerate(positions.tolist()):
        for i in range(32):
            angle = p / 10000 ** (2 * i / 64)
            # rounding of a number up to 1, and a float64 angle's own error
            bound = 2**-25 + 4e6 * EPS
            assert abs(cos[row, i].item() - math.cos(angle)) <= bound
            assert abs(sin[row, i].item() - math.sin(angle)) <= bound
            wrong = narrow.cos()[row, i].item() - math.cos(angle)
            worst = max(worst, abs(wrong))
    assert worst > 1e-3


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_are_rounded_once(rotation, dtype):
    x = heads(len(POSITIONS), 64, dtype=dtype)
    cos, sin = table(POSITIONS, 64, dtype=torch.float32)
    exact = rotation(x.double(), *table(POSITIONS, 64))
    # one step is eps times the number; rounding once errs by half, and
    # float32 by 2**-22 of the largest entry at most
    half = torch.finfo(dtype).eps / 2 * exact.abs() + 2**-22 * x.abs().max()
    got = rotation(x, cos, sin)
    assert got.dtype == dtype
    assert ((got.double() - exact).abs() <= half).all()

    a, b = x.chunk(2, dim=-1)
    narrow_cos, narrow_sin = cos.to(dtype), sin.to(dtype)
    wrong = torch.cat(
        (a * narrow_cos - b * narrow_sin, a * narrow_sin + b * narrow_cos), -1
    )
    exact = rotate(x.double(), *table(POSITIONS, 64))
    assert not ((wrong.double() - exact).abs() <= half).all()


@pytest.mark.parametrize("D", [2, 6, 16])
def test_reordered_projections_give_the_same_scores(D):
    H, C, T = 3, 10, 5
    x = torch.randn(1, T, C, dtype=torch.float64, device=DEVICE)
    wq, wk = torch.randn(2, H * D, C, dtype=torch.float64, device=DEVICE)
    bias = torch.randn(H * D, dtype=torch.float64, device=DEVICE)

    def project(w, b):
        return (x @ w.mT + b).view(1, T, H, D).transpose(1, 2)

    q, k = project(wq, bias), project(wk, 2 * bias)
    want = scores(q, k, rotate_interleaved, POSITIONS)
    q = project(to_half_split(wq, D), to_half_split(bias, D))
    k = project(to_half_split(wk, D), to_half_split(2 * bias, D))
    torch.testing.assert_close(scores(q, k, rotate, POSITIONS), want)

    wrong = [
        lambda w: w,
        lambda w: to_interleaved(w, D),
        lambda w: to_half_split(w, H * D),
    ]
    for reorder in wrong if D == 6 else ():
        q, k = project(reorder(wq), bias), project(reorder(wk), 2 * bias)
        got = scores(q, k, rotate, POSITIONS)
        assert (got - want).abs().max() > 1e-3


@pytest.mark.parametrize("D", [2, 6, 16])
def test_rows_go_where_the_pairs_say(D):
    weight = torch.arange(2 * D * 3).view(2 * D, 3)
    got = to_half_split(weight, D)
    for head in range(2):
        for i in range(D // 2):
            for of, at in zip(
                PAIRS[rotate_interleaved](i, D),
                PAIRS[rotate](i, D),
                strict=True,
            ):
                assert torch.equal(got[head * D + at], weight[head * D + of])
    assert torch.equal(to_interleaved(got, D), weight)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rope_table(torch.arange(2), 3), "head_size .* got 3"),
        (lambda: rope_table(torch.arange(2), 4, base=0), "base .* got 0"),
        (lambda: to_half_split(torch.zeros(6), 4), r"heads of 4, got \(6,\)"),
        (lambda: to_interleaved(torch.zeros(6), 3), "head_size .* got 3"),
    ],
)
def test_bad_numbers_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize(
    ("x", "cos", "says"),
    [
        ((1, 2, 3, 5), (3, 2), r"even D, got \(1, 2, 3, 5\)"),
        ((1, 2, 3, 4), (3, 4), r"cos \(3, 2\) or .* got \(3, 4\)"),
        ((2, 2, 3, 4), (2, 3, 2), r"\(2, 1, 3, 2\), got \(2, 3, 2\)"),
    ],
)
def test_tables_that_do_not_fit_are_named(rotation, x, cos, says):
    with pytest.raises(ValueError, match=says):
        rotation(torch.zeros(x), torch.zeros(cos), torch.zeros(cos))


def test_page_says_after_how_many_tokens_a_pair_is_round():
    page = (DOCS / "rope.md").read_text("utf-8").splitlines()
    for base in (10_000, 500_000):
        row = next(r for r in page if r.startswith(f"| {base:,} |"))
        _, *shown = (cell.strip() for cell in row.strip("|").split("|"))
        turns = [2 * math.pi * base ** (2 * i / 128) for i in (0, 32, 63)]
        short, *rest = turns
        assert shown == [f"{short:.1f}", *(f"{t:,.0f}" for t in rest)]
