"""Two intervals overlap, and yet one model is better."""

from warpmap.training.pretraining.evaluation import bootstrap, mean

# 164 problems: B solves what A solves, and 9 more
a = [1] * 115 + [0] * 49
b = [1] * 124 + [0] * 40


def show(name, values):
    low, high = bootstrap(values)
    print(f"{name}: {mean(values):.1%}, 95% of draws {low:.1%} to {high:.1%}")


show("A", a)
# -> A: 70.1%, 95% of draws 62.8% to 76.8%
show("B", b)
# -> B: 75.6%, 95% of draws 68.9% to 82.3%
show("B - A", [y - x for x, y in zip(a, b, strict=True)])
# -> B - A: 5.5%, 95% of draws 2.4% to 9.1%
