"""One bit flips on the disk: torch.load reads infinity, a checksum refuses."""

import io
import tempfile
import warnings
from pathlib import Path

import torch

from warpmap.training.pretraining.checkpointing import (
    HEADER,
    latest_checkpoint,
    save_checkpoint,
)

folder = Path(tempfile.mkdtemp())
for step in (100, 200, 300):
    path = save_checkpoint(folder, step, {"w": torch.ones(4)})
print(sorted(file.name for file in folder.iterdir()))
# -> ['step-00000200.ckpt', 'step-00000300.ckpt']

data = bytearray(path.read_bytes())
weights = data.find(torch.ones(4).numpy().tobytes())
data[weights + 3] ^= 0b0100_0000
path.write_bytes(data)

# what stands behind our header is an ordinary file of torch.save
payload = io.BytesIO(data[HEADER.size :])
print(torch.load(payload, weights_only=True)["state"]["w"].tolist())
# -> [inf, 1.0, 1.0, 1.0]

with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    step, state = latest_checkpoint(folder)
print(str(told[0].message).split(" is ")[1])
# -> corrupted: its SHA-256 differs
print(step, state["w"].tolist())
# -> 200 [1.0, 1.0, 1.0, 1.0]
