"""Who guesses the token after next should know the next one."""

import torch

from warpmap import DEVICE
from warpmap.models.families import multi_token_prediction as mtp
from warpmap.models.families._self_drafting import generate
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig
from warpmap.training.foundations.optimizers import AdamW

torch.manual_seed(0)


def texts(n):
    """Like AaCcBb: one of nine capitals at random, then its small letter."""
    capitals = torch.randint(9, (n, 16), device=DEVICE)
    return torch.stack([capitals, capitals + 9], dim=-1).flatten(1)


for kind in (mtp.IndependentHeads, mtp.SequentialModules):
    decoder = Decoder(DecoderConfig(18, 32, 2, 2, 2, 64))
    model = kind(decoder, ahead=1).to(DEVICE)
    adam = AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(60):
        mtp.backward_by_depth(model, texts(32), weights=[1.0, 1.0])
        adam.step()
        model.zero_grad()

    new = texts(256)
    for k, features in enumerate(model.features(new)):
        loss = mtp.depth_loss(decoder, features, new, k) * 31 / (31 - k)
        print(f"{kind.__name__}, {k + 1} ahead: {loss.item():.1f} nats")
# -> IndependentHeads, 1 ahead: 1.1 nats
# -> IndependentHeads, 2 ahead: 2.2 nats
# -> SequentialModules, 1 ahead: 1.1 nats
# -> SequentialModules, 2 ahead: 1.1 nats

print(generate(model, new[:1, :4], new=21)[1], "passes for 21 tokens")
# -> 11 passes for 21 tokens
