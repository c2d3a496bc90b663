"""An indexer finds what attention looks at; a fixed pattern cannot."""

import torch

from warpmap import DEVICE
from warpmap.models.attention import _lightning_indexer as lightning
from warpmap.models.attention import sparse_attention as sparse
from warpmap.models.foundations.attention import attention_weights
from warpmap.training.foundations.optimizers import AdamW

torch.manual_seed(11)
S, K, C = 128, 20, 32  # tokens, keys of a query, values of a token
topics = torch.nn.functional.normalize(torch.randn(12, C), dim=1)
seen = torch.ones(S, S, device=DEVICE).tril().bool()
near = sparse.block_pattern(S, 4, near=4, first=1, device=DEVICE)  # 20 keys
indexer = lightning.LightningIndexer(C, C, 4, 16, rope_size=2).to(DEVICE)
optimizer = AdamW(indexer.parameters(), lr=0.03)


def report(name, weights, mask):
    kept = (weights.mean(dim=1) * mask).sum(dim=-1)[:, S // 2 :].mean()
    print(f"{name}: {kept.item():.1f} of the attention")


for step in range(30):
    x = topics[torch.randint(12, (1, S))] + 0.05 * torch.randn(1, S, C)
    x = x.to(DEVICE)  # a token looks for those with its own topic
    weights = attention_weights(6 * x[:, None], 6 * x[:, None], seen)
    scores, _ = indexer(x, x)
    chosen = sparse.selected_mask(*sparse.select(scores, K, seen), S)
    if step == 0:
        report("near keys, 20", weights, near)
        # -> near keys, 20: 0.3 of the attention
        report("new indexer's 20", weights, chosen)
        # -> new indexer's 20: 0.2 of the attention
    indexer.zero_grad()
    lightning.indexer_loss(scores, weights, seen).backward()
    optimizer.step()
report("trained indexer's 20", weights, chosen)
# -> trained indexer's 20: 1.0 of the attention
