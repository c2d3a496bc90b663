"""One token more: a causal model keeps its cache, a two-way model nothing."""

import torch

from warpmap import DEVICE
from warpmap.inference.decoding.kv_cache import GrowingCache
from warpmap.models.foundations._masks import prefix_mask, trains_on
from warpmap.models.foundations.attention import attention_weights
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig

torch.manual_seed(0)
shape = DecoderConfig(100, 64, 2, heads=4, kv_heads=2, hidden=96)
model = Decoder(shape).to(DEVICE, torch.float64)
text = torch.randint(100, (1, 9), device=DEVICE)


@torch.no_grad()
def keys(T, prefix):
    cache = GrowingCache(layers=2)
    model(text[:, :T], mask=prefix_mask(T, prefix).to(DEVICE), cache=cache)
    return cache.k[-1][:, :, :8]


for name, prefix, longer in (("causal", 0, 0), ("prefix", 4, 4), ("all", 8, 9)):
    same = (keys(8, prefix) - keys(9, longer)).abs().amax((0, 1, 3)) < 1e-12
    trained = trains_on(prefix_mask(8, prefix))
    print(f"{name}: {int(same.sum())} of 8 keys stay, {trained} of 7 trained")
# -> causal: 8 of 8 keys stay, 7 of 7 trained
# -> prefix: 8 of 8 keys stay, 4 of 7 trained
# -> all: 0 of 8 keys stay, 0 of 7 trained

# eight equal tokens: what attention can tell apart
q = k = torch.ones(1, 1, 8, 4, dtype=torch.float64)
for name, prefix in (("causal", 0), ("all", 8)):
    weights = attention_weights(q, k, prefix_mask(8, prefix))[0, 0]
    print(f"{name}: rank {torch.linalg.matrix_rank(weights)}")
# -> causal: rank 8
# -> all: rank 1
