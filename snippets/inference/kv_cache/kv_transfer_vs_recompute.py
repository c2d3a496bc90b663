"""The larger the model, the slower a network may be that brings its cache."""

from warpmap.inference.kv_cache.kv_transfer_vs_recompute import (
    PRESETS,
    fetch_or_recompute,
)

# a prefix of 8192 tokens, an H200 at half of its peak, 10 Gbit/s
for name in ("Qwen3 0.6B", "Llama 3 8B", "Llama 3 70B", "DeepSeek-V3"):
    times = fetch_or_recompute(**PRESETS[name])
    faster = "fetch" if times.fetch_is_faster else "recompute"
    print(f"{name}: {faster}, equal at {times.break_even_gb_s:.2f} GB/s")
# -> Qwen3 0.6B: recompute, equal at 31.18 GB/s
# -> Llama 3 8B: recompute, equal at 4.03 GB/s
# -> Llama 3 70B: fetch, equal at 1.10 GB/s
# -> DeepSeek-V3: fetch, equal at 0.38 GB/s

# Llama 3 8B over PCI Express: a block in one piece, or one a layer
for pieces in (1, 32):
    times = fetch_or_recompute(link_gb_s=57.6, pieces_per_block=pieces)
    print(f"{pieces} a block: {times.fetch_ms:.0f} ms")
print(f"recompute: {times.recompute_ms:.0f} ms")
# -> 1 a block: 19 ms
# -> 32 a block: 82 ms
# -> recompute: 267 ms
