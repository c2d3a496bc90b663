"""Move the norm past the sum, and depth multiplies where it added."""

from warpmap.models.foundations.normalization import gradient_norms

# how much stronger is the gradient of the first layer than of the last?
for layers in (16, 32, 64):
    for placement in ("pre", "post"):
        norms = gradient_norms(placement, layers)
        print(f"{layers} layers, {placement}: {norms[0] / norms[-1]:.0f}")
# -> 16 layers, pre: 6
# -> 16 layers, post: 7
# -> 32 layers, pre: 12
# -> 32 layers, post: 43
# -> 64 layers, pre: 27
# -> 64 layers, post: 1869
