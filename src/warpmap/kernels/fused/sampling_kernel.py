"""Sampling a token without sorting: draw first, then ask if it was allowed.

Top-k, top-p and min-p keep all tokens above some logit. Whether a token is one
of them takes a sum over the row, no order. So tokens are drawn from the whole
row, by inverse CDF, and judged; the first that is allowed is the result. Where
none is, the next is drawn from what lies above the best of those refused.

    traffic  the logits twice; once without filters or at temperature 0
    ties     logits equal to the last one kept are kept, too
    seeds    one a row: its token depends on nothing else in the batch

Reference: Ye et al., 2025, https://arxiv.org/abs/2501.01005, whose sampling
kernels draw and refuse as well
"""

import math

import torch
from torch import Tensor

from warpmap import DEVICE
from warpmap.kernels import tl, triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PIECE = 4096  # of a row, for one program; the sums' last bits depend on it
NUM_WARPS = 4
TRIES = 4  # tokens drawn and judged at once
MIN_TEMPERATURE = 1e-5


def sampling_reference(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """The probabilities to draw from, by sorting.

    Args:
        logits: ``(M, N)``, float32 or float64.
        temperature: What logits are divided by, above 0.
        top_k: Tokens to keep.
        top_p: Keep the likeliest until they have this share.
        min_p: Keep what has this share of the likeliest's probability.

    Returns:
        ``(M, N)``, same dtype; each row sums to 1.

    Examples:
        >>> x = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> sampling_reference(x, top_p=0.6)[0].tolist()
        [0.625, 0.375, 0.0]
    """
    p = torch.softmax(logits / temperature, dim=1)
    ordered = p.sort(dim=1, descending=True).values
    before = ordered.cumsum(dim=1) - ordered
    keep = (before < top_p) & (ordered >= min_p * ordered[:, :1])
    if top_k is not None:
        keep[:, top_k:] = False
    last = ordered.masked_fill(~keep, 2.0).amin(dim=1, keepdim=True)
    p = p.masked_fill(p < last, 0.0)
    return p / p.sum(dim=1, keepdim=True)


@triton.jit
def _uniforms(seed, counter):
    """Two random numbers from 0 to below 1, in steps of 2^-24."""
    a, b, _, _ = tl.randint4x(seed, counter)
    a = a.to(tl.uint32, bitcast=True) >> 8
    b = b.to(tl.uint32, bitcast=True) >> 8
    return a.to(tl.float32) * 2**-24, b.to(tl.float32) * 2**-24


@triton.jit
def _pick(weights, u):
    """The place where the running sum passes the share ``u`` of the sum."""
    places = tl.arange(0, weights.shape[0])
    running = tl.cumsum(weights, axis=0)
    passed = (weights > 0) & (running > u * tl.max(running, axis=0))
    place = tl.min(tl.where(passed, places, weights.shape[0]), axis=0)
    # a running sum is rounded: should nothing pass, take the last
    last = tl.max(tl.where(weights > 0, places, 0), axis=0)
    return tl.minimum(place, last)


@triton.jit
def _load(x_ptr, piece, N, PIECE: tl.constexpr):
    """One piece of a row; there is nothing past its end."""
    cols = piece * PIECE + tl.arange(0, PIECE)
    x = tl.load(x_ptr + cols, cols < N, other=-float("inf"))
    return x.to(tl.float32)


@triton.jit
def _pieces_kernel(
    x_ptr,
    maxima_ptr,
    sums_ptr,
    stride_xm,
    N,
    pieces,
    scale,
    PIECE: tl.constexpr,
):
    # 64-bit: row * stride overflows 32 bits on a large matrix
    row = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    x = _load(x_ptr + row * stride_xm, piece, N, PIECE)
    m = tl.max(x, axis=0)
    # of a piece with nothing but -inf, the sum is 0 and not nan
    base = tl.where(m == -float("inf"), 0.0, m)
    tl.store(maxima_ptr + tl.program_id(0), m)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(tl.exp2((x - base) * scale)))


@triton.jit
def _row(maxima_ptr, sums_ptr, row, pieces, scale, PIECES: tl.constexpr):
    """Maxima and weights of a row's pieces, weights beside the largest."""
    j = tl.arange(0, PIECES)
    place = row * pieces + j
    maxima = tl.load(maxima_ptr + place, j < pieces, other=-float("inf"))
    sums = tl.load(sums_ptr + place, j < pieces, other=0.0)
    m = tl.max(maxima, axis=0)
    return maxima, m, sums * tl.exp2((maxima - m) * scale)


