"""A token can be tested for top-p without sorting, or knowing the others."""

import torch

from warpmap import DEVICE
from warpmap.kernels.fused.sampling_kernel import sample, sampling_reference

logits = torch.tensor([[2.0, 0.5, 1.0, 2.0, -1.0, 0.0]], device=DEVICE)
p = torch.softmax(logits[0].double(), dim=0)

# is less than half above it? then it is one of the nucleus
for token in range(3):
    above = p[logits[0] > logits[0, token]].sum().item()
    print(token, round(above, 2), above < 0.5)
# -> 0 0.0 True
# -> 1 0.85 False
# -> 2 0.72 False

# the sorted way agrees: two equal logits share what is left
print(sampling_reference(logits, top_p=0.5)[0].tolist())
# -> [0.5, 0.0, 0.0, 0.5, 0.0, 0.0]

# 40 seeds, 40 draws, and none from outside
seeds = torch.arange(40, device=DEVICE)
batch = logits.expand(40, 6).contiguous()
tokens = sample(batch, seeds, top_p=0.5)
print(sorted(set(tokens.tolist())))
# -> [0, 3]

# row 33 alone: its token is its seed's, not its batch's
alone = sample(logits, seeds[33:34], top_p=0.5)
print(alone.item() == tokens[33].item())
# -> True
