"""Rotary position embedding: turn pairs of entries by the position.

Entries of a query or key are paired, and pair ``i`` of a token at position
``p`` is turned by ``p * base ** (-2 i / D)`` radians. The product of a turned
query and a turned key depends on their distance alone.

    half-split   entry i and entry i + D / 2 are a pair; most checkpoints
    interleaved  entries 2 i and 2 i + 1 are a pair; the paper, GPT-J, Llama
                 as Meta published it
    complex      interleaved, each pair held as one complex number

Reference: Su et al., 2021, https://arxiv.org/abs/2104.09864
"""

import torch
from torch import Tensor


def rope_table(
    positions: Tensor, head_size: int, base: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position and pair.

    Angles are in float64: at position 10**6 the steps between float32 numbers
    are 0.06 radians wide. What is kept lies in [-1, 1], where float32 will do.

    Args:
        positions: Any shape, integers or floats; ``(T,)`` or ``(B, 1, T)``
            for ``rotate``.
        head_size: Entries of a head, ``D``; even.
        base: Sets the slowest turn; 500000 in Llama 3.

    Returns:
        Two tables of shape ``positions.shape + (D / 2,)``: float64 if the
        positions are, else float32.

    Raises:
        ValueError: If ``head_size`` is odd or ``base`` is not positive.

    Examples:
        >>> cos, sin = rope_table(torch.arange(3), 4)
        >>> [round(s, 4) for s in sin[2].tolist()]  # sin 2, sin 0.02
        [0.9093, 0.02]
    """
    if head_size < 2 or head_size % 2:
        raise ValueError(f"head_size must be even, at least 2, got {head_size}")
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
    pairs = torch.arange(
        0, head_size, 2, dtype=torch.float64, device=positions.device
    )
    angles = positions.double().unsqueeze(-1) * base ** (-pairs / head_size)
    kept = positions.dtype if positions.dtype == torch.float64 else torch.float
    return angles.cos().to(kept), angles.sin().to(kept)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys whose heads are half-split.

    Args:
        x: ``(B, H, T, D)``; entry ``i`` is paired with ``i + D / 2``.
        cos: ``(T, D / 2)``, or ``(B, 1, T, D / 2)`` where sequences have
            positions of their own.
        sin: The same.

    Returns:
        Shape and dtype of ``x``; worked out in float32 or wider.

    Raises:
        ValueError: If the tables do not fit ``x``.

    Examples:
        >>> quarter = torch.zeros(1, 2), torch.ones(1, 2)  # cos, sin
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
        >>> rotate(x, *quarter).flatten().tolist()
        [-3.0, -4.0, 1.0, 2.0]
    """
    _check(x, cos, sin)
    a, b = _wide(x).chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return turned.to(x.dtype)


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys whose pairs are neighbours.

    Args:
        x: ``(B, H, T, D)``; entry ``2 i`` is paired with ``2 i + 1``.
        cos: As for ``rotate``: the tables know nothing of the pairing.
        sin: The same.

    Returns:
        Shape and dtype of ``x``; worked out in float32 or wider.

    Raises:
        ValueError: If the tables do not fit ``x``.

    Examples:
        >>> quarter = torch.zeros(1, 2), torch.ones(1, 2)  # cos, sin
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
        >>> rotate_interleaved(x, *quarter).flatten().tolist()
        [-2.0, 1.0, -4.0, 3.0]
    """
    _check(x, cos, sin)
    a, b = _wide(x).unflatten(-1, (-1, 2)).unbind(dim=-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def rotate_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbours as complex numbers: one product instead of four.

    Args:
        x: ``(B, H, T, D)``; entries ``2 i`` and ``2 i + 1`` are real and
            imaginary part.
        cos: As for ``rotate``.
        sin: The same.

    Returns:
        What ``rotate_interleaved`` returns.

    Raises:
        ValueError: If the tables do not fit ``x``.

    Examples:
        >>> quarter = torch.zeros(1, 2), torch.ones(1, 2)  # times i
        >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
        >>> rotate_complex(x, *quarter).flatten().tolist()
        [-2.0, 1.0, -4.0, 3.0]
    """
    _check(x, cos, sin)
    pairs = _wide(x).contiguous().unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(pairs) * torch.complex(cos, sin)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def to_half_split(weight: Tensor, head_size: int) -> Tensor:
    """Reorder a projection made for ``rotate_interleaved`` for ``rotate``.

    Rows move within each head: even ones first, then odd ones. Do the same to
    the projections of queries and of keys, to their biases, and to the weight
    of a norm of queries or keys. Values and output stay as they are.

    Args:
        weight: ``(H * D, C)``, or a bias ``(H * D,)``.
        head_size: ``D``; even.

    Returns:
        The rows in their new order; same shape.

    Raises:
        ValueError: If the rows are no whole number of heads.

    Examples:
        >>> to_half_split(torch.arange(6), head_size=6).tolist()
        [0, 2, 4, 1, 3, 5]
    """
    _check_rows(weight, head_size)
    pairs: Tensor = weight.unflatten(0, (-1, head_size // 2, 2))
    return pairs.transpose(1, 2).flatten(0, 2)


def to_interleaved(weight: Tensor, head_size: int) -> Tensor:
    """Reorder a projection made for ``rotate`` for ``rotate_interleaved``.

    Args:
        weight: ``(H * D, C)``, or a bias ``(H * D,)``.
        head_size: ``D``; even.

    Returns:
        The rows in their new order: the inverse of ``to_half_split``.

    Raises:
        ValueError: If the rows are no whole number of heads.

    Examples:
        >>> to_interleaved(torch.arange(6), head_size=6).tolist()
        [0, 3, 1, 4, 2, 5]
    """
    _check_rows(weight, head_size)
    halves: Tensor = weight.unflatten(0, (-1, 2, head_size // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.ndim != 4 or x.shape[-1] % 2:
        raise ValueError(
            f"expected x (B, H, T, D) with even D, got {tuple(x.shape)}"
        )
    B, _, T, D = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        if tuple(table.shape) not in (
            (T, D // 2),
            (1, 1, T, D // 2),
            (B, 1, T, D // 2),
        ):
            raise ValueError(
                f"expected {name} ({T}, {D // 2}) or ({B}, 1, {T}, {D // 2}), "
                f"got {tuple(table.shape)}"
            )


def _check_rows(weight: Tensor, head_size: int) -> None:
    if head_size < 2 or head_size % 2:
        raise ValueError(f"head_size must be even, at least 2, got {head_size}")
    if weight.ndim == 0 or weight.shape[0] % head_size:
        raise ValueError(
            f"expected rows in heads of {head_size}, got {tuple(weight.shape)}"
        )
