"""NTK-aware scaling for 4 times the length does not cover 4 times."""

from warpmap.models.positions._longer_texts import context_extension

# Llama 2: heads of 128, base 10000, trained on 4096 tokens
print("rule, pairs with unseen angles, degrees from a token to the next")
# -> rule, pairs with unseen angles, degrees from a token to the next
for rule in ("none", "interpolation", "NTK-aware", "YaRN"):
    got = context_extension(rule, trained=4096, target=16384, factor=4)
    print(rule, got.unseen_pairs, round(got.neighbour_degrees, 1))
# -> none 18 57.3
# -> interpolation 0 14.3
# -> NTK-aware 17 57.3
# -> YaRN 0 57.3

factor = 4.0
while context_extension("NTK-aware", factor=factor).unseen_pairs:
    factor += 0.1
print("NTK-aware needs factor", round(factor, 1))
# -> NTK-aware needs factor 6.7

# Llama 3.1 goes from 8192 tokens to 131072, 16 times, with factor 8
got = context_extension(
    "by parts", 8192, 131072, 8, base=500000, fast=4, slow=1
)
print("Llama 3.1:", got.unseen_pairs, "pairs for training to fill")
# -> Llama 3.1: 29 pairs for training to fill
