"""64 requests read nearly every expert, and give each a token or two."""

from warpmap.inference.decoding.memory_bound_decoding import (
    memory_bound_decoding,
    operators,
)
from warpmap.models.configs import config

for batch in (1, 8, 64):
    step = memory_bound_decoding("DeepSeek-V3", batch)
    print(f"{batch}: {step.experts_read} experts, {step.weights_gb:.0f} GB")
# -> 1: 8 of 256 experts, 73 GB
# -> 8: 57 of 256 experts, 326 GB
# -> 64: 222 of 256 experts, 1169 GB

# at 64 requests, how often is what was read put to use?
for op in operators(config("DeepSeek-V3"), batch=64, context=4096):
    if op.name in ("experts", "shared experts", "attention"):
        print(f"{op.name}: {op.work.intensity:.1f} FLOPs a byte")
# -> attention: 241.8 FLOPs a byte
# -> experts: 2.3 FLOPs a byte
# -> shared experts: 64.0 FLOPs a byte
