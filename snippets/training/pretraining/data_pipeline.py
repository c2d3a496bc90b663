"""A copy in which 1 word of 20 was changed is not a near duplicate."""

from warpmap.training.pretraining.data_pipeline import (
    jaccard,
    near_copies,
    shingles,
)

original = [f"word{i}" for i in range(3000)]
texts = {"original": " ".join(original)}
for step in (200, 50, 30, 20, 10, 5):
    copy = list(original)
    copy[::step] = ["changed"] * len(copy[::step])
    texts[f"1 in {step}"] = "\n\n".join(copy)  # new lines do not matter

dropped = near_copies(texts, threshold=0.7)
first = shingles(texts["original"])
for name, text in texts.items():
    similarity = jaccard(first, shingles(text))
    print(f"{name:8} {similarity:.2f}", dropped.get(name, "kept"))
# -> original 1.00 kept
# -> 1 in 200 0.95 original
# -> 1 in 50  0.82 original
# -> 1 in 30  0.72 original
# -> 1 in 20  0.60 kept
# -> 1 in 10  0.33 kept
# -> 1 in 5   0.00 kept
