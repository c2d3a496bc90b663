"""Number formats of GPUs: one encoder and one decoder for all of them.

A floating-point format is a handful of settings. A code has a sign, some
exponent bits e and some mantissa bits m, and stands for

    (1 + m / 2^mantissa) * 2^(e - bias)       e > 0: a normal number
    (0 + m / 2^mantissa) * 2^(1 - bias)       e = 0: zero and subnormals

What the largest exponent means differs: infinities and nan as in IEEE 754,
one nan and more numbers (E4M3), or numbers alone (E2M1).

References: Micikevicius et al., 2022, https://arxiv.org/abs/2209.05433;
Rouhani et al., 2023, https://arxiv.org/abs/2310.10537
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from warpmap.chart import Axis, Line, LineChart, Point


@dataclass(frozen=True)
class Format:
    """A floating-point format.

    Args:
        exponent: Exponent bits.
        mantissa: Mantissa bits, without the leading one.
        specials: What the largest exponent holds: ``"ieee"`` infinities and
            nan, ``"nan"`` numbers but for one nan, ``"none"`` numbers.

    Examples:
        >>> E4M3.bits, E4M3.bias, E4M3.largest
        (8, 7, 448.0)
    """

    exponent: int
    mantissa: int
    specials: Literal["ieee", "nan", "none"] = "ieee"

    @property
    def bits(self) -> int:
        """Bits of a code, its sign among them."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is taken off the exponent bits."""
        return (1 << (self.exponent - 1)) - 1

    @property
    def largest_code(self) -> int:
        """The code of the largest finite number."""
        all_ones = (1 << (self.exponent + self.mantissa)) - 1
        taken = {"ieee": 1 << self.mantissa, "nan": 1, "none": 0}
        return all_ones - taken[self.specials]

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return decode(self, self.largest_code)

    @property
    def smallest_normal(self) -> float:
        """The smallest number with all its mantissa bits."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest number above zero."""
        return decode(self, 1)


FP32 = Format(8, 23)
TF32 = Format(8, 10)  # 19 bits, in a 32-bit word
BF16 = Format(8, 7)
FP16 = Format(5, 10)
E5M2 = Format(5, 2)
E4M3 = Format(4, 3, "nan")
E2M1 = Format(2, 1, "none")

Name = Literal[
    "FP32", "TF32", "BF16", "FP16", "FP8 E5M2", "FP8 E4M3", "FP4 E2M1", "INT8"
]

FORMATS = {
    "FP32": FP32,
    "TF32": TF32,
    "BF16": BF16,
    "FP16": FP16,
    "FP8 E5M2": E5M2,
    "FP8 E4M3": E4M3,
    "FP4 E2M1": E2M1,
}


def decode(form: Format, code: int) -> float:
    """The number that a code stands for.

    Args:
        form: The format.
        code: Its bits, as a whole number.

    Raises:
        ValueError: If the code has more bits than the format.

    Examples:
        >>> decode(FP16, 0b0_10000_1000000000)
        3.0
        >>> decode(E4M3, 0b1_1111_111)
        nan
    """
    if not 0 <= code < 2**form.bits:
        raise ValueError(f"code must have {form.bits} bits, got {code:#b}")
    sign = -1.0 if code >> (form.bits - 1) else 1.0
    magnitude = code % 2 ** (form.bits - 1)
    if magnitude > form.largest_code:
        infinite = form.specials == "ieee" and magnitude % 2**form.mantissa == 0
        return sign * math.inf if infinite else math.nan
    e, m = divmod(magnitude, 2**form.mantissa)
    if e > 0:
        m += 2**form.mantissa  # the leading one, which is not stored
    return sign * math.ldexp(m, max(e, 1) - form.bias - form.mantissa)


