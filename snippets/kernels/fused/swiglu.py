"""What does a gated activation keep for backward? Ask autograd."""

import torch

from warpmap import DEVICE
from warpmap.kernels.fused.swiglu import (
    swiglu,
    swiglu_packed,
    swiglu_reference,
)

T, F = 8, 512  # tokens, width of the feed-forward layer
x = torch.randn(T, 2 * F, device=DEVICE, requires_grad=True)
gate, up = x.chunk(2, dim=-1)


def kept(f, *inputs):
    """The result, and its elements kept for backward, in units of T F."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel() / (T * F))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f(*inputs)
    return y, sum(sizes)


steps, elements = kept(swiglu_reference, gate, up)
print("silu, then multiply:", elements)
# -> silu, then multiply: 3.0

fused, elements = kept(swiglu, gate, up)
print("in one kernel:", elements)
# -> in one kernel: 2.0

packed, elements = kept(swiglu_packed, x)
print("both halves packed:", elements)
# -> both halves packed: 2.0

print(all(torch.allclose(steps, y, atol=1e-6) for y in (fused, packed)))
# -> True
