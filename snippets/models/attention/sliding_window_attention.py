"""Five tokens are kept, and the text of seventeen decides."""

import torch
from torch.nn.functional import normalize

from warpmap import DEVICE
from warpmap.models.attention.sliding_window_attention import RollingBuffer


def last_output(text):
    """Four layers with a window of 5 read a text, token by token."""
    layers = [RollingBuffer(window=5) for _ in range(4)]
    for x in text.split(1, dim=2):
        for layer in layers:
            n = normalize(x, dim=-1)
            x = x + layer.attend(n, n, n)
    kept = sum(layer.k.nbytes + layer.v.nbytes for layer in layers)
    return x, kept


torch.manual_seed(0)
text = torch.randn(1, 1, 40, 8, dtype=torch.float64, device=DEVICE)
before, kept = last_output(text)
matters = []
for back in range(40):
    other = text.clone()
    other[:, :, -1 - back] += 1
    if not torch.equal(last_output(other)[0], before):
        matters.append(back)

print("last token that matters:", matters[-1], "back, of", len(matters))
# -> last token that matters: 16 back, of 17
longer = text.repeat(1, 1, 5, 1)
print("bytes kept of 40 tokens:", kept, "of 200:", last_output(longer)[1])
# -> bytes kept of 40 tokens: 2560 of 200: 2560
