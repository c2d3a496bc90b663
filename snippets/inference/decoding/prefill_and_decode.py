"""At best, 200 tokens are read in the time that it takes to write one."""

import torch

from warpmap import DEVICE
from warpmap.inference.decoding._two_stages import pass_seconds, pass_work
from warpmap.inference.decoding.kv_cache import GrowingCache
from warpmap.inference.decoding.prefill_and_decode import greedy, stream
from warpmap.models.configs import MODELS
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig

torch.manual_seed(0)
shape = DecoderConfig(100, 64, 2, heads=4, kv_heads=2, hidden=96)
model, cache = Decoder(shape).to(DEVICE), GrowingCache(layers=2)
prompt = torch.randint(100, (1, 1024), device=DEVICE)

for _ in stream(model, prompt, 3, greedy, cache):
    print("a token after", cache.length, "were read")
# -> a token after 1024 were read
# -> a token after 1025 were read
# -> a token after 1026 were read

llama = MODELS["Llama 3 8B"]
for prompt_tokens in (1, 100, 200, 1024):
    read = pass_work(llama, batch=1, held=0, new=prompt_tokens)
    print(f"{prompt_tokens} tokens read: {1e3 * pass_seconds(read):.1f} ms")
# -> 1 tokens read: 3.1 ms
# -> 100 tokens read: 3.1 ms
# -> 200 tokens read: 3.1 ms
# -> 1024 tokens read: 14.9 ms

write = pass_work(llama, batch=1, held=1024, new=1)
print(f"1 token written: {1e3 * pass_seconds(write):.1f} ms")
# -> 1 token written: 3.2 ms
