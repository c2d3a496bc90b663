"""Newton-Schulz: singular values go to 1, by matrix products alone.

Reference: Jordan et al., 2024, https://kellerjordan.github.io/posts/muon
"""

import torch
from torch import Tensor

JORDAN = 3.4445, -4.7750, 2.0315
"""Coefficients of Muon: steep at zero, so that five steps are enough."""


def orthogonalize(
    g: Tensor,
    rounds: int = 5,
    coefficients: tuple[float, float, float] = JORDAN,
    dtype: torch.dtype | None = torch.bfloat16,
) -> Tensor:
    """A matrix with the singular vectors of ``g``, and values near 1.

    A round turns each singular value ``s`` into ``a s + b s^3 + c s^5``. The
    first division leaves none above 1. From there ``JORDAN`` takes in five
    rounds what is above 0.002 to between 0.68 and 1.21;
    ``(15/8, -10/8, 3/8)`` takes more rounds and ends at 1.

    Args:
        g: ``(M, N)``.
        rounds: How often.
        coefficients: ``a``, ``b`` and ``c``.
        dtype: Of the products; None for that of ``g``.

    Returns:
        ``(M, N)`` in ``dtype``.

    Raises:
        ValueError: If ``g`` is no matrix.

    Examples:
        >>> g = torch.diag(torch.tensor([3.0, 0.3, -0.03]))
        >>> orthogonalize(g, 20, (15 / 8, -10 / 8, 3 / 8), None).round()
        tensor([[ 1.,  0.,  0.],
                [ 0.,  1.,  0.],
                [ 0.,  0., -1.]])
    """
    if g.ndim != 2:
        raise ValueError(
            f"expected a matrix (M, N), got shape {tuple(g.shape)}"
        )
    a, b, c = coefficients
    x = g.to(dtype or g.dtype)
    if g.shape[0] > g.shape[1]:
        x = x.T  # the smaller of the two products with its transpose
    x = x / x.norm().clamp(min=1e-7)  # no singular value above 1
    for _ in range(rounds):
        gram = x @ x.T
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, factor, x, beta=a)
    return x.T if g.shape[0] > g.shape[1] else x
