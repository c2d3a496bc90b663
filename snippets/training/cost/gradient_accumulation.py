"""One batch, split three ways: the mean of means is another loss each time."""

import torch

from warpmap import DEVICE
from warpmap.training.cost.gradient_accumulation import (
    IGNORE,
    accumulate,
    mean_of_means,
)

# three short answers and a long one, padded; the model is good at the long one
targets = torch.full((4, 97), IGNORE, device=DEVICE)
targets[:3, 0] = 0
targets[3] = 1


def try_all(how):
    for size in (4, 2, 1):
        model = torch.nn.Embedding(1, 2, device=DEVICE)
        model.weight.data.copy_(torch.tensor([[0.0, 3.0]]))
        pieces = [(y.clamp(0, 0), y) for y in targets.split(size)]
        loss, slope = how(model, pieces), model.weight.grad[0, 0].item()
        print(f"{len(pieces)} pieces: loss {loss:.2f}, gradient {slope:.3f}")


try_all(accumulate)
# -> 1 pieces: loss 0.14, gradient 0.017
# -> 2 pieces: loss 0.14, gradient 0.017
# -> 4 pieces: loss 0.14, gradient 0.017
try_all(mean_of_means)
# -> 1 pieces: loss 0.14, gradient 0.017
# -> 2 pieces: loss 1.56, gradient -0.458
# -> 4 pieces: loss 2.30, gradient -0.703
