"""A cache of constant size starts out larger, and is dear to share."""

from warpmap.inference.kv_cache.linear_attention_state import (
    PRESETS,
    linear_attention_state,
)

KIMI = PRESETS["Kimi Linear 48B-A3B"]


def mib(size):
    return f"{size / 2**20:,.1f} MiB"


# 20 of 27 layers keep a state, the others an MLA cache
for tokens in (100, 1885, 1_000_000):
    size = linear_attention_state(**KIMI, tokens=tokens)
    print(f"{tokens} tokens: {mib(size.request_bytes)},", end=" ")
    print("with MLA everywhere", mib(size.all_full_bytes))
# -> 100 tokens: 42.2 MiB, with MLA everywhere 3.0 MiB
# -> 1885 tokens: 55.9 MiB, with MLA everywhere 55.9 MiB
# -> 1000000 tokens: 7,731.8 MiB, with MLA everywhere 29,663.1 MiB

# a prefix can be reused only where a snapshot was taken
for every in (16, 1024, 8192):
    size = linear_attention_state(**KIMI, tokens=65536, snapshot_tokens=every)
    ratio = size.prefix_bytes / size.all_full_bytes
    print(f"a snapshot every {every}: {ratio:.2f} of MLA everywhere")
# -> a snapshot every 16: 87.50 of MLA everywhere
# -> a snapshot every 1024: 1.62 of MLA everywhere
# -> a snapshot every 8192: 0.43 of MLA everywhere
