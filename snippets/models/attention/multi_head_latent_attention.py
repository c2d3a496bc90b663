"""One layer, two forms: which one is cheap depends on who asks."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from warpmap import DEVICE
from warpmap.models.attention.multi_head_latent_attention import (
    MultiHeadLatentAttention,
    absorbed_attention,
    expanded_attention,
)

torch.manual_seed(0)
# sizes of DeepSeek-V3, with 2 of its 128 heads and a narrow model
layer = MultiHeadLatentAttention(256, 2, 128, 512, 128, 64, 128)
layer = layer.to(DEVICE, torch.float64).requires_grad_(False)
text = torch.randn(1, 1024, 256, device=DEVICE, dtype=torch.float64)

_, cache = layer(text[:, :-1])
print("cached:", cache.shape[2], "values a token, for any number of heads")
# -> cached: 576 values a token, for any number of heads

for name, x, past in (
    ("the whole text", text, None),
    ("one more token", text[:, -1:], cache),
):
    outputs, work = [], []
    for form in (expanded_attention, absorbed_attention):
        with FlopCounterMode(display=False) as counter:
            outputs.append(layer(x, past, form)[0])
        work.append(counter.get_total_flops() / 1e6)
    same = torch.allclose(*outputs, rtol=0, atol=1e-12)
    print(f"{name}: {work[0]:.0f} or {work[1]:.0f} MFLOP; same: {same}")
# -> the whole text: 2483 or 5704 MFLOP; same: True
# -> one more token: 539 or 6 MFLOP; same: True
