"""Training with weights of 16 bits: what is rounded, and three remedies.

Matrices are multiplied in bf16 or fp16. What is small is then lost twice:

    update    w + u = w where u is below half the spacing at w: master weights
    gradient  fp16 ends at 2^-24: scale the loss, unscale the gradient
    sum       long sums stop growing: tensor cores add up in fp32

``round_to`` shows the rounding itself, on the bits of an fp32 number.

Reference: Micikevicius et al., 2017, https://arxiv.org/abs/1710.03740
Reference: Kalamkar et al., 2019, https://arxiv.org/abs/1905.12322
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from warpmap.hardware.gpu.number_formats import Format


def round_to(x: Tensor, form: Format) -> Tensor:
    """Round to a narrower format, on the bits; ties go to the even code.

    Args:
        x: Any shape, fp32.
        form: BF16, TF32, FP16 or another format with infinities, of at most
            8 exponent bits and 22 mantissa bits.

    Returns:
        Same shape, fp32 that holds only numbers of the format.

    Raises:
        ValueError: If ``x`` is not fp32, or the format is none of these.

    Examples:
        >>> from warpmap.hardware.gpu.number_formats import BF16, FP16
        >>> round_to(torch.tensor([1.001, 257.0, 1e30]), BF16)[:2].tolist()
        [1.0, 256.0]
        >>> round_to(torch.tensor([1e-8, 65520.0]), FP16).tolist()
        [0.0, inf]
    """
    if x.dtype != torch.float32:
        raise ValueError(f"x must be float32, got {x.dtype}")
    if form.specials != "ieee" or form.exponent > 8 or form.mantissa > 22:
        raise ValueError(f"form must be BF16, TF32, FP16 or alike, got {form}")

    dropped = 23 - form.mantissa
    bits = x.view(torch.int32)
    # just under half of the last bit kept; one more where that bit is odd
    half = (1 << (dropped - 1)) - 1
    odd = (bits >> dropped) & 1
    # a carry runs into the exponent: that is the next power of two, or inf
    rounded = ((bits + half + odd) >> dropped << dropped).view(torch.float32)

    if form.exponent < 8:
        # below its smallest normal number a format is evenly spaced
        evenly = torch.round(x / form.smallest) * form.smallest
        rounded = torch.where(x.abs() < form.smallest_normal, evenly, rounded)
        infinite = torch.full_like(x, math.inf).copysign(x)
        rounded = torch.where(rounded.abs() > form.largest, infinite, rounded)
    return torch.where(x.isnan(), x, rounded)  # the carry would break a nan


class MasterWeights:
    """Weights in fp32 that the optimizer updates, for a model of 16 bits.

    A step is ``backward()``, ``collect()``, an optimizer's step on
    ``masters``, ``publish()``. Buffers keep their dtype.

    Args:
        model: Its parameters become ``dtype``, where they lie.
        dtype: Of the model's parameters; most often ``torch.bfloat16``.

    Attributes:
        masters: One a parameter, in the order of ``model.parameters()``; fp32
            (float64 for a model of float64), with what ``dtype`` rounds off.

    Raises:
        ValueError: If ``dtype`` is no floating-point type.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> weights = MasterWeights(model, torch.bfloat16)
        >>> for _ in range(3):
        ...     model(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        ...     weights.collect()
        ...     with torch.no_grad():
        ...         weights.masters[0] -= 0.001 * weights.masters[0].grad
        ...     weights.publish()
        >>> round(weights.masters[0].item(), 4), model.weight.item()
        (0.997, 0.99609375)
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Copy the parameters, then round them."""
        if not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point one, got {dtype}")
        wide = torch.promote_types(dtype, torch.float32)
        self._parameters: list[Tensor] = list(model.parameters())
        self.masters: list[Tensor] = []
        for parameter in self._parameters:
            master = parameter.detach().to(wide, copy=True)
            self.masters.append(master.requires_grad_(parameter.requires_grad))
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def collect(self) -> None:
        """Copy the model's gradients to the masters, and clear the model's.

        A parameter without a gradient leaves its master without one.
        """
        narrow, wide = [], []
        for parameter, master in zip(
            self._parameters, self.masters, strict=True
        ):
            if parameter.grad is None:
                master.grad = None
                continue
            if master.grad is None:
                master.grad = torch.empty_like(master)
            narrow.append(parameter.grad)
            wide.append(master.grad)
            parameter.grad = None
        if narrow:
            torch._foreach_copy_(wide, narrow)  # few launches, not one each

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        if self.masters:
            torch._foreach_copy_(self._parameters, self.masters)


class LossScaler:
    """Keeps gradients in reach of fp16: halves on overflow, doubles on calm.

    Args:
        scale: What the loss is multiplied by at first.
        growth: Multiplies the scale after ``interval`` steps without overflow.
        backoff: Multiplies the scale after an overflow.
        interval: Steps in a row without overflow before the scale grows.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> scaler = LossScaler(scale=8.0, interval=2)
        >>> w = torch.ones(1, requires_grad=True)
        >>> for slope in (3.0, math.inf, 3.0, 3.0):
        ...     w.grad = torch.tensor([slope]) * scaler.scale
        ...     print(scaler.unscale([w]), w.grad.item(), scaler.scale)
        True 3.0 8.0
        False inf 4.0
        True 3.0 4.0
        True 3.0 8.0
    """

    def __init__(
        self,
        scale: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
    ) -> None:
        """Start with a scale and no steps counted."""
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be positive and finite, got {scale}")
        if growth <= 1 or not 0 < backoff < 1 or interval < 1:
            raise ValueError(
                "growth must be above 1, backoff between 0 and 1, interval at "
                f"least 1; got {growth}, {backoff}, {interval}"
            )
        self.scale, self.interval = scale, interval
        self._growth, self._backoff, self._calm = growth, backoff, 0

    @torch.no_grad()
    def unscale(self, params: Iterable[Tensor]) -> bool:
        """Divide the gradients by the scale, then set the next scale.

        Args:
            params: Tensors that carry ``.grad``, the masters.

        Returns:
            Whether all gradients are finite; if not, skip the step.

        Raises:
            ValueError: If there are no gradients, or some are fp16.
        """
        grads = [p.grad for p in params if p.grad is not None]
        if not grads or any(g.dtype == torch.float16 for g in grads):
            raise ValueError(
                "params must carry gradients, in fp32: an unscaled one may be "
                f"too small for fp16; got {[g.dtype for g in grads]}"
            )
        torch._foreach_mul_(grads, 1 / self.scale)
        # one answer for all, so that the host waits for the device once
        finite = torch.stack([g.isfinite().all() for g in grads]).all().item()

        self._calm = self._calm + 1 if finite else 0
        if not finite:
            self.scale *= self._backoff
        elif self._calm == self.interval:
            self.scale, self._calm = self.scale * self._growth, 0
        return bool(finite)
