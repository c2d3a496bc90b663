"""Tokens come from the right set, at the right rate, by their row's seed."""

import math

import pytest
import torch
from aot import compile_sm90a
from kernel_checks import mutant

from warpmap import DEVICE
from warpmap.kernels.data_movement._philox import philox4x32
from warpmap.kernels.fused import sampling_kernel as module
from warpmap.kernels.fused.sampling_kernel import (
    DTYPES,
    NUM_WARPS,
    PIECE,
    TRIES,
    sample,
    sampling_reference,
)

INF, NAN = float("inf"), float("nan")
FILTERS = [
    {"top_p": 0.6},
    {"top_k": 3},
    {"min_p": 0.2},
    {"top_p": 0.8, "top_k": 5, "min_p": 0.05, "temperature": 0.7},
]


def normal(shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def seeds(M, first=0):
    return torch.arange(first, first + M, device=DEVICE)


def allowed(x, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """Each token asked about each other, in float64. No decision is close."""
    (x,) = x.double()
    p = torch.softmax(x / temperature, dim=0)
    above = x[None, :] > x[:, None]
    mass = (above * p).sum(dim=1)
    assert top_p == 1 or ((mass - top_p).abs() > 1e-5).all()
    assert min_p == 0 or ((p / p.max() - min_p).abs() > 1e-5).all()
    good = (p > 0) & (p >= min_p * p.max()) & (mass < top_p)
    return good if top_k is None else good & (above.sum(dim=1) < top_k)


def judged(x, wrong=module, **numbers):
    """Each token in turn as the only one drawn: does it become the result?"""
    N = x.shape[1]
    scale = math.log2(math.e) / numbers.get("temperature", 1.0)
    rows = x.expand(N, N).contiguous()
    maxima, sums = wrong._pieces(rows, scale)
    top_k, top_p, min_p = (
        numbers.get(name, default)
        for name, default in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    )
    drawn = seeds(N)
    out = wrong._settle(
        rows, seeds(N), maxima, sums, drawn[:, None], scale, top_k, top_p, min_p
    )
    return out == drawn, out


def check_support(x, wrong=module, **numbers):
    good = allowed(x, **numbers)
    kept, tokens = judged(x, wrong, **numbers)
    assert torch.equal(kept, good)
    # what was drawn in place of those refused is allowed, too
    assert good[tokens].all()
    assert torch.equal(
        sampling_reference(x.double(), **numbers)[0] > 0, good.to(x.device)
    )


@pytest.mark.slow
@pytest.mark.sanitize
@pytest.mark.parametrize("numbers", FILTERS, ids=str)
def test_the_support_is_that_of_float64(numbers):
    check_support(normal((1, 17)) * 2, **numbers)


@pytest.mark.parametrize("numbers", [{"top_p": 0.5}, {"top_k": 3}], ids=str)
def test_equal_logits_are_kept_together(numbers):
    x = torch.tensor([[1.0, 2.0, 2.0, 3.0, 1.0, 2.0, -INF, 0.0]], device=DEVICE)
    check_support(x, **numbers)
    assert sampling_reference(x.double(), **numbers)[0].gt(0).sum() == 4


def chi_square(tokens, p):
    """How far counts are from expectation, in standard deviations."""
    n = len(tokens)
    counts = torch.bincount(tokens, minlength=len(p)).double()
    assert counts[p == 0].sum() == 0
    counts, expected = counts[p > 0], n * p[p > 0]
    few = expected < 5
    counts = torch.cat([counts[~few], counts[few].sum()[None]])
    expected = torch.cat([expected[~few], expected[few].sum()[None]])
    good = expected > 0
    freedom = int(good.sum()) - 1
    chi = ((counts - expected)[good] ** 2 / expected[good]).sum().item()
    return (chi - freedom) / math.sqrt(2 * freedom)


def check_counts(op, M, N, **numbers):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, N, generator=generator).to(DEVICE)
    p = sampling_reference(x.double(), **numbers)[0]
    tokens = op(x.expand(M, N).contiguous(), seeds(M), **numbers)
    assert chi_square(tokens, p) < 5


@pytest.mark.slow
@pytest.mark.parametrize("numbers", [{}, {"top_p": 0.7}], ids=str)
def test_counts_follow_the_probabilities(numbers):
    check_counts(sample, 40 if numbers else 120, 6, **numbers)


@pytest.mark.slow
def test_what_is_drawn_after_refusals_follows_them_too():
    # few of the tokens are allowed: not all rows settle for a first draw
    check_counts(sample, 30, 40, top_k=3)


def check_redraws(wrong, rows):
    """All first draws are refused: the next come from several pieces."""
    x = torch.tensor([[3.0, -9, -9, -9, 2.9, 2.8, 2.8, 2.8]], device=DEVICE)
    p = sampling_reference(x.double(), top_k=2)[0]
    x, scale = x.expand(rows, 8).contiguous(), math.log2(math.e)
    maxima, sums = wrong._pieces(x, scale)
    worst = torch.full((rows, 1), 3, device=DEVICE)
    out = wrong._settle(x, seeds(rows), maxima, sums, worst, scale, 2, 1.0, 0.0)
    assert chi_square(out, p) < 5


@pytest.mark.slow
def test_what_is_drawn_from_several_pieces_after_refusals_follows_them(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(module, "PIECE", 4)
    check_redraws(module, 300)
    masses = "left = tl.where(higher, masses, left)"
    wrong = mutant(module, masses, "left = left", tmp_path)
    wrong.PIECE = 4
    with pytest.raises(AssertionError):
        check_redraws(wrong, 300)


def inverse_cdf(x, seed):
    """By the definition, in float64, with words of the other Philox."""
    high, low = divmod(seed % 2**64, 2**32)
    words = philox4x32((0, 0, 0, 0), (low, high))
    u, v = (w / 2**32 // 2**-24 * 2**-24 for w in words[:2])
    p = torch.softmax(x.double(), dim=0)
    pieces = torch.stack([part.sum() for part in p.split(PIECE)]).cumsum(0)
    piece = int((pieces > u * pieces[-1]).int().argmax())
    inside = p.split(PIECE)[piece].cumsum(0)
    return piece * PIECE + int((inside > v * inside[-1]).int().argmax())


@pytest.mark.sanitize
def test_a_row_gets_the_token_of_its_seed_whatever_the_batch():
    x = normal((4, PIECE + 77))
    x[1] = x[0]
    given = torch.tensor([5, 6, 2**62 + 12345, -3], device=DEVICE)
    tokens = sample(x, given)
    right = [
        inverse_cdf(*row) for row in zip(x.cpu(), given.tolist(), strict=True)
    ]
    # a cumulative sum in float32 may miss by a place, where it is close
    assert sum(a == b for a, b in zip(tokens.tolist(), right, strict=True)) >= 3
    order = [2, 0, 3]
    wide = torch.zeros(3, PIECE + 100, device=DEVICE)
    wide[:, : x.shape[1]] = x[order]
    again = sample(wide[:, : x.shape[1]], given[order], top_p=0.9)
    alone = [sample(x[i : i + 1], given[i : i + 1], top_p=0.9) for i in order]
    assert torch.equal(again, torch.cat(alone))


def check_greedy(op):
    x = torch.randint(-3, 4, (4, PIECE + 50), device=DEVICE).float()
    x[3] -= 1e4
    # the first of equals: argmax of a stable sort
    right = torch.sort(x, dim=1, descending=True, stable=True).indices[:, 0]
    assert torch.equal(op(x, seeds(4), temperature=0), right)


def test_temperature_zero_takes_the_first_of_the_largest():
    check_greedy(sample)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_dtype_and_extreme_logits(dtype):
    x = torch.tensor([[-6e4, 6e4, -INF], [-INF, -6e4, -INF]]).to(DEVICE, dtype)
    for numbers in ({}, {"top_p": 0.5}, {"temperature": 0.0}, {"min_p": 1.0}):
        assert sample(x, seeds(2), **numbers).tolist() == [1, 1]
    x = torch.tensor([[0.0, 3.0]], device=DEVICE, dtype=dtype)
    assert sample(x, seeds(1), temperature=1e-5).tolist() == [1]
    # so small that nothing has less above it, but for the largest
    assert sample(x, seeds(1), top_p=1e-45).tolist() == [1]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_a_row_without_probabilities_gives_minus_one():
    bad = [[NAN, 1.0], [INF, 1.0], [-INF, -INF], [0.0, -INF], [1.0, NAN]]
    x = torch.tensor(bad, device=DEVICE)
    for numbers in ({}, {"top_p": 0.5}, {"temperature": 0.0}):
        assert sample(x, seeds(5), **numbers).tolist() == [-1, -1, -1, 0, -1]


def test_no_rows():
    assert sample(normal((0, 4)), seeds(0), top_p=0.5).shape == (0,)


def test_the_operator_is_registered_as_torch_wants_it():
    torch.library.opcheck(
        torch.ops.warpmap.sample.default,
        (normal((2, 5)), seeds(2), 1.0, 2, 1.0, 0.0),
        test_utils=("test_schema", "test_faketensor"),
    )


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s: sample(x[0], s), r"rows \(M, N\), got \(3,\)"),
        (lambda x, s: sample(x.T, s), r"strides \(1, 3\)"),
        (lambda x, s: sample(x[:, :0], s), r"got \(2, 0\)"),
        (lambda x, s: sample(x.double(), s), "got torch.float64"),
        (lambda x, s: sample(x.to("meta"), s), "got meta"),
        (lambda x, s: sample(x, s[:1]), r"seeds \(2,\), int64"),
        (lambda x, s: sample(x, s.int()), "got .*int32"),
        (lambda x, s: sample(x, s, temperature=-1.0), "temperature .* -1"),
        (lambda x, s: sample(x, s, temperature=1e-6), "temperature .* 1e-06"),
        (lambda x, s: sample(x, s, temperature=NAN), "temperature .* nan"),
        (lambda x, s: sample(x, s, top_k=0), "top_k .* at least 1, got 0"),
        (lambda x, s: sample(x, s, top_p=0.0), "top_p .* got 0"),
        (lambda x, s: sample(x, s, top_p=NAN), "top_p .* got nan"),
        (lambda x, s: sample(x, s, min_p=1.5), "min_p .* got 1.5"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(X.to(DEVICE), seeds(2))


# Faults: the checks must see every one


def checks(wrong):
    x = torch.tensor([[1.0, 2.2, 2.2, 3.0, 0.5, -INF, 2.0]], device=DEVICE)
    check_support(x, wrong, top_p=0.6)
    check_support(x, wrong, top_k=3)
    check_support(x, wrong, min_p=0.4, temperature=0.5)
    check_greedy(wrong.sample)
    check_counts(wrong.sample, 60, 5)
    x = normal((2, 2 * PIECE))
    tokens = wrong.sample(x, seeds(2))
    right = [inverse_cdf(row, i) for i, row in enumerate(x.cpu())]
    assert tokens.tolist() == right


FAULTS = {
    "top_p of nothing": (
        "limit = top_p * tl.sum(left, axis=0)",
        "limit = top_p",
    ),
    "top_k and one": ("count < top_k", "count <= top_k"),
    "min_p not asked": ("(value - m) * scale >= log_min_p", "value <= m"),
    "one seed for all": ("tl.load(seeds_ptr + row), tl", "0 * row, tl"),
    "pieces alike": (
        "return maxima, m, sums * tl.exp2",
        "return maxima, m, tl.exp2",
    ),
    "temperature forgotten": (
        "scale = math.log2(math.e) / (temperature or 1.0)",
        "scale = 1.0",
    ),
}


@pytest.mark.slow
def test_the_kernels_pass_the_checks_that_faults_must_fail():
    checks(module)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_caught(fault, tmp_path):
    wrong = mutant(module, *FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        checks(wrong)


# What the compiler makes of the kernels


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["pieces", "draw", "judge", "settle"])
def test_nothing_spills_and_loads_are_wide(name, dtype):
    types = {
        **dict.fromkeys(("x_ptr",), f"*{dtype}:16"),
        **dict.fromkeys(("maxima_ptr", "sums_ptr", "masses_ptr"), "*fp32:16"),
        **dict.fromkeys(("seeds_ptr", "tokens_ptr", "out_ptr"), "*i64:16"),
        **{"counts_ptr": "*i32:16", "top_k": "i32", "stride_xm": "i32:16"},
        **{"N": "i32:16", "pieces": "i32:16"},
        **dict.fromkeys(("scale", "top_p", "log_min_p"), "fp32"),
    }
    constants = {"TRIES": TRIES, "COUNT": True, "GREEDY": False}
    constants |= {"PIECE": PIECE, "PIECES": 32}
    kernel = getattr(module, f"_{name}_kernel")
    names = kernel.arg_names if hasattr(kernel, "arg_names") else None
    names = names or list(kernel.fn.__code__.co_varnames)
    names = names[: kernel.fn.__code__.co_argcount]
    compiled = compile_sm90a(
        f"{module.__name__}:_{name}_kernel",
        {n: types[n] for n in names if n in types},
        {n: constants[n] for n in names if n in constants},
        num_warps=NUM_WARPS,
    )
    assert compiled.spills == compiled.stack == 0
    size = {"fp32": 4, "bf16": 2}[dtype]
    once = PIECE * size // (16 * compiled.threads)
    assert compiled.opcodes["LDG.E.128"] >= once
    # four programs a multiprocessor or more
    assert 4 * compiled.threads * compiled.registers <= 65536


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("numbers", [{}, *FILTERS], ids=str)
def test_many_draws_follow_the_probabilities(numbers):
    check_counts(sample, 200_000, 300, **numbers)


@pytest.mark.gpu
def test_a_large_vocabulary_gives_tokens_of_the_float64_support():
    for dtype in DTYPES:
        for spread in (1, 3, 10):
            x = (normal((64, 128256)) * spread).to(dtype)
            for numbers in FILTERS:
                tokens = sample(x, seeds(64), **numbers)
                p = sampling_reference(x.double(), **numbers)
                assert p.gather(1, tokens[:, None]).gt(0).all()
                for _ in range(5):
                    assert torch.equal(tokens, sample(x, seeds(64), **numbers))
                assert torch.equal(
                    tokens[7:9], sample(x[7:9], seeds(2, 7), **numbers)
                )


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    M, N = 2**31 // 65536 + 2, 65536
    x = torch.zeros(M, N, dtype=torch.bfloat16, device="cuda")
    x[:, 1] = 100
    x[-1] = 0
    x[-1, -1] = 100
    tokens = sample(x, seeds(M), top_p=0.9)
    assert tokens[:-1].eq(1).all()
    assert tokens[-1] == N - 1


@pytest.mark.gpu
def test_inductor_compiles_it():
    x, given = normal((8, 1000)), seeds(8)
    compiled = torch.compile(
        lambda x: sample(x * 2, given, top_p=0.9), fullgraph=True
    )
    assert torch.equal(compiled(x), sample(x * 2, given, top_p=0.9))
