"""Adam's step is about lr, it is said. After a quiet time it can be five.

A gradient of +-0.01 for a thousand steps, then another one for twenty. The
longest of those twenty steps, over the learning rate:
"""

import torch

from warpmap import DEVICE
from warpmap.training.foundations.optimizers import AdamW


def longest_step(beta2, then):
    p = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    adam = AdamW([p], lr=1.0, betas=(0.9, beta2), weight_decay=0.0)
    places = [0.0]
    for step in range(1020):
        g = then if step >= 1000 else 0.01 if step % 2 else -0.01
        p.grad = torch.full_like(p, g)
        adam.step()
        places.append(p.item())
    late = places[1000:]
    return max(b - a for a, b in zip(late[1:], late[:-1], strict=True))


print(f"then 1:         {longest_step(0.999, then=1.0):.1f}")
# -> then 1:         5.2
print(f"then 1000:      {longest_step(0.999, then=1000.0):.1f}")
# -> then 1000:      5.2
print(f"clipped to 0.1: {longest_step(0.999, then=0.1):.1f}")
# -> clipped to 0.1: 4.4
print(f"beta2 = 0.95:   {longest_step(0.95, then=1.0):.1f}")
# -> beta2 = 0.95:   1.1
