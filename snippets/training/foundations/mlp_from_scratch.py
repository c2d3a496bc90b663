"""Exclusive or: what a hidden layer can do, and one that starts at zero not."""

from warpmap.training.foundations.mlp_from_scratch import MLP, Adam, train

XOR = [([0, 0], 0), ([0, 1], 1), ([1, 0], 1), ([1, 1], 0)]

straight = MLP([2, 2])
hidden = MLP([2, 8, 2])
from_zero = MLP([2, 8, 2])
for p in from_zero.parameters():
    p.data = [0.0] * len(p.data)

for name, model in {
    "no hidden layer": straight,
    "hidden layer": hidden,
    "hidden layer, from zero": from_zero,
}.items():
    adam = Adam(model.parameters(), lr=0.05)
    losses = train(model, adam, XOR, size=4, epochs=300)
    print(f"{name}: loss {losses[-1]:.3f}")
# -> no hidden layer: loss 0.693
# -> hidden layer: loss 0.000
# -> hidden layer, from zero: loss 0.693
