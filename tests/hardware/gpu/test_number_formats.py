"""Every code and every 16-bit number: the same bits as PyTorch's."""

import math
import random

import pytest
import torch
from kernel_checks import mutant

from warpmap.hardware.gpu import number_formats as module
from warpmap.hardware.gpu.number_formats import (
    E2M1,
    E4M3,
    E5M2,
    EXAMPLES,
    FORMATS,
    FP32,
    MX_BLOCK,
    TF32,
    decode,
    encode,
    error_chart,
    int8_decode,
    int8_encode,
    mx_decode,
    mx_encode,
    store,
)

TORCH = {
    "FP32": torch.float32,
    "BF16": torch.bfloat16,
    "FP16": torch.float16,
    "FP8 E5M2": torch.float8_e5m2,
    "FP8 E4M3": torch.float8_e4m3fn,
}
BY_WIDTH = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
INF, NAN = math.inf, math.nan


def same(a, b):
    """Equal, in the sign of zero too; nan is nan."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b and math.copysign(1, a) == math.copysign(1, b)


def torchs_values(name, codes):
    form, dtype = FORMATS[name], TORCH[name]
    bits = torch.tensor(codes).to(BY_WIDTH[form.bits])
    return bits.view(dtype).double().tolist()


def torchs_codes(name, numbers):
    form, dtype = FORMATS[name], TORCH[name]
    x = torch.tensor(numbers, dtype=torch.float32).to(dtype)
    codes = x.view(BY_WIDTH[form.bits]).tolist()
    return [code % 2**form.bits for code in codes]


def check_decode(decode, name, codes):
    form = FORMATS[name]
    for code, right in zip(codes, torchs_values(name, codes), strict=True):
        assert same(decode(form, code), right), f"{name} {code:#b}"


def check_encode(encode, name, numbers):
    form = FORMATS[name]
    for x, right in zip(numbers, torchs_codes(name, numbers), strict=True):
        ours = encode(form, x)
        if math.isnan(decode(form, right)):
            assert math.isnan(decode(form, ours)), f"{name} {x!r}"
        elif ours != right:
            # beyond E4M3's end some versions of PyTorch stop at the largest
            assert name == "FP8 E4M3", f"{name} {x!r}"
            assert abs(x) > 464
            assert encode(form, x, saturate=True) == right


def all_16_bit_floats(step=1):
    """Of both formats, infinities and nan among them."""
    codes = range(0, 2**16, step)
    return torchs_values("BF16", codes) + torchs_values("FP16", codes)


def random_floats(count):
    """Random bits of float32, and numbers of usual size."""
    codes = [random.getrandbits(32) - 2**31 for _ in range(count)]
    usual = [random.gauss(0, 10 ** random.uniform(-9, 6)) for _ in range(count)]
    narrow = torch.tensor(usual, dtype=torch.float32).double().tolist()
    return torchs_values("FP32", codes) + narrow


def halfway(name):
    """Between neighbours of a format, and a float32 to either side."""
    form = FORMATS[name]
    last = form.largest_code
    codes = [0, 1, 2, 3, last - 2, last - 1]
    codes += [random.randrange(last) for _ in range(300)]
    for code in codes:
        middle = (decode(form, code) + decode(form, code + 1)) / 2
        near = torch.tensor(middle, dtype=torch.float32)
        for towards in (0.0, INF):
            yield torch.nextafter(near, torch.tensor(towards)).item()
        yield near.item()
        yield -near.item()


@pytest.mark.parametrize("name", ["FP8 E5M2", "FP8 E4M3", "BF16", "FP16"])
def test_every_code_stands_for_what_torch_says_and_comes_back(name):
    form = FORMATS[name]
    codes = range(2**form.bits)
    check_decode(decode, name, codes)
    for code in codes:
        x = decode(form, code)
        if math.isnan(x):
            assert math.isnan(decode(form, encode(form, x)))
        else:
            assert encode(form, x) == code


def test_codes_of_float32_stand_for_what_torch_says():
    codes = [random.getrandbits(32) for _ in range(20000)]
    codes = [code - 2**32 * (code >= 2**31) for code in codes]
    right = torchs_values("FP32", codes)
    for code, x in zip(codes, right, strict=True):
        assert same(decode(FP32, code % 2**32), x)
        if not math.isnan(x):
            assert encode(FP32, x) == code % 2**32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FP8 E5M2", "FP8 E4M3"])
def test_every_16_bit_float_becomes_the_code_that_torch_makes(name):
    check_encode(encode, name, all_16_bit_floats())


@pytest.mark.parametrize("name", TORCH)
def test_float32_becomes_the_code_that_torch_makes(name):
    check_encode(encode, name, random_floats(10000))


@pytest.mark.parametrize("name", ["BF16", "FP16", "FP8 E5M2", "FP8 E4M3"])
def test_ties_go_to_the_even_code(name):
    check_encode(encode, name, [*halfway(name)])
    form = FORMATS[name]
    for code in (2, 3, form.largest_code - 1):
        middle = (decode(form, code) + decode(form, code + 1)) / 2
        assert encode(form, middle) % 2 == 0


def nearest(form, x):
    """The nearest number, of two the one with the even code."""
    codes = range(form.largest_code + 1)
    far = {code: abs(abs(x) - decode(form, code)) for code in codes}
    best = min(far.values())
    tied = [code for code, d in far.items() if d == best]
    return min(tied, key=lambda code: code % 2)


def test_fp4_is_the_nearest_of_its_sixteen_numbers():
    numbers = [decode(E2M1, code) for code in range(8)]
    assert numbers == [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # the MX specification's
    assert [decode(E2M1, 8 + c) for c in range(8)] == [-x for x in numbers]
    for i in range(-40, 41):
        x = i / 8 + 0.001 * random.choice([0, 1, -1])
        sign = 8 if x < 0 else 0
        assert encode(E2M1, x) == nearest(E2M1, x) + sign
    assert decode(E2M1, encode(E2M1, INF)) == 6
    assert decode(E2M1, encode(E2M1, -100.0)) == -6


def test_tf32_is_float32_with_13_bits_less():
    for x in random_floats(5000):
        code = encode(FP32, x)
        if not math.isfinite(x):
            continue
        # the integer that rounds to nearest even, 13 bits up
        rounded = (code + 0xFFF + (code >> 13 & 1)) >> 13
        assert encode(TF32, x) == rounded


def test_ranges_are_those_of_the_papers():
    ranges = {
        name: (form.bits, form.largest, form.smallest_normal, form.smallest)
        for name, form in FORMATS.items()
    }
    for name, dtype in TORCH.items():
        info = torch.finfo(dtype)
        bits, largest, normal, _ = ranges[name]
        assert (bits, largest) == (info.bits, info.max)
        assert normal == info.smallest_normal
    assert ranges["FP8 E4M3"][1:] == (448, 2**-6, 2**-9)
    assert ranges["FP8 E5M2"][1:] == (57344, 2**-14, 2**-16)
    assert ranges["FP4 E2M1"] == (4, 6, 1, 0.5)
    assert ranges["TF32"][0] == 19


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_saturation_keeps_what_is_too_large_finite(form):
    for x in (form.largest, form.largest * 1.01, 1e300, INF):
        for sign in (1, -1):
            kept = decode(form, encode(form, sign * x, saturate=True))
            assert kept == sign * form.largest
    over = decode(form, encode(form, form.largest * 2))
    if form.specials == "ieee":
        assert over == INF
    elif form.specials == "nan":
        assert math.isnan(over)


def test_int8_is_torchs():
    for code in range(256):
        assert int8_decode(code) == code - 256 * (code > 127)
        assert int8_encode(int8_decode(code)) == code
    x = torch.arange(-600, 600).double() / 4
    right = x.round().clamp(-128, 127).to(torch.int8).view(torch.uint8)
    assert [int8_encode(v) for v in x.tolist()] == right.tolist()


# Blocks with a shared scale


def check_mx(encode, decode):
    scales = torch.arange(256).to(torch.uint8).view(torch.float8_e8m0fnu)
    for code, right in enumerate(scales.double().tolist()):
        assert same(decode(E2M1, code, [2])[0], right)  # code 2 is one
    for form in (E2M1, E4M3, E5M2):
        for _ in range(60):
            size = 10 ** random.uniform(-30, 30)
            block = [random.gauss(0, size) for _ in range(MX_BLOCK)]
            scale, codes = encode(form, block)
            largest = max(map(abs, block))
            # the specification: floor(log2(max)) less the format's own
            power = math.floor(math.log2(largest))
            power -= math.floor(math.log2(form.largest))
            assert scale == power + 127
            spacing = 2.0 ** (power + 1 - form.bias - form.mantissa)
            end = form.largest * 2.0**power
            for x, y in zip(block, decode(form, scale, codes), strict=True):
                lost = max(0.0, abs(x) - end)
                bound = max(abs(x) * 2.0 ** (-form.mantissa - 1), spacing / 2)
                assert abs(x - y) <= max(bound, lost)
                assert x * y >= 0


def test_mx_blocks():
    check_mx(mx_encode, mx_decode)
    assert mx_decode(E2M1, *mx_encode(E2M1, [0.0, 0.0])) == [0.0, 0.0]
    assert all(map(math.isnan, mx_decode(E4M3, 255, [0, 1])))
    tiny = [5e-324, 0.0]
    assert mx_encode(E4M3, tiny)[0] == 0
    assert mx_encode(E4M3, [1e308])[0] == 254


# What the page shows


@pytest.mark.parametrize("name", [*FORMATS, "INT8"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_neighbours_enclose_the_number(name, scale):
    for _ in range(100):
        x = random.gauss(0, 10 ** random.uniform(-3, 1.5))
        kept = store(x, name, scale, saturate=True)
        value = float(kept.value)
        below, above = (
            None if n == "none" else float(n) for n in (kept.below, kept.above)
        )
        assert below is None or below < value
        assert above is None or value < above
        # nothing is nearer
        for other in (below, above):
            assert other is None or abs(value - x) <= abs(other - x)
        if abs(x) <= kept.largest:
            assert kept.spacing is None or abs(value - x) <= kept.spacing / 2
            assert kept.relative_error == abs(value - x) / abs(x)
        bits = kept.bits.replace(" ", "")
        assert len(bits) == (8 if name == "INT8" else FORMATS[name].bits)


def test_ends_and_zero():
    assert store(1e9, "FP16").value == "inf"
    assert store(1e9, "FP16").below == "65504.0"
    assert store(1e9, "FP16").relative_error is None
    assert store(-1e9, "FP16").above == "-65504.0"
    assert store(465.0, "FP8 E4M3").value == "nan"
    assert store(465.0, "FP8 E4M3", saturate=True).value == "448.0"
    assert store(448.0, "FP8 E4M3").above == "none"
    zero = store(-0.0, "FP16")
    assert (zero.bits, zero.value) == ("1 00000 0000000000", "-0.0")
    assert zero.spacing == 2**-24
    assert zero.relative_error is None
    assert store(-1.0, "INT8").bits == "11111111"


def test_the_chart_bounds_the_error_of_every_number():
    chart = error_chart(0.1, "BF16", 1.0, False)
    for line in chart.lines:
        for (x0, y0), (x1, y1) in zip(
            line.points, line.points[1:], strict=False
        ):
            assert 0 < x0 <= x1
            for _ in range(3):
                x = random.uniform(x0, x1)
                error = store(x, line.name).relative_error
                assert error <= max(y0, y1) * (1 + 1e-12)
        # and is reached next to a power of two
        x, y = line.points[-3]
        worst = store(x * (1 + y * 0.999), line.name).relative_error
        assert worst == pytest.approx(y, rel=0.5)
    assert chart.points[0].y == store(0.1, "BF16").relative_error
    assert not error_chart(1.0, "BF16", 1.0, False).points


def test_examples_are_arguments_that_work():
    for arguments in EXAMPLES.values():
        store(**arguments)
        error_chart(**{"format": "BF16", "saturate": False, **arguments})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decode(E4M3, 256), "code must have 8 bits"),
        (lambda: decode(E4M3, -1), "code must have 8 bits"),
        (lambda: encode(E2M1, NAN), "x must be a number"),
        (lambda: int8_encode(NAN), "x must be a number"),
        (lambda: mx_encode(E2M1, []), "block must hold 1 to 32, got 0"),
        (lambda: mx_encode(E2M1, [0.0] * 33), "got 33"),
        (lambda: mx_encode(E2M1, [INF]), "block must be finite"),
        (lambda: store(NAN), "number must not be nan"),
        (lambda: store(1.0, "FP9"), "format must be one of"),
        (lambda: store(1.0, "BF16", 0.0), "scale must be from"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Faults: the checks above must see every one


def few_checks(module):
    for name in ("FP8 E5M2", "FP8 E4M3"):
        check_decode(module.decode, name, range(256))
        check_encode(module.encode, name, all_16_bit_floats(step=97))
    for name in ("BF16", "FP16"):
        check_decode(module.decode, name, range(0, 2**16, 31))
        check_encode(module.encode, name, [*halfway(name), 0.0, -0.0])
    check_mx(module.mx_encode, module.mx_decode)


def test_the_code_passes_the_checks_that_faults_must_fail():
    few_checks(module)


FAULTS = {
    "cut off": ("round(math.ldexp(abs(x)", "int(math.ldexp(abs(x)"),
    "half away from zero": (
        "round(math.ldexp(abs(x), form.mantissa - exponent))",
        "int(math.ldexp(abs(x), form.mantissa - exponent) + 0.5)",
    ),
    "subnormals to zero": (
        "if code <= form.largest_code:",
        "if code < 2**form.mantissa:\n            code = 0\n"
        "        if code <= form.largest_code:",
    ),
    "no hidden one": ("if e > 0:", "if e > 1:"),
    "subnormals one exponent low": ("max(e, 1) - form.bias", "e - form.bias"),
    "bias one off": ("(self.exponent - 1)) - 1", "(self.exponent - 1)) - 2"),
    "e4m3 with infinities": ('Format(4, 3, "nan")', "Format(4, 3)"),
    "sign of zero": ("math.copysign(1, x) < 0", "x < 0"),
    "zero has frexp's exponent": ("lowest) if x else lowest", "lowest)"),
    "scale one power off": ("return power + 127,", "return power + 128,"),
    "elements not scaled": ("math.ldexp(x, -power), True", "x, True"),
    "elements not saturated": ("-power), True)", "-power))"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_caught(fault, tmp_path):
    wrong = mutant(module, *FAULTS[fault], tmp_path)
    for name, form in wrong.FORMATS.items():
        assert form.bits == FORMATS[name].bits
    with pytest.raises(AssertionError):
        few_checks_of(wrong)


def few_checks_of(wrong):
    """The checks, with formats that the wrong module made."""
    names = {id(form): wrong.FORMATS[n] for n, form in FORMATS.items()}

    class Of:
        def __getattr__(self, name):
            function = getattr(wrong, name)
            return lambda form, *args, **kwargs: function(
                names[id(form)], *args, **kwargs
            )

    few_checks(Of())
