"""The k largest of a row lie in the k groups with the largest maxima."""

import torch

from warpmap import DEVICE
from warpmap.kernels.data_movement.top_k import top_k

vocabulary, k, size = 128256, 50, 32
logits = torch.randn(1, vocabulary, device=DEVICE)

values, indices = top_k(logits, k)
groups = (indices // size).unique()
print(vocabulary // size, "groups, enough:", len(groups) <= k)
# -> 4008 groups, enough: True

# nobody can be in front of them from another group
maxima = logits.view(-1, size).amax(dim=1)
best = torch.topk(maxima, k).indices
print(set(groups.tolist()) <= set(best.tolist()))
# -> True

# the worst for a search by threshold: everybody is equal
values, indices = top_k(torch.zeros_like(logits), k)
print(indices[0, :5].tolist(), indices[0, -1].item())
# -> [0, 1, 2, 3, 4] 49

# what is not a number is never hidden
logits[0, 1234] = float("nan")
print(top_k(logits, 1)[1].item())
# -> 1234
