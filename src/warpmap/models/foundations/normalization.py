"""LayerNorm, RMSNorm and BatchNorm from one function, and where to put them.

    BatchNorm  centred, statistics of a column: over the batch
    LayerNorm  centred, statistics of a row: over the channels
    RMSNorm    not centred, statistics of a row

Weight and bias come after and are the same for all. So is the gradient: what
a normalized value cannot change, its gradient has no part of.

Reference: Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167
Reference: Ba, Kiros and Hinton, 2016, https://arxiv.org/abs/1607.06450
Reference: Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467
Reference: Xiong et al., 2020, https://arxiv.org/abs/2002.04745
"""

from typing import Literal

import torch
from torch import Tensor, nn

from warpmap.models.foundations.feed_forward import SwiGLU

Placement = Literal["pre", "post"]


def normalize(
    x: Tensor, axis: int, center: bool = True, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Bring ``x`` to mean 0, if centred, and mean square 1 along an axis.

    Args:
        x: Any shape.
        axis: The axis whose mean is taken: 0 for BatchNorm, -1 for others.
        center: Whether to subtract the mean first; RMSNorm does not.
        eps: Added to the mean square, so that zeros stay finite.

    Returns:
        The normalized values, shaped as ``x``, and the factor ``1 / rms``
        they were scaled by, with size 1 along ``axis``.

    Examples:
        >>> normalize(torch.tensor([3.0, 5.0]), axis=-1, eps=0.0)[0].tolist()
        [-1.0, 1.0]
        >>> x = torch.tensor([1.0, 7.0])  # mean square 25
        >>> (5 * normalize(x, -1, center=False)[0]).round().tolist()
        [1.0, 7.0]
    """
    if center:
        x = x - x.mean(axis, keepdim=True)
    scale = torch.rsqrt(x.square().mean(axis, keepdim=True) + eps)
    return x * scale, scale


def normalize_backward(
    grad: Tensor, y: Tensor, scale: Tensor, axis: int, center: bool = True
) -> Tensor:
    """Gradient of ``normalize``, from what it returned.

    ``y`` has a fixed length, so a gradient along ``y`` asks for what cannot
    be, and is taken out; so is the mean, where it was taken out of ``x``.

    Args:
        grad: Gradient of the normalized values, shaped as ``y``.
        y: The normalized values.
        scale: The factor that ``normalize`` returned.
        axis: As in ``normalize``.
        center: As in ``normalize``.

    Returns:
        Gradient of ``x``, shaped as ``y``.

    Examples:
        >>> y, scale = normalize(torch.tensor([3.0, 4.0]), -1, center=False)
        >>> normalize_backward(y, y, scale, -1, center=False).abs().max() < 1e-6
        tensor(True)
    """
    along = (grad * y).mean(axis, keepdim=True)
    mean = grad.mean(axis, keepdim=True) if center else 0.0
    return scale * (grad - mean - y * along)


class RMSNorm(nn.Module):
    """Rows divided by their root mean square, times a weight a channel.

    Statistics are taken in float32, or in float64 if the input has it. The
    normalized values return to the input's dtype *before* they meet the
    weight, as in Llama: a checkpoint trained so expects that rounding.

    Examples:
        >>> y = RMSNorm(2)(torch.tensor([[100.0, 700.0]]))
        >>> (5 * y).round().tolist()
        [[1.0, 7.0]]
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        """Make a norm whose weights are 1.

        Args:
            width: ``C``, the size of the last axis.
            eps: Added to the mean square.

        Raises:
            ValueError: If ``width`` is below 1 or ``eps`` negative.
        """
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last axis.

        Args:
            x: ``(..., C)``.

        Returns:
            ``(..., C)``, in the dtype of ``x`` times ``weight``.

        Raises:
            ValueError: If the last axis has another size.
        """
        if x.shape[-1:] != self.weight.shape:
            raise ValueError(
                f"expected (..., {self.weight.numel()}), got {tuple(x.shape)}"
            )
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        y, _ = normalize(wide, axis=-1, center=False, eps=self.eps)
        return y.to(x.dtype) * self.weight


class ResidualBlock(nn.Module):
    """A sublayer, the path around it, and a norm before it or after both.

    Examples:
        >>> x = torch.ones(1, 2)
        >>> ResidualBlock(2, nn.Identity(), "pre", eps=0.0)(3 * x).tolist()
        [[4.0, 4.0]]
        >>> ResidualBlock(2, nn.Identity(), "post", eps=0.0)(3 * x).tolist()
        [[1.0, 1.0]]
    """

    def __init__(
        self,
        width: int,
        sublayer: nn.Module,
        placement: Placement,
        eps: float = 1e-6,
    ) -> None:
        """Join the two.

        Args:
            width: ``C``, the size of the last axis.
            sublayer: Maps ``(..., C)`` to ``(..., C)``.
            placement: ``"pre"`` or ``"post"``.
            eps: Added to the mean square.

        Raises:
            ValueError: If ``placement`` is neither.
        """
        super().__init__()
        if placement not in ("pre", "post"):
            raise ValueError(
                f"placement must be 'pre' or 'post', got {placement!r}"
            )
        self.norm = RMSNorm(width, eps)
        self.sublayer = sublayer
        self.placement = placement

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., C)`` to ``(..., C)``."""
        y: Tensor
        if self.placement == "post":
            y = self.norm(x + self.sublayer(x))
        else:
            y = x + self.sublayer(self.norm(x))
        return y


def gradient_norms(
    placement: Placement, layers: int, width: int = 32, seed: int = 0
) -> list[float]:
    """How strong the first gradient is in each layer of an untrained stack.

    The stack has a SwiGLU a layer, weights that keep the size of what they
    multiply, 64 random tokens, and a random direction as loss, in float64.

    Args:
        placement: Where the norms are; ``"pre"`` adds one at the end.
        layers: Blocks, from 1.
        width: ``C``; the sublayers are twice as wide inside.
        seed: Of weights, tokens and loss: the same for both placements.

    Returns:
        Norm of the gradient of all weights of a layer, first layer first.

    Raises:
        ValueError: If ``layers`` is below 1 or ``placement`` unknown.

    Examples:
        >>> len(gradient_norms("post", layers=3))
        3
    """
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    tokens, direction = noise(64, width), noise(64, width)
    blocks = []
    for _ in range(layers):
        sublayer = SwiGLU(width, 2 * width).double()
        for weight in sublayer.parameters():
            outputs, inputs = weight.shape
            weight.data = noise(outputs, inputs) / inputs**0.5
        blocks.append(ResidualBlock(width, sublayer, placement).double())

    y: Tensor = nn.Sequential(*blocks)(tokens)
    if placement == "pre":
        y, _ = normalize(y, axis=-1, center=False)
    (y * direction).sum().backward()
    return [
        sum(
            float(weight.grad.square().sum())
            for weight in block.sublayer.parameters()
            if weight.grad is not None
        )
        ** 0.5
        for block in blocks
    ]
