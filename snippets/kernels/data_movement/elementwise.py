"""What broadcasts is a stride of zero, and most dimensions melt away."""

import torch

from warpmap import DEVICE
from warpmap.kernels.data_movement.elementwise import merge_dims, multiply

x = torch.randn(2, 8, 16, 32, device=DEVICE, requires_grad=True)

for name, shape in {
    "a number": (),
    "a feature": (32,),
    "a batch": (2, 1, 1, 1),
    "a channel": (8, 1, 1),
}.items():
    a, b = torch.broadcast_tensors(x, torch.empty(shape))
    print("scale", name, merge_dims(a.shape, a.stride(), b.stride()))
# -> scale a number [(8192, 1, 0)]
# -> scale a feature [(256, 32, 0), (32, 1, 1)]
# -> scale a batch [(2, 4096, 1), (4096, 1, 0)]
# -> scale a channel [(2, 4096, 0), (8, 512, 1), (512, 1, 0)]

# the gradient of a sum: the kernel reads one number again and again
y = multiply(x, torch.ones(32, device=DEVICE))
y.register_hook(
    lambda dy: print(
        dy.numel(), "gradients in", dy.untyped_storage().nbytes(), "bytes"
    )
)
y.sum().backward()
# -> 8192 gradients in 4 bytes
