"""A network and all that trains it, on the engine of ``autograd``.

    Linear         x W^T + b: the only weights
    cross_entropy  how wrong the scores are, as one number
    SGD, Adam      a step against the gradient
    batches        all examples in a new order, a few at a time
    train          forward, backward, step, again

Names, shapes and defaults are those of PyTorch, so that the two can be
compared number by number.

Reference: Rumelhart et al., 1986, https://doi.org/10.1038/323533a0
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from random import Random

from warpmap.training.foundations.autograd import Tensor, tensor

Example = tuple[Sequence[float], int]
"""Features, and the number of the class they belong to."""


class Linear:
    """Scores that are weighted sums of the inputs.

    Args:
        inputs: Numbers an example.
        outputs: Scores an example.
        rng: Source of the initial weights.

    Examples:
        >>> layer = Linear(3, 2, Random(0))
        >>> layer.weight.shape, layer(tensor([[1.0, 2.0, 3.0]])).shape
        ((2, 3), (1, 2))
    """

    def __init__(self, inputs: int, outputs: int, rng: Random) -> None:
        """Draw weights so that a sum of many is no larger than one input."""
        limit = 1 / math.sqrt(inputs)

        def row(n: int) -> list[float]:
            return [rng.uniform(-limit, limit) for _ in range(n)]

        self.weight = tensor([row(inputs) for _ in range(outputs)])
        self.bias = tensor(row(outputs))

    def __call__(self, x: Tensor) -> Tensor:
        """From ``(B, inputs)`` to ``(B, outputs)``."""
        return x @ self.weight.T + self.bias


class MLP:
    """Linear layers with a ReLU between them.

    Args:
        widths: Numbers an example at the input, after each layer but the last,
            and at the output.
        seed: Of the initial weights.

    Raises:
        ValueError: If there are fewer than two widths, or one is below 1.

    Examples:
        >>> model = MLP([2, 8, 3])
        >>> [len(p.data) for p in model.parameters()]
        [16, 8, 24, 3]
    """

    def __init__(self, widths: Sequence[int], seed: int = 0) -> None:
        """Draw all weights."""
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"expected 2 or more widths above 0, got {widths}")
        rng = Random(seed)
        self.layers = [
            Linear(inputs, outputs, rng) for inputs, outputs in pairwise(widths)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """Scores of each class, ``(B, classes)``."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)

    def parameters(self) -> list[Tensor]:
        """Weight and bias of each layer."""
        return [p for layer in self.layers for p in (layer.weight, layer.bias)]


def cross_entropy(scores: Tensor, classes: Sequence[int]) -> Tensor:
    """Mean over the batch of minus the log-probability of the true class.

    Args:
        scores: ``(B, classes)``; their softmax is the model's probabilities.
        classes: The true one of each example.

    Raises:
        ValueError: If their numbers differ.

    Examples:
        >>> loss = cross_entropy(tensor([[0.0, 0.0]]), [1])
        >>> round(loss.item(), 6)  # log 2: the model has no idea
        0.693147
    """
    if scores.shape[0] != len(classes):
        raise ValueError(
            f"expected {scores.shape[0]} classes, one a row, got {len(classes)}"
        )
    true = scores[range(len(classes)), classes]
    return scores.logsumexp().mean() - true.mean()


class SGD:
    """A step against the gradient, smoothed by momentum.

    Args:
        params: Tensors to change.
        lr: Learning rate.
        momentum: What the velocity keeps in a step.

    Examples:
        >>> p = tensor([1.0])
        >>> p.grad = [2.0]
        >>> SGD([p], lr=0.25).step(); p.tolist()
        [0.5]
    """

    def __init__(
        self, params: Sequence[Tensor], lr: float, momentum: float = 0.0
    ) -> None:
        """Start at rest."""
        self.params, self.lr, self.momentum = params, lr, momentum
        self.velocity = [[0.0] * len(p.data) for p in params]

    def step(self) -> None:
        """Change every tensor that has a gradient."""
        for p, v in zip(self.params, self.velocity, strict=True):
            if p.grad is None:
                continue
            v[:] = [
                self.momentum * a + g for a, g in zip(v, p.grad, strict=True)
            ]
            # a new list: a tape may still hold the old one
            p.data = [x - self.lr * a for x, a in zip(p.data, v, strict=True)]


