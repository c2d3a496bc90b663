"""Six optimizers: what each makes of a gradient, and what it must remember.

    SGD        g, smoothed                   4 bytes of state in fp32
    Adam       g over its usual size         8
    AdamW      the same, decay kept apart    8
    Adafactor  the same from sums            4 (M + N) / (M N)
    Lion       the sign of g, smoothed       4
    Muon       g with singular values 1      4

Each keeps its state in the dtype of the parameter: give it float32 masters.

Reference: Kingma and Ba, 2015, https://arxiv.org/abs/1412.6980
Reference: Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235
Reference: Loshchilov and Hutter, 2019, https://arxiv.org/abs/1711.05101
Reference: Chen et al., 2023, https://arxiv.org/abs/2302.06675
Reference: Liu et al., 2025, https://arxiv.org/abs/2502.16982
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from warpmap.training.foundations._newton_schulz import orthogonalize
from warpmap.training.foundations._optimizer import (
    Optimizer,
    State,
    at_least_0,
    below_1,
)


class SGD(Optimizer):
    """Gradient descent with momentum: a ball that rolls downhill.

    Args:
        params: Tensors to change.
        lr: Learning rate.
        momentum: What the velocity keeps in a step.

    Examples:
        >>> p = torch.zeros(1)
        >>> sgd, p.grad = SGD([p], lr=1.0, momentum=0.5), torch.ones(1)
        >>> [(sgd.step(), p.item())[1] for _ in range(3)]
        [-1.0, -2.5, -4.25]
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float = 0.9
    ) -> None:
        """Start at rest."""
        self.momentum = below_1("momentum", momentum)
        super().__init__(params, lr)

    def _new_state(self, p: Tensor) -> State:
        return {"velocity": torch.zeros_like(p)}

    def _update(self, p: Tensor, g: Tensor, step: int, state: State) -> None:
        velocity = state["velocity"].mul_(self.momentum).add_(g)
        p.sub_(velocity, alpha=self.lr)


class Adam(Optimizer):
    """Each element's smoothed gradient, over its usual size.

    Args:
        params: Tensors to change.
        lr: Learning rate: about what an element moves in a step.
        betas: What the two running means keep in a step.
        eps: Added below the line.
        weight_decay: Added to the gradient, times the parameter; so it is
            divided like the gradient. ``AdamW`` keeps it apart.

    Examples:
        >>> p = torch.ones(2)
        >>> adam, p.grad = Adam([p], lr=0.25), torch.tensor([7.0, -0.007])
        >>> adam.step(); [round(x, 3) for x in p.tolist()]  # lr, whatever g
        [0.75, 1.25]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        """Start both means at zero."""
        self.betas = below_1("betas", betas[0]), below_1("betas", betas[1])
        self.eps = at_least_0("eps", eps)
        self.weight_decay = at_least_0("weight_decay", weight_decay)
        super().__init__(params, lr)

    def _new_state(self, p: Tensor) -> State:
        return {"mean": torch.zeros_like(p), "square": torch.zeros_like(p)}

    def _update(self, p: Tensor, g: Tensor, step: int, state: State) -> None:
        beta1, beta2 = self.betas
        g = g.add(p, alpha=self.weight_decay)
        mean = state["mean"].lerp_(g, 1 - beta1)
        square = state["square"].lerp_(g * g, 1 - beta2)
        # the means start at zero, so early ones are too small
        mean = mean / (1 - beta1**step)
        square = square / (1 - beta2**step)
        p.sub_(mean / (square.sqrt() + self.eps), alpha=self.lr)


class AdamW(Adam):
    """Adam with the decay apart, for all parameters in a few launches.

    Args:
        params: Tensors to change.
        lr: Learning rate.
        betas: What the two running means keep in a step.
        eps: Added below the line.
        weight_decay: What a parameter loses in a step, over ``lr``.

    Examples:
        >>> p = torch.ones(1)
        >>> adamw, p.grad = AdamW([p], lr=0.25, weight_decay=1.0), p * 7
        >>> adamw.step(); p.tolist()  # 1 - 0.25 of decay - 0.25 of gradient
        [0.5]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        """Start both means at zero."""
        super().__init__(params, lr, betas, eps, weight_decay)

    def _update_all(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        steps: list[int],
        states: list[State],
    ) -> None:
        beta1, beta2 = self.betas
        means = [state["mean"] for state in states]
        squares = [state["square"] for state in states]
        # each line is one launch for many tensors, not one for each
        torch._foreach_mul_(params, 1 - self.lr * self.weight_decay)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        below = torch._foreach_sqrt(squares)
        torch._foreach_div_(below, [math.sqrt(1 - beta2**t) for t in steps])
        torch._foreach_add_(below, self.eps)
        sizes = [-self.lr / (1 - beta1**t) for t in steps]
        torch._foreach_addcdiv_(params, means, below, sizes)


