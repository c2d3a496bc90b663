"""Two cards of one peak: 295 tokens fill an H100, 206 an H200.

A weight in bf16 takes 2 bytes, and 2 FLOPs for each token. So a card's FLOPs
a byte are also the tokens that must share a weight to fill its tensor cores.
"""

from warpmap.hardware.gpus import GPUS
from warpmap.hardware.performance.gpu_specifications import rebuilt_tflops

print("            rebuilt   sheet  printed  tokens")
# ->             rebuilt   sheet  printed  tokens
for name in ("A100 80GB SXM", "H100 SXM", "H200 SXM", "RTX 4090"):
    card = GPUS[name]
    rebuilt = rebuilt_tflops(card, "bf16")
    dense = card.peak_tflops("bf16")
    printed = card.peak_tflops("bf16", sparse=True)
    tokens = card.flops_per_byte("bf16")
    short = name.removesuffix(" SXM")
    print(f"{short:10} {rebuilt:8.0f} {dense:7} {printed:8.0f} {tokens:7.0f}")
# -> A100 80GB       312     312      624     153
# -> H100            989   989.4     1979     295
# -> H200            989   989.4     1979     206
# -> RTX 4090        165   165.2      330     164
