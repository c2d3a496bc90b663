"""DeepSeek-V3's attention: 2% of the weights, 40% of the work."""

from warpmap.models.configs import config
from warpmap.models.families.deepseek_v3 import deepseek_v3, modules

parts = modules(config("DeepSeek-V3"), tokens=4096)
stored = sum(part.total for part in parts.values())
work = sum(part.forward_flops for part in parts.values())

for name in ("routed experts", "attention"):
    part = parts[name]
    print(f"{name}: {part.total / stored:.0%}, {part.forward_flops / work:.0%}")
# -> routed experts: 97%, 49%
# -> attention: 2%, 40%

# and those 2% decide the cache, smaller than Llama 3 8B's 131,072 bytes
v3 = deepseek_v3()
print(f"{v3.cache_bytes_per_token:,} bytes a token")
# -> 70,272 bytes a token

# 180,000 GPU hours a trillion tokens; a second prediction on top
print(f"MFU {v3.mfu_percent:.1f}%, {v3.mfu_with_mtp_percent:.1f}% with it")
# -> MFU 39.1%, 40.7% with it

# were every expert to run, in the same hours: faster than the GPUs can be
print(f"{deepseek_v3(experts_per_token=256).mfu_percent:.0f}%")
# -> 632%
