"""What is left of a gradient after many layers, before any training."""

from typing import NamedTuple

import torch
from torch import Tensor

from warpmap.models.foundations.feed_forward import activate
from warpmap.models.foundations.normalization import normalize


class Passed(NamedTuple):
    """A gradient that came back through all layers.

    Attributes:
        size: Its length for one of length 1 at the end, over all directions
            (root mean square).
        directions: How many directions come back with at least a tenth of the
            size of the strongest.
    """

    size: float
    directions: int


def gradient_through(
    layers: int, link: bool, norm: bool, width: int = 32, seed: int = 0
) -> Passed:
    """Send gradients of all directions back through feed-forward layers.

    A layer computes ``f(x)``, or ``x + f(x)`` with the link, and the norm, if
    any, stands before ``f`` and after the last layer. One random token,
    weights that about keep the size of what they multiply, in float64.

    Args:
        layers: Layers, from 1.
        link: Whether each layer's input is added to its output.
        norm: Whether what a layer reads is brought to one size.
        width: Values of the token, ``C``.
        seed: Of weights and token.

    Returns:
        Size and directions, from the singular values of the Jacobian.

    Raises:
        ValueError: If ``layers`` or ``width`` is too small.

    Examples:
        >>> gradient_through(16, link=False, norm=True).directions
        5
        >>> gradient_through(16, link=True, norm=True).directions
        17
    """
    if layers < 1 or width < 2:
        raise ValueError(
            f"expected 1 layer and a width of 2 at least, got {layers} and "
            f"{width}"
        )
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    weights = [
        (noise(4 * width, width) / width**0.5, noise(width, 4 * width))
        for _ in range(layers)
    ]

    def maybe_norm(x: Tensor) -> Tensor:
        return normalize(x, axis=-1)[0] if norm else x

    def stack(x: Tensor) -> Tensor:
        for up, down in weights:
            hidden, _ = activate(up @ maybe_norm(x), "gelu")
            y = down @ hidden / (4 * width) ** 0.5
            x = x + y if link else y
        return maybe_norm(x)

    jacobian = torch.autograd.functional.jacobian(
        stack, noise(width), vectorize=True
    )
    sizes = torch.linalg.svdvals(jacobian)
    return Passed(
        size=float(sizes.square().mean().sqrt()),
        directions=int((sizes >= sizes[0] / 10).sum()),
    )