def encode(form: Format, x: float, saturate: bool = False) -> int:
    """The code of the nearest number; of two as near, the even code.

    Args:
        form: The format.
        x: Any number.
        saturate: Whether what is too large becomes the largest finite number.
            Else it becomes infinite; without infinities, nan; without nan,
            the largest after all.

    Raises:
        ValueError: If ``x`` is nan and the format has none.

    Examples:
        >>> decode(BF16, encode(BF16, 257.0))
        256.0
        >>> decode(FP16, encode(FP16, 65520.0))
        inf
        >>> decode(E4M3, encode(E4M3, 1000.0, saturate=True))
        448.0
    """
    sign = (math.copysign(1, x) < 0) << (form.bits - 1)
    if math.isnan(x):
        if form.specials == "none":
            raise ValueError("x must be a number: the format has no nan")
        return sign + (1 << (form.bits - 1)) - 1
    if math.isfinite(x):
        # how many spacings is x? its exponent says how long one is
        lowest = 1 - form.bias
        exponent = max(math.frexp(x)[1] - 1, lowest) if x else lowest
        spacings = round(math.ldexp(abs(x), form.mantissa - exponent))
        # one code a spacing: a carry out of the mantissa raises the exponent
        code = spacings + (exponent - 1 + form.bias) * (1 << form.mantissa)
        if code <= form.largest_code:
            return sign + code
    if saturate or form.specials == "none":
        return sign + form.largest_code
    return sign + form.largest_code + 1  # infinity, or nan


def int8_encode(x: float) -> int:
    """The nearest of the whole numbers -128 to 127, in two's complement.

    Args:
        x: Any number but nan; most often first divided by a scale.

    Raises:
        ValueError: If ``x`` is nan.

    Examples:
        >>> int8_encode(-1.4), int8_encode(2.5), int8_encode(1e9)
        (255, 2, 127)
    """
    if math.isnan(x):
        raise ValueError("x must be a number: INT8 has no nan")
    return round(min(max(x, -128.0), 127.0)) % 256


def int8_decode(code: int) -> float:
    """The whole number that a code of INT8 stands for.

    Args:
        code: 0 to 255.

    Examples:
        >>> int8_decode(255)
        -1.0
    """
    return float((code + 128) % 256 - 128)


MX_BLOCK = 32  # numbers that share a scale


def mx_encode(form: Format, block: Sequence[float]) -> tuple[int, list[int]]:
    """A block of microscaling (MX): small codes, and a power of two for all.

    Args:
        form: The format of the elements.
        block: Up to 32 finite numbers.

    Returns:
        The scale as a code of E8M0, eight exponent bits and nothing else, of
        bias 127; and the code of each element, divided by the scale.

    Raises:
        ValueError: If the block is empty, too long or not finite.

    Examples:
        >>> scale, codes = mx_encode(E2M1, [100.0, -50.0, 3.0])
        >>> scale - 127, mx_decode(E2M1, scale, codes)
        (4, [96.0, -48.0, 0.0])
    """
    if not 1 <= len(block) <= MX_BLOCK:
        raise ValueError(f"block must hold 1 to {MX_BLOCK}, got {len(block)}")
    if not all(map(math.isfinite, block)):
        raise ValueError(f"block must be finite, got {block}")
    largest = max(map(abs, block))
    # the largest power of two goes to the format's largest power of two
    power = math.frexp(largest)[1] - math.frexp(form.largest)[1]
    power = min(max(power, -127), 127) if largest else -127
    codes = [encode(form, math.ldexp(x, -power), True) for x in block]
    return power + 127, codes


def mx_decode(form: Format, scale: int, codes: Sequence[int]) -> list[float]:
    """The numbers of an MX block.

    Args:
        form: The format of the elements.
        scale: A code of E8M0; 255 is nan.
        codes: Of the elements.

    Examples:
        >>> mx_decode(E2M1, 127, [0b0_11_1, 0b1_00_1])
        [6.0, -0.5]
    """
    if scale == 255:
        return [math.nan] * len(codes)
    return [math.ldexp(decode(form, code), scale - 127) for code in codes]


# What the page's calculator asks


@dataclass(frozen=True)
class Stored:
    """What ``store`` answers.

    Attributes:
        bits: Sign, exponent and mantissa; of INT8 its eight bits.
        value: The number kept, in full.
        below: The next smaller one, or none.
        above: The next larger one, or none.
        spacing: From the number kept to the next one away from zero.
        relative_error: What rounding changed, as a share of the number.
        largest: The largest number, times the scale.
    """

    bits: str
    value: str
    below: str
    above: str
    spacing: float | None
    relative_error: float | None
    largest: float


def _number(name: str, position: int, scale: float) -> float | None:
    """The number at a place in the row of all; zero is at 0."""
    if name == "INT8":
        return scale * position if -128 <= position <= 127 else None
    form = FORMATS[name]
    if abs(position) > form.largest_code:
        return None
    return scale * math.copysign(decode(form, abs(position)), position)


