"""Small formats cannot count: from some number on, adding one changes nothing.

And 0.1 + 0.2 equals 0.3 in some of them, though not in Python's float64.
"""

from warpmap.hardware.gpu.number_formats import FORMATS, decode, encode


def rounded(form, x):
    """What is left of a number."""
    return decode(form, encode(form, x))


for name, form in FORMATS.items():
    # FP32 would take 16 million steps: begin near the end
    n = 2.0**24 - 100 if name == "FP32" else 0.0
    while rounded(form, n + 1) != n:
        n = rounded(form, n + 1)

    a, b, c = (rounded(form, x) for x in (0.1, 0.2, 0.3))
    holds = rounded(form, a + b) == c
    print(f"{name} counts to {n:.0f}; 0.1 + 0.2 == 0.3: {holds}")
# -> FP32 counts to 16777216; 0.1 + 0.2 == 0.3: True
# -> TF32 counts to 2048; 0.1 + 0.2 == 0.3: False
# -> BF16 counts to 256; 0.1 + 0.2 == 0.3: True
# -> FP16 counts to 2048; 0.1 + 0.2 == 0.3: False
# -> FP8 E5M2 counts to 8; 0.1 + 0.2 == 0.3: False
# -> FP8 E4M3 counts to 16; 0.1 + 0.2 == 0.3: True
# -> FP4 E2M1 counts to 4; 0.1 + 0.2 == 0.3: False
