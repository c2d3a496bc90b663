"""The best layout depends on the network as much as on the model."""

from warpmap.training.parallel_practice.parallelism_planner import (
    parallelism_planner,
)

# Llama 3 70B on 256 H100; GB/s of each GPU's network card, one way
for network in (50, 25, 6.25, 3.125):
    best = parallelism_planner("Llama 3 70B", gpus=256, network_gb_s=network)
    print(f"{best.plan:18} {best.mfu_percent:.0f}% of the peak at most")
# -> d64 t2 c2 zero3    60% of the peak at most
# -> d8 t4 p4 c2        55% of the peak at most
# -> d256 b2 zero3 full 53% of the peak at most
# -> d4 t4 p8 c2        43% of the peak at most

# the fourth splits stages over nodes: they send little
print(f"{best.pipeline} stages wait {best.bubble_percent:.1f}% of a step")
print(f"and take {best.micro_batches} micro-batches each")
# -> 8 stages wait 4.6% of a step
# -> and take 128 micro-batches each

# with a quarter of the GPUs each of them does more
few = parallelism_planner("Llama 3 70B", gpus=64, network_gb_s=3.125)
print(f"{few.plan}: {few.mfu_percent:.0f}%")
# -> d2 t4 p4 c2: 53%
