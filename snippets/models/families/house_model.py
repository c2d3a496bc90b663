"""One line break at the end of a prompt, and the model loses the thread."""

import torch

from warpmap.models.families.house_model import house_model, house_tokenizer

tokenizer = house_tokenizer()
model = house_model("target").float()


def go_on(prompt: str, count: int) -> str:
    """The likeliest token, again and again."""
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    for _ in range(count):
        logits = model(torch.tensor([ids]))[0, -1]
        ids.append(int(logits.argmax()))
    return tokenizer.decode(ids[1:])


print(go_on("def __enter__(self):", 17))
# -> def __enter__(self):
# ->     return self
# ->
# -> def __exit__(self, *args):
# ->     pass
# ->

print(go_on("def __enter__(self):\n", 13))
# -> def __enter__(self):
# ->
# -> class Test(unittest.TestCase):
# ->     def test_simple(self):

# line break and indent are one token, which the second prompt has cut
print([tokenizer.tokens[i] for i in tokenizer.encode("):\n    return")])
# -> [b'):', b'\n   ', b' return']
