"""Two ways to the same root: the values agree, the slopes do not."""

from warpmap.training.foundations.autograd import tensor


def newton(x):
    root = x
    for _ in range(9):
        root = (root + x / root) / 2
    return root


def bisection(x):
    low, high = x * 0, x
    for _ in range(60):
        middle = (low + high) / 2
        if middle.item() ** 2 < x.item():
            low = middle
        else:
            high = middle
    return low


for find in newton, bisection:
    x = tensor(2.0)
    root = find(x)
    root.backward()
    (slope,) = x.grad
    print(f"{find.__name__}: root {root.item():.6f}, slope {slope:.6f}")
# -> newton: root 1.414214, slope 0.353553
# -> bisection: root 1.414214, slope 0.707107
