"""Rotation alone does not make attention fade with distance."""

import torch

from warpmap import DEVICE
from warpmap.models.positions.rope import rope_table, rotate

T, D = 4096, 128
cos, sin = rope_table(torch.arange(T, device=DEVICE), D)


def best_distance(query, key):
    """Where the last token looks if every token has the same key."""
    q = rotate(query.view(1, 1, 1, D), cos[-1:], sin[-1:])
    k = rotate(key.expand(1, 1, T, D), cos, sin)
    scores = (q @ k.mT).flatten()
    return T - 1 - scores.argmax().item(), round(scores.max().item(), 1)


query = torch.ones(D, device=DEVICE)
print("the query as key:", best_distance(query, query))
# -> the query as key: (0, 128.0)

# a projection can learn any fixed turn of a pair
for distance in (1, 100, 3000):
    key = rotate(
        query.view(1, 1, 1, D),
        cos[distance : distance + 1],
        sin[distance : distance + 1],
    )
    print(f"turned by {distance}:", best_distance(query, key))
# -> turned by 1: (1, 128.0)
# -> turned by 100: (100, 128.0)
# -> turned by 3000: (3000, 128.0)
