"""How large weights start, and how far a step moves them, by depth and width.

    depth  a layer multiplies mean squares by variance * fan_in * E[f(z)^2],
           and the network by that to the power of its depth
    width  Adam moves every weight by the learning rate; in a sum of n terms
           n such moves add up, where n random weights grow by sqrt(n)

Initialization answers the first, a parametrization the second: it says how
multiplier, deviation and learning rate of a matrix follow the width.

Reference: Glorot and Bengio, 2010, Understanding the Difficulty of Training
    Deep Feedforward Neural Networks
Reference: He et al., 2015, https://arxiv.org/abs/1502.01852
Reference: Yang et al., 2022, https://arxiv.org/abs/2203.03466
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from warpmap.chart import Axis, Line, LineChart

Start = Literal["He", "Xavier", "LeCun", "PyTorch", "0.02"]
Activation = Literal["ReLU", "tanh", "GELU", "linear"]
Parametrization = Literal["standard", "NTK", "muP"]
STARTS = ("He", "Xavier", "LeCun", "PyTorch", "0.02")
ACTIVATIONS = ("ReLU", "tanh", "GELU", "linear")


def fans(shape: Sequence[int]) -> tuple[int, int]:
    """Terms that a weight's output sums, and outputs that an input reaches.

    Args:
        shape: ``(out, in)``, or ``(out, in, *kernel)`` of a convolution.

    Returns:
        Fan-in and fan-out.

    Raises:
        ValueError: If ``shape`` has fewer than two sizes.

    Examples:
        >>> fans((4096, 1024))
        (1024, 4096)
        >>> fans((64, 3, 7, 7))
        (147, 3136)
    """
    if len(shape) < 2:
        raise ValueError(f"shape must be (out, in, ...), got {tuple(shape)}")
    outputs, inputs, *kernel = shape
    return inputs * math.prod(kernel), outputs * math.prod(kernel)


def weight_variance(start: Start, fan_in: int, fan_out: int) -> float:
    """Variance of a new weight.

    Args:
        start: The rule; ``"PyTorch"`` is what ``nn.Linear`` does unasked,
            ``"0.02"`` a fixed deviation, as GPT-2 has it.
        fan_in: Terms of the sum that the weight is part of.
        fan_out: Sums that its input is part of.

    Raises:
        ValueError: If the rule is unknown or a fan is below 1.

    Examples:
        >>> weight_variance("He", fan_in=50, fan_out=200)
        0.04
        >>> weight_variance("Xavier", fan_in=50, fan_out=200)
        0.008
    """
    if start not in STARTS:
        raise ValueError(f"start must be one of {STARTS}, got {start!r}")
    if min(fan_in, fan_out) < 1:
        raise ValueError(f"fans must be at least 1, got {fan_in}, {fan_out}")
    return {
        "He": 2 / fan_in,
        "Xavier": 2 / (fan_in + fan_out),
        "LeCun": 1 / fan_in,
        "PyTorch": 1 / (3 * fan_in),  # uniform up to 1 / sqrt(fan_in)
        "0.02": 0.02**2,
    }[start]


def moments(activation: Activation, mean_square: float) -> tuple[float, float]:
    """Mean squares of an activation and of its slope, for normal inputs.

    Args:
        activation: The function, ``f``.
        mean_square: Variance of its input ``z``, whose mean is 0.

    Returns:
        ``E[f(z)^2]`` and ``E[f'(z)^2]``: exact for straight pieces, otherwise
        by a sum, off by no more than rounding while ``z`` is below some 30.

    Raises:
        ValueError: If the activation is unknown.

    Examples:
        >>> moments("ReLU", 3.0)
        (1.5, 0.5)
        >>> [round(m, 4) for m in moments("tanh", 1.0)]
        [0.3943, 0.4644]
    """
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {ACTIVATIONS}, got {activation!r}"
        )
    if activation == "linear":
        return mean_square, 1.0
    if activation == "ReLU":
        return mean_square / 2, 0.5

    deviation, step = math.sqrt(mean_square), 1 / 32
    value = slope = 0.0
    for i in range(-9 * 32, 9 * 32 + 1):
        u = i * step
        weight = step * math.exp(-u * u / 2) / math.sqrt(2 * math.pi)
        z = deviation * u
        if activation == "tanh":
            f = math.tanh(z)
            df = 1 - f * f
        else:
            below = (1 + math.erf(z / math.sqrt(2))) / 2
            f = z * below
            df = below + z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)
        value += weight * f * f
        slope += weight * df * df
    return value, slope


def sizes_by_layer(
    start: Start, activation: Activation, depth: int, width: int
) -> tuple[list[float], list[float]]:
    """Expected mean squares at the borders of layers, input first.

    Args:
        start: Rule of the first weights.
        activation: Function after every matrix.
        depth: Layers, 1 to 200.
        width: Values a layer, 1 to 65536.

    Returns:
        Of values, from 1 at the input; of gradients, from 1 at the output.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> sizes_by_layer("Xavier", "ReLU", depth=3, width=64)
        ([1.0, 0.5, 0.25, 0.125], [0.125, 0.25, 0.5, 1.0])
    """
    for name, number, most in (("depth", depth, 200), ("width", width, 65536)):
        if not 1 <= number <= most:
            raise ValueError(f"{name} must be 1 to {most}, got {number}")
    gain = width * weight_variance(start, width, width)
    values, slopes = [1.0], []
    for _ in range(depth):
        value, slope = moments(activation, gain * values[-1])
        values.append(value)
        slopes.append(slope)
    gradients = [1.0]
    for slope in reversed(slopes):
        gradients.append(gain * slope * gradients[-1])
    return values, gradients[::-1]


@dataclass(frozen=True)
class Signal:
    """Sizes in an untrained network, for an input and a gradient of size 1.

    Attributes:
        weight_std: Standard deviation of a new weight.
        value: Size (root mean square) of the last layer's output.
        gradient: Size of the gradient that reaches the input.
    """

    weight_std: float
    value: float
    gradient: float


def signal(
    start: Start = "PyTorch",
    activation: Activation = "ReLU",
    depth: int = 50,
    width: int = 512,
) -> Signal:
    """What is left of an input after many layers, and of a gradient.

    Args:
        start: Rule of the first weights.
        activation: Function after every matrix.
        depth: Layers, 1 to 200.
        width: Values a layer, 1 to 65536.

    Returns:
        Expected sizes, without biases.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> signal("He", "ReLU").value
        1.0
        >>> f"{signal('PyTorch', 'ReLU').value:.0e}"
        '4e-20'
    """
    values, gradients = sizes_by_layer(start, activation, depth, width)
    return Signal(
        weight_std=math.sqrt(weight_variance(start, width, width)),
        value=math.sqrt(values[-1]),
        gradient=math.sqrt(gradients[0]),
    )


def signal_chart(
    start: Start = "PyTorch",
    activation: Activation = "ReLU",
    depth: int = 50,
    width: int = 512,
) -> LineChart:
    """Sizes of values and gradients by layer; arguments as of ``signal``.

    Examples:
        >>> [line.name for line in signal_chart().lines]
        ['values', 'gradients']
    """
    both = sizes_by_layer(start, activation, depth, width)
    return LineChart(
        f"{start}, {activation}",
        Axis("layer"),
        Axis("size (root mean square)", log=True),
        [
            Line(name, [(i, math.sqrt(m)) for i, m in enumerate(squares)])
            for name, squares in zip(("values", "gradients"), both, strict=True)
        ],
    )


@dataclass(frozen=True)
class Scaling:
    """How a matrix follows the width ``n``: each factor is ``n ** -power``.

    Attributes:
        multiplier: Power of the fixed factor before the matrix.
        deviation: Power of the standard deviation of a new weight.
        rate: Power of Adam's learning rate.
    """

    multiplier: float
    deviation: float
    rate: float


HIDDEN: dict[Parametrization, Scaling] = {
    "standard": Scaling(0, 0.5, 0),
    "NTK": Scaling(0.5, 0, 0),
    "muP": Scaling(0, 0.5, 1),
}
"""For matrices from ``n`` values to ``n``."""

OUTPUT: dict[Parametrization, Scaling] = {
    "standard": Scaling(0, 0.5, 0),
    "NTK": Scaling(0.5, 0, 0),
    "muP": Scaling(0, 1, 1),
}
"""For the last matrix. The first sums few terms, and all powers are 0."""


@dataclass(frozen=True)
class Coordinates:
    """Sizes in a network, or the powers of its width that they grow with.

    Attributes:
        hidden_start: Hidden values, before training.
        hidden_change: How far one step of Adam moves them.
        output_start: Outputs, before training.
        output_change: How far one step of Adam moves them.
    """

    hidden_start: float
    hidden_change: float
    output_start: float
    output_change: float


def growth(rule: Parametrization) -> Coordinates:
    """Powers of the width that sizes grow with, in closed form.

    Args:
        rule: The parametrization.

    Raises:
        ValueError: If it is unknown.

    Examples:
        >>> growth("standard").output_change, growth("muP").output_change
        (1.5, 0.0)
    """
    if rule not in HIDDEN:
        raise ValueError(f"rule must be one of {[*HIDDEN]}, got {rule!r}")
    hidden, output = HIDDEN[rule], OUTPUT[rule]
    # n random terms of one sum grow by sqrt(n), n moves of one mind by n
    hidden_size = hidden.multiplier + hidden.deviation
    output_size = output.multiplier + output.deviation
    hidden_change = max(0.0, 1 - hidden.multiplier - hidden.rate)
    return Coordinates(
        hidden_start=0.5 - hidden_size,
        hidden_change=hidden_change,
        output_start=0.5 - output_size,
        # its own moves; and hidden values move along the output's weights
        output_change=max(
            1.0 - output.multiplier - output.rate,
            1.0 - output_size + hidden_change,
        ),
    )


@dataclass(frozen=True)
class Recipe:
    """What to set in a wider model, and what one step does there.

    Attributes:
        hidden_multiplier: Factor before hidden matrices, if 1 in the base.
        hidden_std: Deviation of their new weights.
        hidden_rate: Their learning rate.
        output_multiplier: Factor before the output matrix, if 1 in the base.
        output_std: Deviation of its new weights.
        output_rate: Its learning rate.
        hidden_change: Change of hidden values by a step, against the base.
        output_change: Change of outputs by a step, against the base.
    """

    hidden_multiplier: float
    hidden_std: float
    hidden_rate: float
    output_multiplier: float
    output_std: float
    output_rate: float
    hidden_change: float
    output_change: float


def widen(
    rule: Parametrization = "muP",
    base_width: int = 256,
    width: int = 4096,
    rate: float = 0.003,
    std: float = 0.02,
) -> Recipe:
    """Settings of a wide model, from those tuned on a narrow one.

    Biases, norms and the embedding keep their settings in every rule.

    Args:
        rule: The parametrization.
        base_width: Width of the narrow model.
        width: Width of the wide model.
        rate: Adam's learning rate in the narrow model.
        std: Deviation of new weights in the narrow model.

    Returns:
        The settings, and the growth that they lead to.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> recipe = widen("muP", base_width=256, width=1024, rate=0.004)
        >>> recipe.hidden_rate, recipe.hidden_std, recipe.output_std
        (0.001, 0.01, 0.005)
        >>> widen("standard", base_width=256, width=1024).output_change
        8.0
    """
    for name, number in (("base_width", base_width), ("width", width)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    for name, size in (("rate", rate), ("std", std)):
        if not 0 < size < math.inf:
            raise ValueError(f"{name} must be above 0, got {size}")
    powers, n = growth(rule), width / base_width
    hidden, output = HIDDEN[rule], OUTPUT[rule]
    return Recipe(
        hidden_multiplier=n**-hidden.multiplier,
        hidden_std=std * n**-hidden.deviation,
        hidden_rate=rate * n**-hidden.rate,
        output_multiplier=n**-output.multiplier,
        output_std=std * n**-output.deviation,
        output_rate=rate * n**-output.rate,
        hidden_change=n**powers.hidden_change,
        output_change=n**powers.output_change,
    )
