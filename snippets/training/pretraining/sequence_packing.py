"""Under RoPE the mask alone keeps documents apart; positions alone do not."""

import torch

from warpmap import DEVICE
from warpmap.models.foundations.attention import attention
from warpmap.models.positions.rope import rope_table, rotate
from warpmap.training.pretraining.sequence_packing import (
    document_mask,
    pack,
    positions_of,
)

sequences = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9]]
documents = pack(sequences, capacity=8).documents.to(DEVICE)
print(documents.tolist())
# -> [[2, 2, 2, 2, 2, 2, 2, -1], [0, 0, 0, 0, 0, 1, 1, 1]]

q, k, v = torch.randn(3, 2, 1, 8, 4, dtype=torch.float64).to(DEVICE)


def attend(positions, mask):
    """What document 1 gets."""
    table = rope_table(positions[:, None].double(), head_size=4)
    return attention(rotate(q, *table), rotate(k, *table), v, mask)[1, 0, 5:]


through = torch.arange(8, device=DEVICE).expand(2, 8)
mask = document_mask(documents)
causal = through[:, None, :, None] >= through[:, None, None]

reset = positions_of(documents)
right = attend(reset, mask)
for name, positions, seen in (
    ("mask, positions count through", through, mask),
    ("no mask, positions start anew", reset, causal),
):
    print(f"{name}: {torch.allclose(attend(positions, seen), right)}")
# -> mask, positions count through: True
# -> no mask, positions start anew: False
