"""Many feed-forward networks, of which each token runs a few.

    gate      a router scores E experts; a token keeps the k best
    dispatch  its k choices are sorted by expert, so that rows lie together
    combine   each result returns to its place, times its weight

    work      k experts a token, and the shared ones that every token runs
    weights   all E experts, and the shared ones

Reference: Shazeer et al., 2017, https://arxiv.org/abs/1701.06538
Reference: Jiang et al., 2024, https://arxiv.org/abs/2401.04088
Reference: Dai et al., 2024, https://arxiv.org/abs/2401.06066
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from warpmap.models.foundations.feed_forward import SwiGLU

Expert = Callable[[Tensor], Tensor]
"""Maps tokens ``(n, C)`` to ``(n, C)``, each by itself."""


def top_k_gate(
    logits: Tensor, k: int, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """The k best experts of each token, and how much each of them counts.

    Args:
        logits: ``(N, E)``, a router's scores.
        k: Experts a token runs, 1 to ``E``.
        normalize: Whether the weights of a token add up to 1, as Mixtral's
            do. If not, they are what softmax over all experts gives.

    Returns:
        Weights and experts, both ``(N, k)``, the best first. Weights are in
        float32 at least.

    Raises:
        ValueError: If ``k`` or the shape is wrong.

    Examples:
        >>> weights, experts = top_k_gate(torch.tensor([[1.0, 3.0, 3.0]]), k=2)
        >>> weights.tolist(), sorted(experts[0].tolist())
        ([[0.5, 0.5]], [1, 2])
    """
    if logits.ndim != 2 or not 1 <= k <= logits.shape[1]:
        raise ValueError(
            "expected logits (N, E) and k from 1 to E, got "
            f"{tuple(logits.shape)} and k = {k}"
        )
    wide = torch.promote_types(logits.dtype, torch.float32)
    probs = logits.to(wide).softmax(dim=-1)
    weights, experts = probs.topk(k, dim=-1)  # (N, k)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts


def mixture_reference(
    x: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence[Expert]
) -> Tensor:
    """Every expert runs every token; most results are multiplied by zero.

    Args:
        x: ``(N, C)``, tokens.
        weights: ``(N, k)``.
        chosen: ``(N, k)``, numbers of experts.
        experts: All ``E`` of them.

    Returns:
        ``(N, C)``.

    Examples:
        >>> double, negate = lambda x: 2 * x, lambda x: -x
        >>> mixture_reference(
        ...     torch.ones(1, 2),
        ...     torch.tensor([[0.75, 0.25]]),
        ...     torch.tensor([[0, 1]]),
        ...     [double, negate],
        ... ).tolist()
        [[1.25, 1.25]]
    """
    dense = weights.new_zeros(len(x), len(experts))
    dense = dense.scatter(1, chosen, weights)  # (N, E)
    y = torch.zeros_like(x)
    for column, expert in zip(dense.unbind(dim=1), experts, strict=True):
        y = y + column[:, None].to(x.dtype) * expert(x)
    return y


class Dispatch(NamedTuple):
    """Who goes where: ``N k`` choices, sorted by expert."""

    order: Tensor
    """``(N k,)``, the place of each choice before sorting."""
    tokens: Tensor
    """``(N k,)``, the token that each choice belongs to."""
    counts: Tensor
    """``(E,)``, how many choices each expert has: its load."""


def dispatch(chosen: Tensor, experts: int) -> Dispatch:
    """Sort the choices of all tokens by expert.

    Args:
        chosen: ``(N, k)``, numbers of experts.
        experts: ``E``.

    Examples:
        >>> sent = dispatch(torch.tensor([[2, 0], [0, 1]]), experts=4)
        >>> sent.tokens.tolist(), sent.counts.tolist()
        ([0, 1, 1, 0], [2, 1, 1, 0])
    """
    flat = chosen.flatten()
    # stable: tokens keep their order, so that runs repeat bit for bit
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)
    return Dispatch(order, order // chosen.shape[1], counts)


def mixture(
    x: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence[Expert]
) -> Tensor:
    """Each expert runs its own tokens, all of them at once.

    Args:
        x: ``(N, C)``, tokens.
        weights: ``(N, k)``.
        chosen: ``(N, k)``, numbers of experts, all different in a row.
        experts: All ``E`` of them.

    Returns:
        ``(N, C)``.

    Raises:
        ValueError: If the shapes do not fit, or an expert does not exist.

    Examples:
        >>> double, negate = lambda x: 2 * x, lambda x: -x
        >>> mixture(
        ...     torch.ones(1, 2),
        ...     torch.tensor([[0.75, 0.25]]),
        ...     torch.tensor([[0, 1]]),
        ...     [double, negate],
        ... ).tolist()
        [[1.25, 1.25]]
    """
    _check(x, weights, chosen, len(experts))
    sent = dispatch(chosen, len(experts))
    # the host must know the sizes: on a GPU it waits for them here
    rows = x[sent.tokens].split(sent.counts.tolist())
    done = [
        expert(mine)
        for expert, mine in zip(experts, rows, strict=True)
        if len(mine)
    ]
    # back to the place before sorting: k results of a token lie together
    results = x.new_zeros(chosen.numel(), x.shape[1])
    if done:
        results = results.index_copy(0, sent.order, torch.cat(done))
    results = results.view(*chosen.shape, x.shape[1])  # (N, k, C)
    return (results * weights[..., None].to(x.dtype)).sum(dim=1)


def _check(x: Tensor, weights: Tensor, chosen: Tensor, experts: int) -> None:
    shapes = (
        f"x {tuple(x.shape)}, weights {tuple(weights.shape)}, "
        f"chosen {tuple(chosen.shape)}"
    )
    if x.ndim != 2 or chosen.ndim != 2 or weights.shape != chosen.shape:
        raise ValueError(f"expected x (N, C), the others (N, k), got {shapes}")
    if len(x) != len(chosen):
        raise ValueError(f"expected the same N, got {shapes}")
    unknown = chosen[(chosen < 0) | (chosen >= experts)]
    if len(unknown):
        raise ValueError(
            f"expected experts from 0 to {experts - 1}, got {int(unknown[0])}"
        )


class MixtureOfExperts(nn.Module):
    """A layer of SwiGLU experts, in place of one feed-forward network.

    Args:
        width: ``C``, values of a token between layers.
        hidden: ``F``, values inside one expert.
        experts: ``E``, of which a router chooses.
        per_token: ``k``, those that a token runs.
        shared: Further experts that every token runs.
        normalize: Whether the weights of a token add up to 1.

    Raises:
        ValueError: If a number is out of range.

    Examples:
        >>> layer = MixtureOfExperts(width=8, hidden=16, experts=4, per_token=2)
        >>> layer(torch.zeros(2, 5, 8)).shape
        torch.Size([2, 5, 8])
        >>> layer.active_parameters()  # router and 2 experts of 3 matrices
        800
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        per_token: int,
        shared: int = 0,
        normalize: bool = True,
    ) -> None:
        """Make the router and all experts."""
        super().__init__()
        if not 1 <= per_token <= experts:
            raise ValueError(
                f"per_token must be 1 to {experts}, the experts, got "
                f"{per_token}"
            )
        if shared < 0:
            raise ValueError(f"shared must be at least 0, got {shared}")
        self.width, self.hidden, self.per_token = width, hidden, per_token
        self.normalize = normalize
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            SwiGLU(width, hidden) for _ in range(experts)
        )
        # side by side, n experts without weights are one, n times as wide
        self.shared = SwiGLU(width, shared * hidden) if shared else None

    def forward(self, x: Tensor) -> Tensor:
        """Send each token to its experts, ``(..., C)`` to ``(..., C)``."""
        tokens = x.reshape(-1, self.width)
        weights, chosen = top_k_gate(
            self.router(tokens), self.per_token, self.normalize
        )
        y = mixture(tokens, weights, chosen, list(self.experts))
        if self.shared is not None:
            y = y + self.shared(tokens)
        return y.view_as(x)

    def active_parameters(self) -> int:
        """Parameters that multiply one token."""
        total = sum(w.numel() for w in self.parameters())
        idle = len(self.experts) - self.per_token
        return total - idle * 3 * self.width * self.hidden

    @torch.no_grad()
    def fine_grained(self, pieces: int) -> "MixtureOfExperts":
        """The same function, with every expert cut into smaller ones.

        A token runs ``pieces`` times as many, each as much narrower.

        Args:
            pieces: Parts of an expert, a divisor of ``hidden``.

        Raises:
            ValueError: If ``hidden`` cannot be cut so.
        """
        if pieces < 1 or self.hidden % pieces:
            raise ValueError(
                f"pieces must divide hidden, {self.hidden}, got {pieces}"
            )
        layer = MixtureOfExperts(
            self.width,
            self.hidden // pieces,
            len(self.experts) * pieces,
            self.per_token * pieces,
            normalize=self.normalize,
        ).to(self.router.weight)  # device and dtype
        layer.shared = deepcopy(self.shared)
        # pieces share their expert's score, and so divide its weight
        rows = self.router.weight.repeat_interleave(pieces, dim=0)
        layer.router.weight.copy_(rows)
        for i, piece in enumerate(layer.experts):
            whole, part = self.experts[i // pieces], i % pieces
            assert isinstance(whole, SwiGLU)
            assert isinstance(piece, SwiGLU)
            mine = slice(part * layer.hidden, (part + 1) * layer.hidden)
            piece.gate.weight.copy_(whole.gate.weight[mine])
            piece.up.weight.copy_(whole.up.weight[mine])
            piece.down.weight.copy_(pieces * whole.down.weight[:, mine])
        return layer
