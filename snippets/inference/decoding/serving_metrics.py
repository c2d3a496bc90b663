"""Past its best rate a server finishes more requests and fewer good ones."""

from warpmap.inference.decoding.serving_metrics import serving_metrics

for rate in (2, 4, 8):
    served = serving_metrics(requests_per_s=rate)
    print(f"{rate} a second: {served.tokens_per_s:.0f} tokens a second,")
    print(f"    {served.attainment:.0f} % of the requests kept both promises")
# -> 2 a second: 191 tokens a second,
# ->     100 % of the requests kept both promises
# -> 4 a second: 379 tokens a second,
# ->     90 % of the requests kept both promises
# -> 8 a second: 746 tokens a second,
# ->     6 % of the requests kept both promises
