"""What looks as if it had to be done in order: three loops, each one scan."""

import torch

from warpmap import DEVICE
from warpmap.kernels.data_movement.scan import recurrence, scan

# keep some, drop others: everybody's new place, found by all at once
letters = "a--t-h----r--e-ad"
keep = torch.tensor([c != "-" for c in letters], device=DEVICE).int()
places = scan(keep, exclusive=True).tolist()
kept = [""] * sum(keep.tolist())
for letter, kept_at in zip(letters, places, strict=True):
    if letter != "-":
        kept[kept_at] = letter
print("".join(kept))
# -> athread

# a recurrence: 100 at the start, then 10 % interest a year
a = torch.full((1, 8), 1.1, device=DEVICE)
b = torch.tensor([[100.0] + [0.0] * 7], device=DEVICE)
print([round(h) for h in recurrence(a, b)[0].tolist()])
# -> [100, 110, 121, 133, 146, 161, 177, 195]

# where a is 0 the sum starts anew: segments of any lengths in one scan
a = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1]], device=DEVICE).float()
print(recurrence(a, torch.ones_like(a))[0].tolist())
# -> [1.0, 2.0, 3.0, 1.0, 2.0, 1.0, 1.0, 2.0]
