"""Gradients of a model that forgets its activations and computes them again.

A segment of layers keeps its input and nothing else. When the backward pass
comes to it, it runs once more, now with a graph that is used at once.

    plain           every layer keeps all that its backward pass needs
    in segments     inputs of segments, and the inside of one segment at a time
    nested          segments within segments: a fixed number of inputs, and
                    more forward passes

The second run must see what the first saw: the same random numbers, the same
autocast. Then the gradients are the same to the last bit.

Reference: Chen, Xu, Zhang and Guestrin, 2016, https://arxiv.org/abs/1604.06174
Reference: Griewank and Walther, 2000, https://doi.org/10.1145/347837.347846
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from warpmap.training.cost._recompute_plan import split


class _Conditions:
    """What a segment's result depends on besides its inputs and weights."""

    def __init__(self, device: torch.device) -> None:
        self.device, kind = device, device.type
        self.cpu = torch.get_rng_state()
        self.gpus = [device] if kind == "cuda" else []
        self.cuda = [torch.cuda.get_rng_state(gpu) for gpu in self.gpus]
        self.low = torch.get_autocast_dtype(kind)
        self.is_low = torch.is_autocast_enabled(kind)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Have them once more, and leave the present ones as they are."""
        with (
            torch.random.fork_rng(devices=self.gpus),
            torch.autocast(self.device.type, self.low, self.is_low),
        ):
            torch.set_rng_state(self.cpu)
            for gpu, state in zip(self.gpus, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, gpu)
            yield


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, segment: nn.Module, weights: Tensor, *inputs: Tensor
    ) -> Any:
        # autograd records nothing in here: what the segment would save is gone
        ctx.segment, ctx.inputs = segment, len(inputs)
        ctx.conditions = _Conditions(inputs[0].device)
        # weights too, so that autograd tells if they change before their turn
        ctx.save_for_backward(*inputs, *segment.parameters())
        return segment(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        if not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "a checkpoint adds to the .grad of all weights, so call "
                "backward() without inputs, not torch.autograd.grad"
            )
        # cut off from what came before, whose turn is later
        inputs = [
            x.detach().requires_grad_(x.requires_grad)
            for x in ctx.saved_tensors[: ctx.inputs]
        ]
        with torch.enable_grad(), ctx.conditions.again():
            end = get_gradient_edge(ctx.segment(*inputs))
        # a weight's gradient goes to its .grad at once, none waits in here
        torch.autograd.backward(end, grad)
        return None, None, *(x.grad for x in inputs)


def checkpoint(segment: nn.Module, *inputs: Tensor) -> Tensor:
    """What ``segment`` makes of ``inputs``, keeping only these.

    The weights get gradients even if no input needs one, as the first layer's
    does not: an empty tensor stands for them among the function's inputs.

    Their gradients are added to ``.grad`` in the middle of the backward pass,
    where autograd does not see them. So ``torch.autograd.grad`` through a
    checkpoint raises a RuntimeError, and so does ``backward`` with ``inputs``.
    If they ask for weights of segments alone, the path is not found: ``grad``
    raises as for unused ones, or gives None with ``allow_unused``, and
    ``backward`` does nothing. Gradients of gradients are not to be had either.

    Args:
        segment: A module that returns one tensor, a function of inputs,
            parameters, PyTorch's generators and autocast alone.
        inputs: Its arguments, at least one.

    Raises:
        ValueError: If ``segment`` is no module or an input no tensor.

    Examples:
        >>> layer = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        >>> checkpoint(layer, torch.ones(1, 2)).sum().backward()
        >>> layer[0].weight.grad.shape
        torch.Size([2, 2])
    """
    if not isinstance(segment, nn.Module):
        raise ValueError(
            "segment must be a module, so that its weights are known, got "
            f"{type(segment).__name__}"
        )
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        kinds = [type(x).__name__ for x in inputs]
        raise ValueError(f"inputs must be one or more tensors, got {kinds}")
    learns = any(w.requires_grad for w in segment.parameters())
    apply: Any = _Recompute.apply
    out: Tensor = apply(segment, torch.empty(0, requires_grad=learns), *inputs)
    return out


class Recomputed(nn.Module):
    """A module that keeps its inputs only.

    Examples:
        >>> layer = Recomputed(nn.Linear(2, 3))
        >>> layer(torch.ones(1, 2)).shape
        torch.Size([1, 3])
    """

    def __init__(self, segment: nn.Module) -> None:
        """Wrap a module; its weights stay its own."""
        super().__init__()
        self.segment = segment

    def forward(self, *inputs: Tensor) -> Tensor:
        """As the module does."""
        return checkpoint(self.segment, *inputs)


def in_segments(
    layers: Sequence[nn.Module], sizes: Sequence[int]
) -> nn.Sequential:
    """The layers in a row, all segments but the last recomputed.

    The last one's backward pass comes first, so forgetting it saves nothing.

    Args:
        layers: Modules from one tensor to one.
        sizes: Layers in each segment.

    Raises:
        ValueError: If the sizes do not add up to the layers.

    Examples:
        >>> model = in_segments([nn.Linear(2, 2) for _ in range(5)], [2, 2, 1])
        >>> [type(part).__name__ for part in model]
        ['Recomputed', 'Recomputed', 'Sequential']
    """
    if min(sizes, default=0) < 1 or sum(sizes) != len(layers):
        raise ValueError(
            f"sizes must be 1 or more and add up to {len(layers)} layers, "
            f"got {list(sizes)}"
        )
    left = iter(layers)
    parts = [
        nn.Sequential(*(next(left) for _ in range(size))) for size in sizes
    ]
    return nn.Sequential(*(Recomputed(p) for p in parts[:-1]), parts[-1])


def nested(layers: Sequence[nn.Module], slots: int) -> nn.Module:
    """The layers in a row, as segments within segments.

    Splits where the fewest calls of layers are needed.

    Args:
        layers: Modules from one tensor to one, at least one.
        slots: Inputs that may be kept at once, besides the first.

    Examples:
        >>> nested([nn.Identity() for _ in range(3)], slots=0)
        Sequential(
          (0): Recomputed(
            (segment): Sequential(
              (0): Recomputed(
                (segment): Identity()
              )
              (1): Identity()
            )
          )
          (1): Identity()
        )
    """
    if len(layers) == 1:
        return layers[0]
    k = split(len(layers), slots)
    first, rest = nested(layers[:k], slots), nested(layers[k:], slots - 1)
    return nn.Sequential(Recomputed(first), rest)
