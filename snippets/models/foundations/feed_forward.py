"""Two gated units multiply any two numbers; a ReLU network never does."""

import torch

from warpmap.models.foundations.feed_forward import SwiGLU, feed_forward

layer = SwiGLU(width=2, hidden=2).double()
with torch.no_grad():
    # unit 1 holds silu(a) b, unit 2 holds silu(-a) (-b); they add up to a b
    layer.gate.weight.copy_(torch.tensor([[1, 0], [-1, 0]]))
    layer.up.weight.copy_(torch.tensor([[0, 1], [0, -1]]))
    layer.down.weight.copy_(torch.tensor([[1, 1], [0, 0]]))

for a, b in [(6, 7), (-12, 12), (1234, 5678), (0.5, 0.25)]:
    product = layer(torch.tensor([a, b], dtype=torch.float64))[0].item()
    print(f"{a} * {b} = {product:.10g}")
# -> 6 * 7 = 42
# -> -12 * 12 = -144
# -> 1234 * 5678 = 7006652
# -> 0.5 * 0.25 = 0.125

# ReLU, 1000 units, any weights: twice the input gives twice the output,
# where a product grows fourfold
torch.manual_seed(0)
up, down = torch.randn(1000, 2), torch.randn(1, 1000)
x = torch.randn(5, 2)
once = feed_forward(x, up, down.expand(2, -1), activation="relu")
twice = feed_forward(2 * x, up, down.expand(2, -1), activation="relu")
print("twice the input, twice the output:", torch.equal(twice, 2 * once))
# -> twice the input, twice the output: True
