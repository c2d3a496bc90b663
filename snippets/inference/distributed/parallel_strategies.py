"""Eight copies that never exchange a byte are slower than GPUs that do."""

from warpmap.inference.distributed.parallel_strategies import (
    parallel_strategies,
)

WAYS = ("data", "sequence", "expert", "tensor")


def compare(**work):
    """The same work on 8 H200s, each time split in one way."""
    for way in WAYS:
        split = {"tensor": 1, way: 8}
        plan = parallel_strategies("Mixtral 8x7B", **split, **work)
        print(f"{way}: sends {plan.sent_mb:.0f} MB, {plan.token_ms:.0f} ms")


# 64 requests write a token: a copy reads all experts for 8 requests
compare(batch=64)
# -> data: sends 0 MB, 18 ms
# -> sequence: sends 5 MB, 19 ms
# -> expert: sends 7 MB, 5 ms
# -> tensor: sends 63 MB, 5 ms

# 8 prompts of 4096 tokens: reading is nothing now, and bytes are time
compare(batch=8, new_tokens=4096)
# -> data: sends 0 MB, 109 ms
# -> sequence: sends 2349 MB, 116 ms
# -> expert: sends 3758 MB, 120 ms
# -> tensor: sends 30535 MB, 179 ms
