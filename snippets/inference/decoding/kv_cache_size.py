"""Of three models the largest, by far, remembers a token in the least."""

from warpmap.inference.decoding.kv_cache_size import GIB, MODELS, kv_cache_size

# parameters in billions, for comparison only
BILLIONS = {"Llama 2 7B": 7, "Llama 3 8B": 8, "DeepSeek-V3": 671}

for name, parameters in BILLIONS.items():
    size = kv_cache_size(**MODELS[name], tokens=4096)
    gib = size.bytes_per_request / GIB
    print(f"{parameters:3} billion: {size.bytes_per_token} bytes a token,")
    print(f"    {gib:.2f} GiB a request of 4096 tokens")
# ->   7 billion: 524288 bytes a token,
# ->     2.00 GiB a request of 4096 tokens
# ->   8 billion: 131072 bytes a token,
# ->     0.50 GiB a request of 4096 tokens
# -> 671 billion: 70272 bytes a token,
# ->     0.27 GiB a request of 4096 tokens