class Adafactor(Optimizer):
    """Adam without a mean, its squares kept as sums of rows and columns.

    Args:
        params: Tensors to change. Of more than two dimensions the last two
            are a matrix; of one, all squares are kept.
        lr: Largest step, relative to the parameter's own size.
        decay: After ``t`` steps the running means take ``t**-decay`` of what
            is new.
        eps: Smallest size of a parameter that a step is relative to.
        clip: Largest root mean square of an update, before ``lr``.

    Examples:
        >>> p = torch.ones(2, 2)
        >>> ada, p.grad = Adafactor([p], lr=0.25), torch.ones(2, 2) * 7
        >>> ada.step(); p.tolist()
        [[0.75, 0.75], [0.75, 0.75]]
        >>> [x.numel() for x in ada.state[0].values()]
        [2, 2]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-2,
        decay: float = 0.8,
        eps: float = 1e-3,
        clip: float = 1.0,
    ) -> None:
        """Start the sums at zero."""
        self.decay = at_least_0("decay", decay)
        self.eps = at_least_0("eps", eps)
        if not clip > 0:
            raise ValueError(f"clip must be above 0, got {clip}")
        self.clip = clip
        super().__init__(params, lr)

    def _new_state(self, p: Tensor) -> State:
        if p.ndim < 2:
            return {"square": torch.zeros_like(p)}
        return {
            "row": p.new_zeros(*p.shape[:-1], 1),
            "column": p.new_zeros(*p.shape[:-2], 1, p.shape[-1]),
        }

    def _update(self, p: Tensor, g: Tensor, step: int, state: State) -> None:
        new = step**-self.decay
        tiny = torch.finfo(p.dtype).eps
        if p.ndim < 2:
            square = state["square"].lerp_(g * g, new).clone()
        else:
            row = state["row"].lerp_((g * g).mean(-1, keepdim=True), new)
            column = state["column"].lerp_((g * g).mean(-2, keepdim=True), new)
            # the matrix of rank one that has these rows and columns
            square = row * column / row.mean(-2, keepdim=True).clamp(min=tiny)
        update = g / square.clamp(min=tiny**2).sqrt()
        update /= (_rms(update) / self.clip).clamp(min=1)
        rate = min(self.lr, step**-0.5)
        p.sub_(update * _rms(p).clamp(min=self.eps), alpha=rate)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


class Lion(Optimizer):
    """The sign of the smoothed gradient: every element moves by ``lr``.

    Args:
        params: Tensors to change.
        lr: Learning rate: what an element moves in a step; a third to a tenth
            of Adam's.
        betas: What the direction and the running mean keep of the old mean.
        weight_decay: What a parameter loses in a step, over ``lr``.

    Examples:
        >>> p = torch.ones(3)
        >>> lion, p.grad = Lion([p], lr=0.25), torch.tensor([7.0, -0.007, 0.0])
        >>> lion.step(); p.tolist()
        [0.75, 1.25, 1.0]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        """Start the mean at zero."""
        self.betas = below_1("betas", betas[0]), below_1("betas", betas[1])
        self.weight_decay = at_least_0("weight_decay", weight_decay)
        super().__init__(params, lr)

    def _new_state(self, p: Tensor) -> State:
        return {"mean": torch.zeros_like(p)}

    def _update(self, p: Tensor, g: Tensor, step: int, state: State) -> None:
        beta1, beta2 = self.betas
        # the new gradient counts more for the step than for the memory
        sign = state["mean"].lerp(g, 1 - beta1).sign_()
        state["mean"].lerp_(g, 1 - beta2)
        p.mul_(1 - self.lr * self.weight_decay).sub_(sign, alpha=self.lr)


class Muon(Optimizer):
    """Momentum, made orthogonal: every direction of a matrix moves as far.

    Args:
        params: Matrices of hidden layers; the rest takes another optimizer.
        lr: Learning rate, as for AdamW: updates get a root mean square of 0.2.
        momentum: What the running mean keeps in a step.
        weight_decay: What a parameter loses in a step, over ``lr``.
        dtype: Of the products in ``orthogonalize``.

    Examples:
        >>> p = torch.zeros(2, 2)
        >>> muon, p.grad = Muon([p], lr=1.0), torch.diag(torch.tensor([7.0, 1]))
        >>> muon.step(); [round(x, 1) for x in p.diag().tolist()]
        [-0.2, -0.2]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        dtype: torch.dtype | None = torch.bfloat16,
    ) -> None:
        """Start the mean at zero."""
        self.momentum = below_1("momentum", momentum)
        self.weight_decay = at_least_0("weight_decay", weight_decay)
        self.dtype = dtype
        super().__init__(params, lr)

    def _new_state(self, p: Tensor) -> State:
        if p.ndim != 2:
            raise ValueError(f"expected matrices, got shape {tuple(p.shape)}")
        return {"mean": torch.zeros_like(p)}

    def _update(self, p: Tensor, g: Tensor, step: int, state: State) -> None:
        mean = state["mean"].lerp_(g, 1 - self.momentum)
        ahead = g.lerp(mean, self.momentum)  # Nesterov: where it will be next
        update = orthogonalize(ahead, dtype=self.dtype)
        p.mul_(1 - self.lr * self.weight_decay)
        # M N elements share a squared norm of min(M, N)
        p.sub_(update, alpha=0.2 * math.sqrt(max(p.shape)) * self.lr)
