"""Walk to 3 in small steps: 16 bits alone never arrive."""

import torch

from warpmap import DEVICE
from warpmap.training.precision.mixed_precision import (
    LossScaler,
    MasterWeights,
)


def walk(dtype, keep_masters, slope=1.0, scaler=None):
    """Descend on slope * (w - 3)^2 / 2, from 1, with steps of 0.5%."""
    model = torch.nn.Linear(1, 1, bias=False, device=DEVICE)
    torch.nn.init.ones_(model.weight)
    weights = MasterWeights(model, dtype)
    (master,) = weights.masters
    for _ in range(1500):
        w = model(torch.ones(1, 1, dtype=dtype, device=DEVICE))
        loss = slope * (w.float() - 3).square().sum() / 2
        (loss * scaler.scale if scaler else loss).backward()
        weights.collect()
        if scaler is None or scaler.unscale(weights.masters):
            master.data -= 0.005 / slope * master.grad
            weights.publish()
        if not keep_masters:  # forget what the model rounded off
            master.data.copy_(model.weight)
    return f"{model.weight.item():.2f}"


print("bf16 alone           ", walk(torch.bfloat16, False))
# -> bf16 alone            2.00
print("bf16, fp32 masters   ", walk(torch.bfloat16, True))
# -> bf16, fp32 masters    3.00
print("fp16, gradient of 1e-8", walk(torch.float16, True, 1e-8))
# -> fp16, gradient of 1e-8 1.00
print("the same, loss scaled ", walk(torch.float16, True, 1e-8, LossScaler()))
# -> the same, loss scaled  3.00
