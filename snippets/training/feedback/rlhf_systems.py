"""Four times the GPUs hardly help; not waiting for the longest answer does."""

from warpmap.training.feedback.rlhf_systems import rlhf_systems

for placement, gpus in (
    ("colocated", 16),
    ("colocated", 64),
    ("asynchronous", 16),
):
    run = rlhf_systems(placement, gpus=gpus)
    print(f"{placement}, {gpus} GPUs: {run.step_seconds:.0f} s a step,")
    print(f"    answers at most {run.most_staleness} updates behind")
# -> colocated, 16 GPUs: 183 s a step,
# ->     answers at most 0 updates behind
# -> colocated, 64 GPUs: 178 s a step,
# ->     answers at most 0 updates behind
# -> asynchronous, 16 GPUs: 43 s a step,
# ->     answers at most 5 updates behind
