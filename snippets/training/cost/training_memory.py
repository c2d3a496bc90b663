"""States shrink from 16 bytes to a quarter; logits and layers do not notice."""

from warpmap.training.cost.training_memory import GIB, training_memory

# Llama 3 8B, one sequence of 8192 tokens on each of 64 GPUs with 80 GiB
for stage in (0, 1, 2, 3):
    m = training_memory("Llama 3 8B", zero_stage=stage, data=64)
    print(f"ZeRO {stage}: {m.shared_bytes:5.2f} bytes a parameter", m.fits)
# -> ZeRO 0: 16.00 bytes a parameter False
# -> ZeRO 1:  4.19 bytes a parameter False
# -> ZeRO 2:  2.22 bytes a parameter True
# -> ZeRO 3:  0.25 bytes a parameter True

m = training_memory("Llama 3 8B", zero_stage=1, data=64)
states = m.weight_bytes + m.gradient_bytes + m.optimizer_bytes
print(f"{states / GIB:.0f} GiB of states, {m.activation_bytes / GIB:.0f} of")
print(f"activations, {m.peak_bytes / GIB:.0f} for the logits of 8192 tokens")
# -> 31 GiB of states, 41 of
# -> activations, 12 for the logits of 8192 tokens

# nothing shared any further: only the logits come in chunks
fused = training_memory("Llama 3 8B", zero_stage=1, data=64, loss="fused")
print(f"{fused.total_gib:.0f} GiB", fused.fits)
# -> 72 GiB True

# a layer keeps its input, and computes the rest again
again = training_memory(
    "Llama 3 8B", zero_stage=1, data=64, loss="fused", recompute="full"
)
print(again.most_sequences, "sequences instead of", fused.most_sequences)
# -> 13 sequences instead of 1
