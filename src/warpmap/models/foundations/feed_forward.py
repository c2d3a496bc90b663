"""The feed-forward network of a Transformer layer, plain and gated.

    plain  down(f(up x))            2 matrices, usually F = 4 C
    gated  down(f(gate x) * up x)   3 matrices, F = 8/3 C for the same weights

Each token is transformed by itself. Both directions are written out below;
weights lie as ``nn.Linear`` keeps them, ``(outputs, inputs)``.

Reference: Vaswani et al., 2017, https://arxiv.org/abs/1706.03762
Reference: Shazeer, 2020, https://arxiv.org/abs/2002.05202
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Activation = Literal["identity", "sigmoid", "relu", "gelu", "silu"]


def activate(x: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """An activation and its slope, element by element.

    Args:
        x: Any shape.
        activation: ``"gelu"`` is the exact one, ``x`` times the share of a
            normal distribution below ``x``.

    Returns:
        The values and the derivatives, both shaped as ``x``.

    Raises:
        ValueError: If the activation is unknown.

    Examples:
        >>> activate(torch.tensor([2.0, 3.0]), "relu")
        (tensor([2., 3.]), tensor([1., 1.]))
    """
    if activation == "identity":
        return x, torch.ones_like(x)
    if activation == "relu":
        open_ = (x > 0).to(x.dtype)
        return x * open_, open_
    if activation == "gelu":
        share = (1 + torch.erf(x / math.sqrt(2))) / 2
        density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
        return x * share, share + x * density
    s = torch.sigmoid(x)
    if activation == "sigmoid":
        return s, s * (1 - s)
    if activation == "silu":
        return x * s, s + x * s * (1 - s)
    raise ValueError(
        "activation must be identity, sigmoid, relu, gelu or silu, "
        f"got {activation!r}"
    )


def feed_forward(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    activation: Activation = "silu",
) -> Tensor:
    """Project up, activate, project down; with ``gate``, multiply in between.

    Args:
        x: ``(..., C)``.
        up: ``(F, C)``.
        down: ``(C, F)``.
        gate: ``(F, C)``; the activation is then the gate's.
        activation: What ``activate`` knows.

    Returns:
        ``(..., C)``.

    Raises:
        ValueError: If the shapes do not fit, or the activation is unknown.

    Examples:
        >>> x, up, down = torch.ones(1, 2), torch.ones(3, 2), torch.ones(2, 3)
        >>> feed_forward(x, up, down, activation="relu").tolist()
        [[6.0, 6.0]]
        >>> feed_forward(x, up, down, gate=up, activation="relu").tolist()
        [[12.0, 12.0]]
    """
    _check(x, up, down, gate)
    hidden = x @ up.T  # (..., F)
    if gate is None:
        hidden, _ = activate(hidden, activation)
    else:
        hidden = activate(x @ gate.T, activation)[0] * hidden
    return hidden @ down.T


class Gradients(NamedTuple):
    """Gradients of what ``feed_forward`` was given, each shaped as that."""

    x: Tensor
    up: Tensor
    down: Tensor
    gate: Tensor | None


def feed_forward_backward(
    grad: Tensor,
    x: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    activation: Activation = "silu",
) -> Gradients:
    """All gradients of ``feed_forward``, from its inputs alone.

    Args:
        grad: Gradient of the output, ``(..., C)``.
        x: As in ``feed_forward``, and so the others.
        up: ``(F, C)``.
        down: ``(C, F)``.
        gate: ``(F, C)``, or nothing.
        activation: What ``activate`` knows.

    Raises:
        ValueError: If the shapes do not fit, or the activation is unknown.

    Examples:
        >>> x, up, down = torch.ones(1, 2), torch.ones(3, 2), torch.ones(2, 3)
        >>> feed_forward_backward(x, x, up, down, activation="relu").x
        tensor([[6., 6.]])
    """
    _check(x, up, down, gate)
    grad, tokens = grad.flatten(0, -2), x.flatten(0, -2)  # (tokens, C)
    d_hidden = grad @ down
    u = tokens @ up.T  # (tokens, F)
    if gate is None:
        hidden, slope = activate(u, activation)
        d_u = d_hidden * slope
        d_x, d_gate = d_u @ up, None
    else:
        opened, slope = activate(tokens @ gate.T, activation)
        hidden = opened * u
        # each factor of the product is the other one's slope
        d_u, d_g = d_hidden * opened, d_hidden * u * slope
        d_x = d_u @ up + d_g @ gate
        d_gate = d_g.T @ tokens
    return Gradients(d_x.view_as(x), d_u.T @ tokens, grad.T @ hidden, d_gate)


def _check(x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None) -> None:
    C, F = down.shape
    gate = up if gate is None else gate
    if x.shape[-1:] != (C,) or not up.shape == gate.shape == (F, C):
        raise ValueError(
            "expected x (..., C), up and gate (F, C), down (C, F), got "
            f"x {tuple(x.shape)}, up {tuple(up.shape)}, "
            f"gate {tuple(gate.shape)}, down {tuple(down.shape)}"
        )


class SwiGLU(nn.Module):
    """The gated network of Llama: ``down(silu(gate x) * up x)``, no biases.

    Examples:
        >>> layer = SwiGLU(width=96, hidden=gated_hidden(96, multiple_of=8))
        >>> sum(w.numel() for w in layer.parameters()) == 2 * 96 * 4 * 96
        True
    """

    def __init__(self, width: int, hidden: int) -> None:
        """Make the three projections.

        Args:
            width: ``C``, values of a token between layers.
            hidden: ``F``, values of a token inside.

        Raises:
            ValueError: If one of them is below 1.
        """
        super().__init__()
        for name, value in (("width", width), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token by itself, ``(..., C)`` to ``(..., C)``."""
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def gated_hidden(
    width: int, multiple_of: int = 256, multiplier: float = 1.0
) -> int:
    """Hidden width at which a gated network weighs as much as a plain one.

    Three matrices of ``8/3 C`` columns hold what two of ``4 C`` do. Llama
    rounds up to a multiple that suits the hardware, after a multiplier.

    Args:
        width: ``C``, values of a token between layers.
        multiple_of: What the result must be a multiple of.
        multiplier: How much larger than the plain network it should be.

    Returns:
        ``F``.

    Raises:
        ValueError: If an argument is not positive.

    Examples:
        >>> gated_hidden(4096)  # Llama 7B
        11008
        >>> gated_hidden(4096, multiple_of=1024, multiplier=1.3)  # Llama 3 8B
        14336
    """
    for name, value in (
        ("width", width),
        ("multiple_of", multiple_of),
        ("multiplier", multiplier),
    ):
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    hidden = int(multiplier * (8 * width // 3))
    return math.ceil(hidden / multiple_of) * multiple_of
