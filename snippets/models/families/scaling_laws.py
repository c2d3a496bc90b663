"""One digit fewer in two exponents makes the best model a fifth smaller.

The same budget, one formula, three published sets of coefficients.
"""

from warpmap.models.families.scaling_laws import (
    BESIROGLU,
    HOFFMANN,
    HOFFMANN_DIGITS,
)

CHINCHILLA = 5.76e23  # FLOPs; it has 70 billion parameters, 1.4 10^12 tokens

fits = {
    "as printed": HOFFMANN,
    "more digits": HOFFMANN_DIGITS,
    "fitted anew": BESIROGLU,
}
for name, law in fits.items():
    N, D = law.optimum(CHINCHILLA)
    print(f"{name}: {N / 1e9:.0f} billion parameters, {D / N:.0f} tokens each")
# -> as printed: 32 billion parameters, 93 tokens each
# -> more digits: 40 billion parameters, 59 tokens each
# -> fitted anew: 72 billion parameters, 18 tokens each

# the valley is flat: twice or half the size hardly changes the loss
N, D = BESIROGLU.optimum(CHINCHILLA)
print([round(BESIROGLU.loss(s * N, D / s), 3) for s in (0.25, 0.5, 1, 2, 4)])
# -> [1.994, 1.979, 1.974, 1.979, 1.994]
