"""The same weight decay, and one optimizer hardly decays what the other halves.

Three weights of 1. Their gradients are noise around zero: weak, middling and
strong. So all that should move them is the decay.
"""

import torch

from warpmap import DEVICE
from warpmap.training.foundations.optimizers import Adam, AdamW

noise = torch.tensor([0.01, 1.0, 100.0], device=DEVICE)

for kind in (AdamW, Adam):
    weights = torch.ones(3, device=DEVICE)
    optimizer = kind([weights], lr=0.01, weight_decay=0.1)
    for step in range(700):
        weights.grad = noise if step % 2 else -noise
        optimizer.step()
    print(kind.__name__, [round(abs(w), 1) for w in weights.tolist()])
# -> AdamW [0.5, 0.5, 0.5]
# -> Adam [0.0, 0.5, 1.0]

# both decayed by lr * weight_decay * weights. AdamW took that off the weights;
# Adam added it to the gradient, and then divided the gradient by its size
