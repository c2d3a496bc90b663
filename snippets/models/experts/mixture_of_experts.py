"""Cut every expert into four: the same function, far more teams."""

from math import comb

import torch

from warpmap import DEVICE
from warpmap.models.experts.mixture_of_experts import MixtureOfExperts

torch.manual_seed(0)
coarse = MixtureOfExperts(width=64, hidden=128, experts=8, per_token=2)
coarse = coarse.double().to(DEVICE)
fine = coarse.fine_grained(pieces=4)

for layer in (coarse, fine):
    experts, runs = len(layer.experts), layer.per_token
    weights = sum(w.numel() for w in layer.experts.parameters())
    print(f"{runs} of {experts} experts: {weights} weights,", end=" ")
    print(f"{weights * runs // experts} run, {comb(experts, runs)} teams")
# -> 2 of 8 experts: 196608 weights, 49152 run, 28 teams
# -> 8 of 32 experts: 196608 weights, 49152 run, 10518300 teams

x = torch.randn(1000, 64, dtype=torch.float64, device=DEVICE)
print("same output:", torch.allclose(fine(x), coarse(x)))
# -> same output: True

# of those teams, how many can the copy choose before it has learnt more?
teams = fine.router(x).topk(8).indices.sort().values
print("chosen by 1000 tokens:", len(teams.unique(dim=0)))
# -> chosen by 1000 tokens: 28
