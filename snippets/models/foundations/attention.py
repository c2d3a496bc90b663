"""Attention takes a mean, so it cannot count; one token apart changes that."""

import torch

from warpmap import DEVICE
from warpmap.models.foundations.attention import attention, attention_weights

torch.manual_seed(0)
letters = "ab^"
keys = torch.randn(3, 8, device=DEVICE)  # one for each letter
values = torch.randn(3, 8, device=DEVICE)
query = torch.randn(1, 1, 1, 8, device=DEVICE)


def read(text):
    which = [letters.index(letter) for letter in text]
    return attention(query, keys[which][None, None], values[which][None, None])


# twice the text: other weights, the same answer
print(torch.allclose(read("aab"), read("aabaab"), atol=1e-6))
# -> True
print(torch.allclose(read("aab"), read("baa"), atol=1e-6))
# -> True

# a mark that stands once: its weight tells how many tokens there are
print(torch.allclose(read("^aab"), read("^aabaab"), atol=1e-6))
# -> False
for n in (3, 7, 15):
    same = torch.zeros(1, 1, 1 + n, 8, device=DEVICE)
    print(n, "tokens:", attention_weights(query, same)[0, 0, 0, 0].item())
# -> 3 tokens: 0.25
# -> 7 tokens: 0.125
# -> 15 tokens: 0.0625