class Adam:
    """A step of about ``lr`` for each number, whatever its gradient's size.

    Args:
        params: Tensors to change.
        lr: Learning rate.
        betas: What the means of gradients and of their squares keep in a step.
        eps: Added below the line.

    Examples:
        >>> p = tensor([1.0, 1.0])
        >>> p.grad = [200.0, -0.02]
        >>> Adam([p], lr=0.25).step(); [round(x, 6) for x in p.data]
        [0.75, 1.25]
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """Start both means at zero."""
        self.params, self.lr, self.betas, self.eps = params, lr, betas, eps
        self.means = [[0.0] * len(p.data) for p in params]
        self.squares = [[0.0] * len(p.data) for p in params]
        self.steps = 0

    def step(self) -> None:
        """Change every tensor that has a gradient."""
        self.steps += 1
        b1, b2 = self.betas
        # both means start at zero: what is missing from them so far
        c1, c2 = 1 - b1**self.steps, 1 - b2**self.steps
        for p, m, s in zip(self.params, self.means, self.squares, strict=True):
            if p.grad is None:
                continue
            m[:] = [
                b1 * a + (1 - b1) * g for a, g in zip(m, p.grad, strict=True)
            ]
            s[:] = [
                b2 * a + (1 - b2) * g * g
                for a, g in zip(s, p.grad, strict=True)
            ]
            p.data = [
                x - self.lr * (a / c1) / (math.sqrt(b / c2) + self.eps)
                for x, a, b in zip(p.data, m, s, strict=True)
            ]


def batches(
    examples: Sequence[Example], size: int, rng: Random
) -> Iterator[tuple[Tensor, list[int]]]:
    """Every example once, in random order; the last batch may be smaller.

    Args:
        examples: All of them.
        size: Examples a batch.
        rng: Source of the order.

    Yields:
        Features ``(B, inputs)``, and B classes.

    Raises:
        ValueError: If ``size`` is below 1.

    Examples:
        >>> data = [([0.5], 0), ([1.5], 1), ([2.5], 0)]
        >>> [len(classes) for _, classes in batches(data, 2, Random(0))]
        [2, 1]
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    order = rng.sample(range(len(examples)), len(examples))
    for start in range(0, len(order), size):
        chosen = [examples[i] for i in order[start : start + size]]
        features = tensor([x for x, _ in chosen], needs_grad=False)
        yield features, [c for _, c in chosen]


def train(
    model: MLP,
    optimizer: SGD | Adam,
    examples: Sequence[Example],
    size: int,
    epochs: int,
    seed: int = 0,
    record: Callable[[int, float], object] | None = None,
) -> list[float]:
    """Pass over the examples again and again, with a step for each batch.

    Args:
        model: What to train.
        optimizer: Of its parameters.
        examples: What to learn.
        size: Examples a batch.
        epochs: Passes over all examples.
        seed: Of their order.
        record: Hears of each step, counted from 1, and of its loss.

    Returns:
        The loss of each batch, before its step.

    Examples:
        >>> model = MLP([1, 2])
        >>> data = [([-1.0], 0), ([1.0], 1)]
        >>> losses = train(model, SGD(model.parameters(), 0.5), data, 2, 20)
        >>> losses[-1] < 0.2 < losses[0]
        True
    """
    rng = Random(seed)
    losses: list[float] = []
    for _ in range(epochs):
        for features, classes in batches(examples, size, rng):
            loss = cross_entropy(model(features), classes)
            for p in optimizer.params:
                p.grad = None  # or the gradients of all steps would add up
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if record:
                record(len(losses), losses[-1])
    return losses
