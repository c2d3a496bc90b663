"""A large batch in pieces: gradients of micro-batches, added up in fp32.

What must hold, and how it goes wrong:

    loss     sum over all tokens / number of all tokens, not a mean of means
    sum      in fp32: in bf16 every addition rounds it to 8 bits
    traffic  bytes a weight and piece: 12, or 8 if the matrix product adds

``MainGrads`` adds in fp32 behind any layer, ``AccumulatingLinear`` lets the
matrix product of its weight gradient do it.

Reference: Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE = -100  # a target that counts for nothing: padding, or a prompt

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, ``(B, T)`` each."""


def _loss(model: nn.Module, batch: Batch, reduction: str) -> Tensor:
    inputs, targets = batch
    logits = model(inputs).flatten(0, -2)  # (B T, V)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(
        logits.to(wide),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction=reduction,
    )


def mean_of_means(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Backward over micro-batches, each with its mean loss: a known bug.

    Args:
        model: From ``(B, T)`` to logits ``(B, T, V)``.
        batches: Micro-batches. The fewer targets one has, the more each weighs.

    Returns:
        The mean of the micro-batches' mean losses, in nats.

    Examples:
        >>> model = nn.Embedding(2, 2)
        >>> _ = nn.init.zeros_(model.weight)
        >>> one = torch.tensor([[0]]), torch.tensor([[1]])
        >>> three = torch.tensor([[0, 0, 0]]), torch.tensor([[0, 0, 0]])
        >>> _ = mean_of_means(model, [one, three])
        >>> model.weight.grad[0].tolist()  # one target weighs as much as three
        [0.0, 0.0]
    """
    total = 0.0
    for batch in batches:
        loss = _loss(model, batch, "mean") / len(batches)
        loss.backward()
        total += loss.item()
    return total


def accumulate(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Backward over micro-batches, as one large batch would.

    Args:
        model: From ``(B, T)`` to logits ``(B, T, V)``.
        batches: Micro-batches of any shapes; a target of ``IGNORE`` does not
            count.

    Returns:
        The mean loss over all targets, in nats.

    Raises:
        ValueError: If no target counts.

    Examples:
        >>> model = nn.Embedding(2, 2)
        >>> _ = nn.init.zeros_(model.weight)
        >>> one = torch.tensor([[0]]), torch.tensor([[1]])
        >>> three = torch.tensor([[0, 0, 0]]), torch.tensor([[0, 0, 0]])
        >>> round(accumulate(model, [one, three]), 4)  # log 2
        0.6931
        >>> model.weight.grad[0].tolist()  # three targets of four say 0
        [-0.25, 0.25]
    """
    # known before the first piece runs: only targets are needed
    tokens = sum(int((targets != IGNORE).sum()) for _, targets in batches)
    if tokens == 0:
        raise ValueError(
            f"batches must hold a target that counts, got {len(batches)} "
            "without any"
        )
    total = 0.0
    for batch in batches:
        loss = _loss(model, batch, "sum") / tokens
        loss.backward()
        total += loss.item()
    return total


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``, in the dtype of ``total``, where it lies.

    Args:
        total: ``(M, N)``; most often fp32.
        a: ``(M, K)``; most often bf16.
        b: ``(K, N)``, as ``a``.

    Raises:
        ValueError: If the shapes do not fit.

    Examples:
        >>> total = torch.full((1, 1), 256.0)
        >>> one = torch.ones(1, 1, dtype=torch.bfloat16)
        >>> add_product(total, one, one)
        >>> total.item()  # bf16 would stay at 256
        257.0
    """
    if total.shape != (a.shape[0], b.shape[1]) or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"total must be (M, N) for a (M, K) and b (K, N), got "
            f"{tuple(total.shape)}, {tuple(a.shape)}, {tuple(b.shape)}"
        )
    short = a.dtype in (torch.bfloat16, torch.float16)
    if total.is_cuda and short and total.dtype == torch.float32:
        # reads 16 bits, adds to 32: beta is 1 unless told otherwise
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # nothing to mix, or no such product: a CPU widens first
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total = total
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        # the last dimension is the width, all others are tokens
        add_product(ctx.total, dy.flatten(0, -2).T, x.flatten(0, -2))
        return dx, None, None  # autograd sees no gradient of the weight


class AccumulatingLinear(nn.Linear):
    """A linear layer whose weight gradient goes straight into a sum.

    Attributes:
        main_grad: The sum, as large as the weight. ``MainGrads`` sets it;
            without one the layer is an ``nn.Linear``.

    Examples:
        >>> layer = AccumulatingLinear(1, 1, bias=False)
        >>> layer.main_grad = torch.zeros(1, 1)
        >>> for x in (1.0, 2.0):
        ...     layer(torch.full((1, 1), x)).sum().backward()
        >>> layer.weight.grad, layer.main_grad.item()
        (None, 3.0)
    """

    main_grad: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``; two dimensions at least."""
        if self.main_grad is None or not self.weight.requires_grad:
            return super().forward(x)
        apply: Any = _Accumulate.apply  # which PyTorch leaves untyped
        y: Tensor = apply(x, self.weight, self.main_grad)
        return y if self.bias is None else y + self.bias


class MainGrads:
    """Sums of gradients in the masters' dtype, over any number of pieces.

    Each master's ``.grad`` is the sum. After the last piece step the optimizer
    and call ``zero``; there is nothing to collect.

    Args:
        model: Its gradients are added as they arise, and freed.
        masters: One a parameter, as ``MasterWeights`` keeps them.

    Raises:
        ValueError: If masters and parameters do not match.

    Examples:
        >>> from warpmap.training.precision.mixed_precision import MasterWeights
        >>> model = nn.Linear(1, 1, bias=False)
        >>> weights = MasterWeights(model, torch.bfloat16)
        >>> main = MainGrads(model, weights.masters)
        >>> for _ in range(300):
        ...     model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        >>> weights.masters[0].grad.item(), model.weight.grad
        (300.0, None)
    """

    def __init__(self, model: nn.Module, masters: Sequence[Tensor]) -> None:
        """Make room for the sums, and listen to the model's gradients."""
        parameters = list(model.parameters())
        shapes = [p.shape for p in parameters], [m.shape for m in masters]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"masters must match the model's {len(parameters)} parameters "
                f"in order and shape, got {len(masters)}"
            )
        self._masters: list[Tensor] = []
        self._sums: dict[Tensor, Tensor] = {}  # by parameter
        for parameter, master in zip(parameters, masters, strict=True):
            if parameter.requires_grad:
                master.grad = torch.zeros_like(master)
                self._masters.append(master)
                self._sums[parameter] = master.grad
                parameter.register_post_accumulate_grad_hook(self._add)
        for module in model.modules():
            if isinstance(module, AccumulatingLinear):
                module.main_grad = self._sums.get(module.weight)

    @torch.no_grad()
    def _add(self, parameter: Tensor) -> None:
        if parameter.grad is not None:  # None where a fused layer added it
            self._sums[parameter].add_(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def zero(self) -> None:
        """Begin a new sum."""
        sums = list(self._sums.values())
        torch._foreach_zero_(sums)
        for master, total in zip(self._masters, sums, strict=True):
            master.grad = total  # in case the optimizer has let go of it
