"""The same request, three engines: how many words may be drawn?"""

import math

from warpmap.inference.generation.sampling import (
    ORDERS,
    Settings,
    inverse_cdf,
    probabilities,
    process,
)

# 30,000 words, as in Zipf's law: the n-th likeliest has about 1/n of the first
logits = [-1.1 * math.log(n) for n in range(1, 30_001)]
request = Settings(temperature=1.5, top_p=0.95, min_p=0.01)

for engine, order in ORDERS.items():
    kept = process(logits, request, order=order)
    words = sum(x > -math.inf for x in kept)
    rare = sum(probabilities(kept)[65:])
    drawn = [inverse_cdf(kept, u) + 1 for u in (0.2, 0.5, 0.8)]
    print(f"{engine}: {words} words, {rare:.0%} beyond the 65th; {drawn}")
# -> vLLM: 454 words, 48% beyond the 65th; [7, 60, 229]
# -> Transformers: 533 words, 51% beyond the 65th; [8, 69, 268]
# -> llama.cpp: 65 words, 0% beyond the 65th; [3, 12, 37]