def store(
    number: float = 0.1,
    format: Name = "BF16",
    scale: float = 1.0,
    saturate: bool = False,
) -> Stored:
    """Round a number to a format, and look around.

    Args:
        number: Any number.
        format: The format to store it in.
        scale: Divides the number before, multiplies it after.
        saturate: Whether what is too large becomes the largest number.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> kept = store(257.0, "BF16")
        >>> kept.bits, kept.value, kept.above
        ('0 10000111 0000000', '256.0', '258.0')
    """
    if math.isnan(number):
        raise ValueError("number must not be nan")
    if format != "INT8" and format not in FORMATS:
        raise ValueError(f"format must be one of {[*FORMATS]}, got {format!r}")
    if not 1e-30 <= scale <= 1e30:
        raise ValueError(f"scale must be from 1e-30 to 1e30, got {scale}")

    if format == "INT8":
        code = int8_encode(number / scale)
        bits, position = f"{code:08b}", int(int8_decode(code))
        largest, value = 127 * scale, scale * position
    else:
        form = FORMATS[format]
        code = encode(form, number / scale, saturate)
        text, cut = f"{code:0{form.bits}b}", 1 + form.exponent
        bits = f"{text[0]} {text[1:cut]} {text[cut:]}"
        position = code % 2 ** (form.bits - 1) * (-1 if text[0] == "1" else 1)
        largest, value = form.largest * scale, scale * decode(form, code)

    below, above = (_number(format, position + d, scale) for d in (-1, 1))
    outward = below if position < 0 else above
    error = abs(value - number) / abs(number) if number else math.nan
    return Stored(
        bits=bits,
        value=repr(value),
        below="none" if below is None else repr(below),
        above="none" if above is None else repr(above),
        spacing=None if outward is None else abs(outward - value),
        relative_error=error if math.isfinite(error) else None,
        largest=largest,
    )


def error_chart(
    number: float, format: Name, scale: float, saturate: bool
) -> LineChart:
    """The worst error of every format over the size of a number.

    Args:
        number: As of ``store``, like all that follow.
        format: The format whose error is marked.
        scale: Divides the number before, multiplies it after.
        saturate: Whether what is too large becomes the largest number.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> chart = error_chart(0.1, "BF16", 1.0, False)
        >>> [line.name for line in chart.lines if line.points[-1][1] == 2**-8]
        ['BF16']
    """
    error = store(number, format, scale, saturate).relative_error
    lines = []
    for name, form in FORMATS.items():
        points = []
        for k in range(-40, 41):
            if form.smallest <= 2.0**k <= form.largest:
                # half a spacing, next to a power of two
                half = 2.0 ** (max(k, 1 - form.bias) - form.mantissa - 1)
                points.append((scale * 2.0**k, half / 2.0**k))
        end = min(form.largest, 2.0**40)
        lines.append(Line(name, [*points, (scale * end, points[-1][1])]))
    whole = [(scale * n, 0.5 / n) for n in (1, 2, 4, 8, 16, 32, 64, 127)]
    lines.append(Line("INT8", whole))
    return LineChart(
        "Rounding error over the size of the number",
        Axis("size of the number", log=True),
        Axis("largest relative error", log=True),
        lines,
        [Point(format, abs(number), error)] if error else [],
    )


EXAMPLES: dict[str, dict[str, float | str]] = {
    "a tenth": {"number": 0.1, "scale": 1.0},
    "256 + 1 in BF16": {"number": 257.0, "format": "BF16", "scale": 1.0},
    "65520 in FP16": {"number": 65520.0, "format": "FP16", "scale": 1.0},
    "a gradient of 1e-8 in FP16": {
        "number": 1e-8,
        "format": "FP16",
        "scale": 1.0,
    },
    "the same, scaled": {
        "number": 1e-8,
        "format": "FP16",
        "scale": 2.0**-16,
    },
    "465 in FP8 E4M3": {"number": 465.0, "format": "FP8 E4M3", "scale": 1.0},
    "5 in FP4": {"number": 5.0, "format": "FP4 E2M1", "scale": 1.0},
}
"""The calculator's menu of numbers."""
