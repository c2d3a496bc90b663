"""Spread wider, each GPU serves more, though its messages travel further."""

from warpmap.inference.decoding.capacity_planning import (
    SERVERS,
    capacity_planning,
)

served = SERVERS["DeepSeek-V3 as published"]
for groups in (16, 32, 144):
    plan = capacity_planning(**{**served, "data_parallel": groups})
    print(f"{groups} H800: {plan.weights_gb:.0f} GB of weights on each,")
    print(f"    {plan.batch} requests, {plan.decode_tokens_per_s:.0f} tokens/s")
# -> 16 H800: 58 GB of weights on each,
# ->     62 requests, 2636 tokens/s
# -> 32 H800: 38 GB of weights on each,
# ->     121 requests, 5129 tokens/s
# -> 144 H800: 22 GB of weights on each,
# ->     166 requests, 6426 tokens/s
