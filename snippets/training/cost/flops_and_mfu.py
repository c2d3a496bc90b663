"""Six FLOPs a weight and token: right for short texts, wrong for long ones."""

from warpmap.models.configs import config
from warpmap.training.cost.flops_and_mfu import flops_and_mfu, shape

llama = shape(config("Llama 3 8B"))

# the rule leaves out attention
rule = 6 * llama["matmul_parameters"] / 1e9
for tokens in (4096, 131_072):
    cost = flops_and_mfu(**llama, tokens=tokens).gflop_per_token
    print(
        f"{tokens:,} tokens: {cost:.0f} GFLOP a token, by the rule {rule:.0f}"
    )
# -> 4,096 tokens: 48 GFLOP a token, by the rule 45
# -> 131,072 tokens: 148 GFLOP a token, by the rule 45

# DeepSeek-V3 on 2048 H800, 272.8 billion tokens a day: one run, two MFUs
for causal in (True, False):
    print(f"{flops_and_mfu(causal=causal).mfu_percent:.1f}%")
# -> 39.0%
# -> 43.8%

# running every layer's forward again looks busy, and trains no faster
again = flops_and_mfu(recompute_layers=True)
print(f"MFU {again.mfu_percent:.1f}%, HFU {again.hfu_percent:.1f}%")
# -> MFU 39.0%, HFU 52.7%
