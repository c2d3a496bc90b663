"""Eight experts of a 7B model are not 56B, and few weights see a token."""

from warpmap.models.configs import config
from warpmap.models.foundations.parameter_count import count


def billions(n):
    return f"{n / 1e9:.2f}B"


one = count(config("Mistral 7B v0.1"))
eight = count(config("Mixtral 8x7B"))

# the same layers; only the FFN exists eight times
print(billions(8 * one.total), "or", billions(eight.total))
# -> 57.93B or 46.70B
print(one.attention == eight.attention)
# -> True
print(billions(one.total + 7 * one.dense_ffn + eight.routers))
# -> 46.70B

# a token runs two of eight experts; its embedding is looked up
print(billions(eight.active), billions(eight.active_with_embeddings))
# -> 12.75B 12.88B

large = count(config("DeepSeek-V3"))
print(f"{large.routed_experts / large.total:.1%} sit in routed experts")
# -> 97.4% sit in routed experts
print(f"{large.active / large.total:.1%} multiply a token")
# -> 5.5% multiply a token
