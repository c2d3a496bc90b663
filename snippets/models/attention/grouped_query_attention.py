"""An eighth of the cache, the same output; and a mistake nobody reports."""

import torch

from warpmap import DEVICE
from warpmap.models.attention.grouped_query_attention import (
    GroupedQueryAttention,
)

torch.manual_seed(0)
mha = GroupedQueryAttention(width=256, heads=16, kv_heads=16).to(DEVICE)

# a checkpoint in which 8 neighbouring heads hold the same keys and values
with torch.no_grad():
    for projection in (mha.k_proj, mha.v_proj):
        heads = projection.weight.view(16, 16, 256)
        heads.copy_(heads[::8].repeat_interleave(8, dim=0))

gqa = mha.pooled(kv_heads=2)
x = torch.randn(1, 100, 256, device=DEVICE)
want, mha_cache = mha(x)
got, gqa_cache = gqa(x)

print("MHA cache:", sum(t.nbytes for t in mha_cache), "bytes")
# -> MHA cache: 204800 bytes
print("GQA cache:", sum(t.nbytes for t in gqa_cache), "bytes")
# -> GQA cache: 25600 bytes
print("same output:", torch.allclose(got, want, atol=1e-5))
# -> same output: True

# group heads 0, 2, 4, ... instead of neighbours: every shape still fits
for old, new in ((mha.k_proj, gqa.k_proj), (mha.v_proj, gqa.v_proj)):
    mixed = old.weight.view(8, 2, 16, 256).mean(dim=0)
    new.weight = torch.nn.Parameter(mixed.reshape(32, 256))
got, _ = gqa(x)
print("same output:", torch.allclose(got, want, atol=1e-5))
# -> same output: False
