"""The tokens that nobody can predict are the ones that run all layers."""

import torch

from warpmap import DEVICE
from warpmap.models.foundations.residual_and_early_exit import (
    EarlyExitDecoder,
    early_exit,
    exit_loss,
)
from warpmap.models.foundations.transformer import Transformer

torch.manual_seed(0)
LETTERS = "ABCDEFGHabcdefgh"
model = Transformer(16, width=16, layers=4, heads=2, longest=16).to(DEVICE)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)

# texts like BbHhAa: a random capital, then its small letter
for _ in range(60):
    capital = torch.randint(8, (16, 5)).to(DEVICE)
    texts = torch.stack([capital, capital + 8], dim=2).flatten(1)
    loss = exit_loss(model, texts[:, :-1], texts[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

for threshold in (0.5, 1.0):
    decoder = EarlyExitDecoder(model, threshold)
    text = [LETTERS.index(letter) for letter in "CcAaHhDd"]
    print("CcAaHhDd:", *(decoder.step(token).depth for token in text))
# -> CcAaHhDd: 1 4 1 4 1 4 1 4
# -> CcAaHhDd: 4 4 4 4 4 4 4 4

# a threshold of 1 never fires: the full model, to the last bit
tokens = torch.tensor([text], device=DEVICE)
print(torch.equal(early_exit(model, tokens, 1.0)[0], model(tokens)))
# -> True
