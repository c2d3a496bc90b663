"""The pool is full, and the oldest tokens are the ones that stay."""

from warpmap.inference.kv_cache.radix_attention import RadixCache

cache = RadixCache(capacity=12)
for request in (
    "be brief . who is Ada ?",
    "be brief . who is Bob ?",
    "be brief . add 2 2",
    "be brief . who is Bob ? but why",
):
    leaf, reused = cache.insert(request.split())
    print(f"{request}: {reused} tokens reused")
    print(cache, end="\n\n")
# -> be brief . who is Ada ?: 0 tokens reused
# -> be brief . who is Ada ? [0 1 2 3 4 5 6] t1
# ->
# -> be brief . who is Bob ?: 5 tokens reused
# -> be brief . who is [0 1 2 3 4] t2
# ->   Ada ? [5 6] t1
# ->   Bob ? [7 8] t2
# ->
# -> be brief . add 2 2: 3 tokens reused
# -> be brief . [0 1 2] t3
# ->   who is [3 4] t2
# ->     Ada ? [5 6] t1
# ->     Bob ? [7 8] t2
# ->   add 2 2 [9 10 11] t3
# ->
# -> be brief . who is Bob ? but why: 7 tokens reused
# -> be brief . [0 1 2] t4
# ->   who is [3 4] t4
# ->     Bob ? [7 8] t4
# ->       but why [5 6] t4
# ->   add 2 2 [9 10 11] t3
# ->
