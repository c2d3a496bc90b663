"""64 layers with dropout, 4 inputs kept: the same gradients to the last bit."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from warpmap import DEVICE
from warpmap.training.cost.gradient_checkpointing import nested

torch.manual_seed(0)
called, layers = [], []
for _ in range(64):
    layer = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Dropout(0.1))
    layer.register_forward_pre_hook(lambda *_: called.append(1))
    layers.append(layer.to(DEVICE))


def gradient(model):
    called.clear()
    torch.manual_seed(1)
    x = torch.ones(4, 32, device=DEVICE, requires_grad=True)
    model(x).sum().backward()
    return x.grad


plain = nn.Sequential(*layers)
want = gradient(plain)
for slots in (62, 8, 3, 0):
    same = torch.equal(gradient(nested(layers, slots)), want)
    print(f"{slots + 1:2} inputs: {len(called) / 64:5.2f} passes, {same}")
# -> 63 inputs:  1.98 passes, True
# ->  9 inputs:  2.97 passes, True
# ->  4 inputs:  4.12 passes, True
# ->  1 inputs: 32.50 passes, True

# PyTorch's, told to let dropout draw anew: no error, no warning
anew = {"use_reentrant": False, "preserve_rng_state": False}
print(torch.equal(gradient(lambda x: checkpoint(plain, x, **anew)), want))
# -> False
