"""Count what each step of softmax moves, then do them all in one."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from warpmap import DEVICE
from warpmap.kernels.normalization.softmax import softmax, softmax_reference


class Meter(TorchDispatchMode):
    """Prints the elements that each operator reads and writes."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
        print(op.__name__.split(".")[0], sum(t.numel() for t in tensors))
        return out


x = torch.randn(4, 1000, device=DEVICE)

with Meter():
    step_by_step = softmax_reference(x)
# -> amax 4004
# -> sub 8004
# -> exp 8000
# -> sum 4004
# -> div 8004

with Meter():
    at_once = softmax(x)
# -> softmax 8000

print(torch.allclose(at_once, step_by_step))
# -> True
