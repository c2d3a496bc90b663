"""Guards against loss spikes: for the gradient, the logits and the step.

    clip_gradients  the norm of all gradients together has a limit
    cross_entropy   may pull the sum behind the softmax to 1 (z-loss)
    StableAttention may normalize queries and keys (QK-norm)
    largest_step    how far Adam can go in one step, whatever the gradients

Reference: Pascanu et al., 2013, https://arxiv.org/abs/1211.5063
Reference: Dehghani et al., 2023, https://arxiv.org/abs/2302.05442
Reference: Wortsman et al., 2023, https://arxiv.org/abs/2309.14322
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from warpmap.models.foundations.attention import attention
from warpmap.models.foundations.normalization import RMSNorm


@torch.no_grad()
def clip_gradients(params: Iterable[Tensor], limit: float) -> Tensor:
    """Scale all gradients by one factor, so that their joint norm fits.

    One factor keeps their direction. Nothing waits for the GPU: a norm that
    fits gives the factor 1.

    Args:
        params: Tensors with gradients, of one device; others are left out.
        limit: Largest norm of all gradients together.

    Returns:
        The norm before, a tensor of one number; not finite if a gradient is
        not. Then no gradient is usable: skip the step.

    Raises:
        ValueError: If ``limit`` is not positive.

    Examples:
        >>> p, q = torch.zeros(1), torch.zeros(1)
        >>> p.grad, q.grad = torch.tensor([30.0]), torch.tensor([40.0])
        >>> clip_gradients([p, q], limit=5.0).item()
        50.0
        >>> round(p.grad.item(), 4), round(q.grad.item(), 4)
        (3.0, 4.0)
    """
    if not limit > 0:
        raise ValueError(f"limit must be above 0, got {limit}")
    grads = [p.grad for p in params if p.grad is not None]
    if not grads:
        return torch.tensor(0.0)
    norms: tuple[Tensor, ...] = torch._foreach_norm(grads)
    norm: Tensor = torch.stack(norms).norm()
    torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def cross_entropy(
    logits: Tensor, targets: Tensor, z_weight: float = 0.0
) -> Tensor:
    """Mean cross-entropy, plus ``z_weight`` times the mean of ``(log Z)^2``.

    ``Z`` is the sum of exponentials that the softmax divides by. Cross-entropy
    does not mind a constant added to all logits; the second term does.

    Args:
        logits: ``(N, V)``.
        targets: ``(N,)``, the right class of each row.
        z_weight: Weight of the z-loss; 1e-4 in PaLM.

    Returns:
        A number.

    Examples:
        >>> logits = torch.tensor([[5.0, 5.0]])  # log Z = 5 + log 2 = 5.69
        >>> round(cross_entropy(logits, torch.tensor([0])).item(), 4)
        0.6931
        >>> round(cross_entropy(logits, torch.tensor([0]), 0.1).item(), 3)
        3.934
    """
    log_z = logits.logsumexp(dim=-1)
    right = logits.gather(-1, targets[:, None])[:, 0]
    return (log_z - right + z_weight * log_z.square()).mean()


def cross_entropy_backward(
    logits: Tensor, targets: Tensor, z_weight: float = 0.0
) -> Tensor:
    """Gradient of ``cross_entropy`` for its logits, written out.

    Without z-loss each row sums to 0, so no step moves the level of the
    logits on purpose. With it, a row sums to ``2 z_weight log Z``.

    Args:
        logits: ``(N, V)``.
        targets: ``(N,)``.
        z_weight: Weight of the z-loss.

    Returns:
        ``(N, V)``.

    Examples:
        >>> logits, right = torch.tensor([[5.0, 5.0]]), torch.tensor([0])
        >>> cross_entropy_backward(logits, right).tolist()
        [[-0.5, 0.5]]
    """
    log_z = logits.logsumexp(dim=-1, keepdim=True)
    probs = (logits - log_z).exp()
    # the slope of log Z is the softmax itself
    grad = probs * (1 + 2 * z_weight * log_z)
    grad.scatter_add_(1, targets[:, None], -torch.ones_like(log_z))
    return grad / len(logits)


class StableAttention(nn.Module):
    """Causal attention that may normalize each query and key of a head.

    With QK-norm a score is at most ``sqrt(D)`` times two weights, however
    large the projections have grown.

    Args:
        width: Model width ``C``, a multiple of ``heads``.
        heads: Heads ``H``.
        qk_norm: Whether to normalize.

    Examples:
        >>> layer = StableAttention(width=64, heads=4, qk_norm=True)
        >>> layer(torch.zeros(1, 5, 64)).shape
        torch.Size([1, 5, 64])
    """

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        """Create the projections, and the norms if asked for."""
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(
                f"width must be a multiple of heads, got {width} and {heads}"
            )
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if qk_norm:
            self.q_norm = RMSNorm(width // heads)
            self.k_norm = RMSNorm(width // heads)

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, T, C)`` to queries, keys and values, ``(B, H, T, D)``."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v

    def forward(self, x: Tensor) -> Tensor:
        """Attend from each token to itself and those before.

        Args:
            x: ``(B, T, C)``.

        Returns:
            ``(B, T, C)``.
        """
        q, k, v = self.queries_and_keys(x)
        T = x.shape[1]
        seen = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        y: Tensor = self.out(
            attention(q, k, v, seen).transpose(1, 2).flatten(2)
        )
        return y


def largest_step(beta1: float, beta2: float, step: int) -> float:
    """How far Adam can move an element in one step, over ``lr``.

    Gradients that grow by ``beta2 / beta1`` a step get there: the mean of
    squares remembers the quiet past, the mean has forgotten it.

    Args:
        beta1: What the mean keeps in a step, in ``[0, 1)``.
        beta2: What the mean of squares keeps in a step, in ``(0, 1)``.
        step: How many steps there are with this one; 1 at first.

    Returns:
        The bound; ``eps`` makes steps smaller.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> round(largest_step(0.9, 0.999, step=1), 2)
        1.0
        >>> round(largest_step(0.9, 0.999, step=10_000), 2)
        7.27
        >>> round(largest_step(0.9, 0.95, step=10_000), 2)
        1.16
    """
    if not 0 <= beta1 < 1:
        raise ValueError(f"beta1 must be in [0, 1), got {beta1}")
    if not 0 < beta2 < 1:
        raise ValueError(f"beta2 must be in (0, 1), got {beta2}")
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    # Cauchy-Schwarz: (sum a g)^2 <= (sum a^2 / b) (sum b g^2)
    ratio = beta1**2 / beta2
    total = step if ratio == 1 else (1 - ratio**step) / (1 - ratio)
    bound = (1 - beta1) * math.sqrt(total / (1 - beta2))
    return bound * math.sqrt(1 - beta2**step) / (1 - beta1**step)
