"""Who chooses decides which other tokens a token's experts depend on."""

from warpmap.models.experts.moe_routing import (
    expert_choice,
    grouped_gate,
    token_choice,
)

#         fit of expert 0, 1
first = [0.9, 0.1]
second = [0.8, 0.05]
calm, keen = [0.2, 0.7], [1.0, 0.0]

# the text goes on in two ways; which experts does the second token get?
for last in (calm, keen):
    text = [first, second, last]
    print("it chooses:", token_choice(text, k=1)[1], end=", ")
    print("experts choose:", expert_choice(text, capacity=2)[1])
# -> it chooses: [0], experts choose: [0]
# -> it chooses: [0], experts choose: [1]

# a stranger's token in the same batch, before ours; room for two tokens
for stranger in (calm, keen):
    batch = [stranger, first, second]
    print("with room for two:", token_choice(batch, k=1, capacity=2)[2])
# -> with room for two: [0]
# -> with room for two: []

# a bias comes from batches long ago; it moves the choice, never the weights
logits = [2.0, 1.0, 0.0, -1.0]
for lowered in (0.0, -0.1, -0.5):
    bias = [lowered, 0.0, 0.0, 0.0]
    experts, weights = grouped_gate(logits, bias, k=2, groups=2, kept=2)
    print(experts, [round(weight, 2) for weight in weights])
# -> [0, 1] [1.37, 1.13]
# -> [0, 1] [1.37, 1.13]
# -> [1, 2] [1.48, 1.02]
