"""Cached keys know their positions: shuffle the slots, nothing changes."""

import torch

from warpmap import DEVICE
from warpmap.inference.decoding.kv_cache import GrowingCache, RingCache
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig

torch.manual_seed(0)
shape = DecoderConfig(100, 64, 2, heads=4, kv_heads=2, hidden=96)
model = Decoder(shape).to(DEVICE, torch.float64).requires_grad_(False)
for weight in model.parameters():
    weight *= 5  # as if trained: tokens look at few others
text = torch.randint(100, (1, 50), device=DEVICE)


def last_step(position=49, order=slice(None)):
    cache = GrowingCache(layers=2)
    model(text[:, :-1], cache=cache)
    cache.k = [k[:, :, order] for k in cache.k]
    cache.v = [v[:, :, order] for v in cache.v]
    where = torch.tensor([position], device=DEVICE)
    got = model(text[:, -1:], where, cache=cache)
    return torch.allclose(got, model(text)[:, -1:])


print("cached:", last_step())
# -> cached: True
print("slots shuffled:", last_step(order=torch.randperm(49, device=DEVICE)))
# -> slots shuffled: True
print("one position late:", last_step(position=50))
# -> one position late: False

ring = RingCache(shape, 1, 8, dtype=torch.float64, device=DEVICE)
for token in text.split(1, dim=1):
    model(token, cache=ring)
print(ring.length, "tokens,", ring.nbytes, "bytes:", ring.held().tolist())
# -> 50 tokens, 8192 bytes: [48, 49, 42, 43, 44, 45, 46, 47]
