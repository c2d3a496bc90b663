"""In bfloat16 a weight of 1 stands still under AdamW; random rounding moves it.

A step of Adam is about as long as the learning rate, whatever the gradient.
Next to 1 a bfloat16 has 1.0078 and 0.9961: a step of 0.001 rounds back to 1.
"""

import torch

from warpmap import DEVICE
from warpmap.kernels.fused.fused_adam import (
    adamw_reference,
    fused_adamw,
    make_table,
)

ones = torch.ones(1000, dtype=torch.bfloat16, device=DEVICE)
gradient = 1000 * ones
rates = {"lr": 0.001, "weight_decay": 0.0}

# PyTorch's way with a model in bfloat16: the means have its dtype too
weights, m, v = ones.clone(), 0 * ones, 0 * ones
for step in range(1, 101):
    adamw_reference([weights], [gradient], [m], [v], step, **rates)
print("rounded to nearest:", weights.float().mean().item())
# -> rounded to nearest: 1.0

weights, m, v = ones.clone(), 0 * ones.float(), 0 * ones.float()
table = make_table([weights], [gradient], [m], [v])
for step in range(1, 101):
    fused_adamw(table, step, **rates)
print("rounded at random:", round(weights.float().mean().item(), 2))
# -> rounded at random: 0.9
