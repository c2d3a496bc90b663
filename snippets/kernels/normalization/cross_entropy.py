"""A loss in bfloat16 stands still while the model learns."""

import torch
import torch.nn.functional as F

from warpmap import DEVICE
from warpmap.kernels.normalization.cross_entropy import cross_entropy

VOCABULARY = 128256
logits = torch.zeros(1, VOCABULARY, dtype=torch.bfloat16, device=DEVICE)
target = torch.tensor([42], device=DEVICE)

for step in range(4):
    logits[0, 42] = step / 100  # the right token gains a little
    losses = [f(logits, target) for f in (F.cross_entropy, cross_entropy)]
    print(*(f"{loss.item():.4f}" for loss in losses))
# -> 11.7500 11.7618
# -> 11.7500 11.7518
# -> 11.7500 11.7418
# -> 11.7500 11.7318