@triton.jit
def _draw_kernel(
    x_ptr,
    maxima_ptr,
    sums_ptr,
    seeds_ptr,
    tokens_ptr,
    stride_xm,
    N,
    pieces,
    scale,
    TRIES: tl.constexpr,
    GREEDY: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    row = (tl.program_id(0) // TRIES).to(tl.int64)
    u, v = _uniforms(tl.load(seeds_ptr + row), tl.program_id(0) % TRIES)
    maxima, m, weights = _row(maxima_ptr, sums_ptr, row, pieces, scale, PIECES)
    total = tl.sum(weights, axis=0)

    # first a piece, then an element of it
    if GREEDY:
        u, v = 0.0, 0.0
        weights = (maxima == m).to(tl.float32)
    piece = _pick(weights, u)
    x = _load(x_ptr + row * stride_xm, piece, N, PIECE)
    weights = tl.exp2((x - m) * scale)
    if GREEDY:
        weights = (x == m).to(tl.float32)
    token = piece * PIECE + _pick(weights, v)
    # nan or inf made the sum nan; of nothing but -inf it is nan or 0
    token = tl.where((total > 0) & (total < float("inf")), token, -1)
    tl.store(tokens_ptr + tl.program_id(0), token)


@triton.jit
def _judge_kernel(
    x_ptr,
    maxima_ptr,
    tokens_ptr,
    masses_ptr,
    counts_ptr,
    stride_xm,
    N,
    pieces,
    scale,
    TRIES: tl.constexpr,
    COUNT: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    row = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    j = tl.arange(0, PIECES)
    m = tl.max(
        tl.load(maxima_ptr + row * pieces + j, j < pieces, other=-float("inf")),
        axis=0,
    )
    x = _load(x_ptr + row * stride_xm, piece, N, PIECE)
    weights = tl.exp2((x - m) * scale)
    for i in tl.static_range(TRIES):
        token = tl.load(tokens_ptr + row * TRIES + i)
        pivot = tl.load(x_ptr + row * stride_xm + tl.maximum(token, 0))
        above = x > pivot.to(tl.float32)
        place = (row * TRIES + i) * pieces + piece
        tl.store(masses_ptr + place, tl.sum(tl.where(above, weights, 0.0)))
        if COUNT:
            tl.store(counts_ptr + place, tl.sum(above.to(tl.int32)))


@triton.jit
def _settle_kernel(
    x_ptr,
    maxima_ptr,
    sums_ptr,
    seeds_ptr,
    tokens_ptr,
    masses_ptr,
    counts_ptr,
    out_ptr,
    stride_xm,
    N,
    pieces,
    scale,
    top_k,
    top_p,
    log_min_p,
    TRIES: tl.constexpr,
    COUNT: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_xm
    j = tl.arange(0, PIECES)
    _, m, left = _row(maxima_ptr, sums_ptr, row, pieces, scale, PIECES)
    limit = top_p * tl.sum(left, axis=0)
    seed = tl.load(seeds_ptr + row)
    pivot = tl.full([], -float("inf"), tl.float32)

    token = tl.load(tokens_ptr + row * TRIES)
    attempt = 0
    done = token < 0
    while not done:
        count = tl.full([], 0, tl.int32)
        if attempt < TRIES:
            # drawn and judged already
            place = row * TRIES + attempt
            token = tl.load(tokens_ptr + place)
            value = tl.load(x_ptr + token).to(tl.float32)
            place = place * pieces + j
            masses = tl.load(masses_ptr + place, j < pieces, other=0.0)
            if COUNT:
                count = tl.sum(tl.load(counts_ptr + place, j < pieces, other=0))
        else:
            # from what is left above the pivot
            u, v = _uniforms(seed, attempt)
            piece = _pick(left, u)
            x = _load(x_ptr, piece, N, PIECE)
            weights = tl.where(x > pivot, tl.exp2((x - m) * scale), 0.0)
            token = (piece * PIECE + _pick(weights, v)).to(tl.int64)
            value = tl.load(x_ptr + token).to(tl.float32)
            masses = tl.zeros([PIECES], tl.float32)
            for p in range(pieces):
                if tl.load(maxima_ptr + row * pieces + p) > value:
                    x = _load(x_ptr, p, N, PIECE)
                    weights = tl.exp2((x - m) * scale)
                    mass = tl.sum(tl.where(x > value, weights, 0.0))
                    masses = tl.where(j == p, mass, masses)
                    count += tl.sum((x > value).to(tl.int32))

        done = tl.sum(masses, axis=0) < limit
        done = done & ((value - m) * scale >= log_min_p)
        if COUNT:
            done = done & (count < top_k)
        done = done | (value >= m)  # whatever the rounding
        # refused, and so is all that is no larger
        higher = value > pivot
        left = tl.where(higher, masses, left)
        pivot = tl.where(higher, value, pivot)
        attempt += 1
    tl.store(out_ptr + row, token)


def _settle(
    x: Tensor,
    seeds: Tensor,
    maxima: Tensor,
    sums: Tensor,
    tokens: Tensor,
    scale: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Tensor:
    """The first allowed of the tokens, ``(M, tries)``, or one drawn anew."""
    (M, N), pieces, tries = x.shape, maxima.shape[1], tokens.shape[1]
    masses = x.new_empty(M, tries, pieces, dtype=torch.float32)
    counts = x.new_empty(M, tries, pieces, dtype=torch.int32)
    out = torch.empty_like(seeds)
    sizes = {
        "TRIES": tries,
        "COUNT": top_k > 0,
        "PIECE": PIECE,
        "PIECES": triton.next_power_of_2(pieces),
        "num_warps": NUM_WARPS,
    }
    shape = x.stride(0), N, pieces, scale
    _judge_kernel[(M * pieces,)](
        x, maxima, tokens, masses, counts, *shape, **sizes
    )
    _settle_kernel[(M,)](
        x,
        maxima,
        sums,
        seeds,
        tokens,
        masses,
        counts,
        out,
        *shape,
        top_k,
        top_p if top_p < 1 else math.inf,  # all, whatever the rounding
        math.log2(min_p) if min_p > 0 else -math.inf,
        **sizes,
    )
    return out


def _pieces(x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Maximum and sum of weights of each piece, ``(M, pieces)`` both."""
    M, N = x.shape
    pieces = triton.cdiv(N, PIECE)
    maxima, sums = x.new_empty(2, M, pieces, dtype=torch.float32)
    _pieces_kernel[(M * pieces,)](
        x,
        maxima,
        sums,
        x.stride(0),
        N,
        pieces,
        scale,
        PIECE=PIECE,
        num_warps=NUM_WARPS,
    )
    return maxima, sums


@torch.library.custom_op("warpmap::sample", mutates_args=())
def _sample(
    x: Tensor,
    seeds: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> Tensor:
    M, N = x.shape
    if M == 0:
        return torch.empty_like(seeds)
    greedy = temperature == 0
    filtered = not greedy and (0 < top_k < N or top_p < 1 or min_p > 0)
    tries = TRIES if filtered else 1
    # a GPU raises 2, not e
    scale = math.log2(math.e) / (temperature or 1.0)
    with torch.cuda.device_of(x):  # Triton launches on the current GPU
        maxima, sums = _pieces(x, scale)
        pieces = maxima.shape[1]
        tokens = seeds.new_empty(M, tries)
        _draw_kernel[(M * tries,)](
            x,
            maxima,
            sums,
            seeds,
            tokens,
            x.stride(0),
            N,
            pieces,
            scale,
            TRIES=tries,
            GREEDY=greedy,
            PIECE=PIECE,
            PIECES=triton.next_power_of_2(pieces),
            num_warps=NUM_WARPS,
        )
        if not filtered:
            return tokens.view(M)
        return _settle(
            x, seeds, maxima, sums, tokens, scale, top_k, top_p, min_p
        )


# what torch.compile must know about the operator
_sample.register_fake(lambda x, seeds, *numbers: torch.empty_like(seeds))


def sample(
    logits: Tensor,
    seeds: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Tensor:
    """Draw a token for each row, by the softmax of its logits.

    The filters are judged on the whole row's probabilities at the temperature,
    each by itself; a token has to pass all. Equal logits pass together.

    Args:
        logits: ``(M, N)``, float32, float16 or bfloat16, on
            ``warpmap.DEVICE``; ``N`` at least 1. Each row is contiguous, rows
            may lie apart. ``-inf`` is never drawn.
        seeds: ``(M,)``, int64, same device: take another for each token.
        temperature: What logits are divided by, at least ``MIN_TEMPERATURE``;
            or 0 for the largest logit, the first of equals.
        top_k: Keep tokens with fewer than so many above them; all by default.
        top_p: Keep tokens with less than this probability above them, above
            0, up to 1.
        min_p: Keep tokens with this share of the likeliest's probability, 0
            to 1.

    Returns:
        ``(M,)``, int64; -1 for a row that holds ``nan`` or ``inf``, or nothing
        but ``-inf``.

    Raises:
        ValueError: If a tensor has another shape, dtype, layout or device, or
            a number is out of range.

    Examples:
        >>> x = torch.tensor([[0.0, 9.0, 1.0, 9.0]] * 3, device=DEVICE)
        >>> seeds = torch.arange(3, device=DEVICE)
        >>> sample(x, seeds, temperature=0).tolist()
        [1, 1, 1]
        >>> all(token in (1, 3) for token in sample(x, seeds, top_p=0.9))
        True
    """
    x = logits
    if x.ndim != 2 or x.shape[1] < 1 or (x.numel() and x.stride(1) != 1):
        raise ValueError(
            f"expected contiguous rows (M, N), got {tuple(x.shape)} "
            f"with strides {x.stride()}"
        )
    if x.dtype not in DTYPES:
        raise ValueError(f"expected one of {DTYPES}, got {x.dtype}")
    if x.device.type != DEVICE:
        raise ValueError(f"expected a tensor on {DEVICE}, got {x.device}")
    wanted = (x.shape[:1], torch.int64, x.device)
    if (seeds.shape, seeds.dtype, seeds.device) != wanted:
        raise ValueError(
            f"expected seeds ({x.shape[0]},), int64, on {x.device}, got "
            f"{tuple(seeds.shape)}, {seeds.dtype}, on {seeds.device}"
        )
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature must be 0, or at least {MIN_TEMPERATURE} and "
            f"finite, got {temperature}"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0, up to 1, got {top_p}")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p must be from 0 to 1, got {min_p}")
    tokens: Tensor = _sample(
        x, seeds.contiguous(), temperature, top_k or 0, top_p, min_p
    )
    return tokens
