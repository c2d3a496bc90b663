"""Without a mask, the model predicts even random numbers, and is useless."""

import torch
from torch.nn.functional import cross_entropy

from warpmap import DEVICE
from warpmap.models.foundations.transformer import Transformer


def random_texts():
    return torch.randint(8, (32, 17)).to(DEVICE)


def loss_of(model, texts, causal):
    scores = model(texts[:, :-1], causal)
    return cross_entropy(scores.flatten(0, 1), texts[:, 1:].flatten())


# eight equal chances: nobody can do better than ln 8 = 2.08 nats
for causal in (True, False):
    torch.manual_seed(0)
    model = Transformer(8, width=32, layers=1, heads=2, longest=16).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        loss = loss_of(model, random_texts(), causal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    nats = round(loss.item())
    writing = loss_of(model, random_texts(), causal=True)
    print("causal:", causal, "- loss in training:", nats, "nats")
    print("writes worse than by guessing:", writing.item() > 2.5)
# -> causal: True - loss in training: 2 nats
# -> writes worse than by guessing: False
# -> causal: False - loss in training: 0 nats
# -> writes worse than by guessing: True
