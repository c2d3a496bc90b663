import math
import random
from operator import mul

import pytest
import torch
from torch.nn import functional as F

from warpmap.training.foundations import _flat, _tape, autograd
from warpmap.training.foundations._formula import backward_trace
from warpmap.training.foundations._jacobian import (
    difference_jacobian,
    forward_jacobian,
    reverse_jacobian,
)
from warpmap.training.foundations._tape import Edge, push, tape
from warpmap.training.foundations.autograd import tensor

# a few dozen roundings of 1.1e-16 on numbers around 1
EXACT = {"rtol": 1e-12, "atol": 1e-12}
ROWS, COLUMNS = [2, 0, 2, 2], [1, 0, 3, 3]


def both(f):
    return f, f


def attention(x):
    return (x @ x.T / 2).softmax() @ x


# ours, PyTorch's, shape of each input; inputs lie between 0.5 and 1.5
CASES = {
    "add": (*both(lambda a, b: a + b), (3, 1), (4,)),
    "subtract": (*both(lambda a, b: a - b), (4,), (2, 1, 4)),
    "multiply": (*both(lambda a, b: a * b), (2, 1, 3), (4, 1)),
    "divide": (*both(lambda a, b: a / b), (2, 3), (3,)),
    "by a number": (*both(lambda a, b: (2 - a) * 3 + 1 / b - 4), (3,), (3,)),
    "power": (*both(lambda a, b: a**3 + b**-0.5), (2, 3), (2, 3)),
    "exp and log": (*both(lambda a, b: a.exp() * b.log()), (2, 3), (2, 3)),
    "relu": (*both(lambda a: (a - 1).relu()), (9,)),
    "sum": (*both(lambda a: a.sum() * a.mean()), (3, 4)),
    "sum of columns": (*both(lambda a: a.sum(0)), (3, 4)),
    "sum of rows": (
        lambda a: a / a.sum(-1, keep=True),
        lambda a: a / a.sum(-1, keepdim=True),
        (3, 4),
    ),
    "sum in the middle": (*both(lambda a: a.sum(1)), (2, 3, 4)),
    "row": (*both(lambda a: a[1] * a[-1]), (3, 4)),
    "slice": (
        lambda a: a[::-2] * 2.0,
        lambda a: a[[3, 1]] * 2,
        (4, 2, 2),
    ),
    "repeated rows": (*both(lambda a: a[ROWS] * a[[1, 2, 1, 0]]), (3, 4)),
    "repeated elements": (*both(lambda a: a[ROWS, COLUMNS]), (3, 4)),
    "transpose": (*both(lambda a: a.T * a[0][1]), (3, 4)),
    "matmul": (*both(lambda a, b: a @ b), (3, 4), (4, 2)),
    "with itself": (*both(lambda a: a @ a @ a.T), (3, 3)),
    "one shared": (*both(lambda a: a * a + a.exp() * a), (4,)),
    "log-sum-exp": (
        lambda a: (a * 3).logsumexp(),
        lambda a: (a * 3).logsumexp(-1, keepdim=True),
        (3, 4),
    ),
    "attention": (
        attention,
        lambda a: F.softmax(a @ a.T / 2, -1) @ a,
        (3, 4),
    ),
    "cross entropy": (
        lambda a: a.logsumexp().mean() - a[[0, 1, 2], [3, 0, 3]].mean(),
        lambda a: F.cross_entropy(a, torch.tensor([3, 0, 3])),
        (3, 4),
    ),
}


def inputs(shapes):
    return [torch.rand(s, dtype=torch.float64) + 0.5 for s in shapes]


def close(got, want):
    torch.testing.assert_close(
        torch.tensor(got, dtype=torch.float64).reshape(want.shape),
        want,
        **EXACT,
    )


def check(name):
    """The result, and the gradient of each input, are PyTorch's."""
    ours, theirs, *shapes = CASES[name]
    xs = inputs(shapes)
    leaves = [tensor(x.tolist()) for x in xs]
    y = ours(*leaves)
    for x in xs:
        x.requires_grad_()
    want = theirs(*xs)
    assert y.shape == want.shape
    close(y.data, want.detach())
    seed = torch.rand_like(want)
    want.backward(seed)
    y.backward(seed.flatten().tolist())
    for x, leaf in zip(xs, leaves, strict=True):
        close(leaf.grad, x.grad)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_torch(name):
    check(name)


@pytest.mark.parametrize("name", CASES)
def test_jacobians_of_both_modes_agree_with_torch_and_differences(name):
    ours, theirs, *shapes = CASES[name]
    first, *rest = inputs(shapes)
    others = [tensor(x.tolist()) for x in rest]
    want = torch.autograd.functional.jacobian(lambda x: theirs(x, *rest), first)
    want = want.reshape(-1, first.numel())

    def f(x):
        return ours(x, *others)

    close(forward_jacobian(f, first.tolist()), want)
    close(reverse_jacobian(f, first.tolist()), want)
    # off by h^2 = 1e-10 times a third derivative, and by 1e-16 / h
    rows = difference_jacobian(f, first.tolist())
    near = torch.tensor(rows, dtype=torch.float64)
    torch.testing.assert_close(near, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_pull_is_the_transpose_of_push_at_every_edge(name):
    ours, _, *shapes = CASES[name]
    y = ours(*(tensor(x.tolist()) for x in inputs(shapes)))
    edges = [(node, edge) for node in tape(y) for edge in node.edges]
    assert edges
    for node, edge in edges:
        g = [random.random() for _ in node.data]
        v = [random.random() for _ in edge.source.data]
        forward = math.fsum(map(mul, g, edge.push(v)))
        back = math.fsum(map(mul, edge.pull(g), v))
        assert forward == pytest.approx(back, rel=1e-12)


def overwrite(held, node, share):
    held[node] = share


def depth_first(result):
    found = []

    def visit(node):
        if node not in found:
            found.insert(0, node)
            for edge in node.edges:
                visit(edge.source)

    visit(result)
    return found


def last_one_wins(places, size, v):
    found = [0.0] * size
    for place, x in zip(places, v, strict=True):
        found[place] = x
    return found


FAULTS = {
    "shares overwrite": (_tape, "_accumulate", overwrite),
    "not the order of the tape": (_tape, "tape", depth_first),
    "repeats overwrite": (_flat, "collect", last_one_wins),
    "not transposed": (_flat, "transposed", lambda v, columns: v),
    "a slope forgotten": (
        autograd,
        "_diagonal",
        lambda source, slopes: Edge(source, lambda v: v, lambda v: v),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_engine_is_caught(fault, monkeypatch):
    monkeypatch.setattr(*FAULTS[fault])
    caught = 0
    for name in CASES:
        try:
            check(name)
        except (AssertionError, KeyError):
            caught += 1
    assert caught


def test_gradients_add_up_over_calls_and_constants_get_none():
    x, data = tensor([1.0, 2.0]), tensor([3.0, 4.0], needs_grad=False)
    y = (x * data).sum()
    y.backward()
    y.backward([10.0])
    assert x.grad == [33.0, 44.0]
    assert data.grad is None
    assert tape(y) == [x, *tape(y)[1:]]
    assert data not in tape(y)
    assert not (data * 2).needs_grad


def test_leaves_do_not_share_one_list_of_gradients():
    a, b = tensor(1.0), tensor(2.0)
    (a + b).backward()
    a.grad[0] = 7.0
    assert b.grad == [1.0]


def test_an_old_tape_keeps_the_values_it_was_made_with():
    w = tensor([3.0])
    y = w * w
    w.data = [100.0]
    y.backward()
    assert w.grad == [6.0]


def test_relu_at_zero_has_slope_zero_as_in_torch():
    x = tensor([-1.0, -0.0, 0.0, 2.0])
    x.relu().sum().backward()
    want = torch.tensor(x.tolist(), requires_grad=True)
    want.relu().sum().backward()
    assert x.grad == want.grad.tolist() == [0, 0, 0, 1]


def test_log_sum_exp_survives_what_exp_does_not():
    x = tensor([1000.0, 999.0, -1000.0])
    want = torch.tensor(x.tolist(), dtype=torch.float64)
    close(x.logsumexp().data, want.logsumexp(0, keepdim=True))
    close(x.softmax().data, want.softmax(0))
    with pytest.raises(OverflowError):
        x.exp()


def test_a_long_tape_needs_no_recursion_and_a_forked_one_no_patience():
    x = tensor(1.0)
    y = x
    for _ in range(5000):
        y = y + 1
    y.backward()
    assert x.grad == [1.0]
    x = y = tensor(1.0)
    for _ in range(60):
        y = y + y  # 2 ** 60 paths lead back
    y.backward()
    assert x.grad == [2.0**60]


@pytest.mark.parametrize("inputs", [2, 30])
def test_work_of_a_jacobian_is_inputs_or_outputs_times_a_pass(
    inputs, monkeypatch
):
    outputs, hidden = 32 - inputs, 8
    first = tensor([[0.1] * inputs] * hidden, needs_grad=False)
    second = tensor([[0.2] * hidden] * outputs, needs_grad=False)
    product, done = _flat.product, []

    def counted(a, b, M, K, N):
        done.append(M * K * N)
        return product(a, b, M, K, N)

    monkeypatch.setattr(_flat, "product", counted)

    def f(x):
        y = second @ (first @ x)
        done.clear()
        return y

    a_pass = hidden * (inputs + outputs)
    x = [[1.0]] * inputs
    forward_jacobian(f, x)
    assert sum(done) == inputs * a_pass
    reverse_jacobian(f, x)
    assert sum(done) == outputs * a_pass


def test_what_does_not_depend_on_the_input_has_slope_zero():
    def f(x):
        return tensor([1.0, 2.0, 3.0]) * 2 + x.sum() * 0

    def none(x):
        return tensor([1.0, 2.0, 3.0]) * 2

    for jacobian in (forward_jacobian, reverse_jacobian, difference_jacobian):
        assert jacobian(f, [5.0, 6.0]) == [[0, 0]] * 3
        assert jacobian(none, [5.0, 6.0]) == [[0, 0]] * 3
    assert push(tensor(1.0), tensor(2.0), [1.0]) == [0.0]


@pytest.mark.parametrize(
    ("do", "says"),
    [
        (lambda: tensor([[1], [2, 3]]), "rows of one shape, got"),
        (lambda: tensor([1, 2]) + tensor([1, 2, 3]), "do not broadcast"),
        (
            lambda: tensor([[1]]) @ tensor([[1], [2]]),
            r"got \(1, 1\) @ \(2, 1\)",
        ),
        (lambda: tensor([1]) @ tensor([1]), r"expected \(M, K\) @ \(K, N\)"),
        (lambda: tensor([1, 2]).backward(), "a seed of 2 numbers, got None"),
        (lambda: tensor([1]).backward([1, 2]), "a seed of 1 numbers, got"),
        (lambda: tensor([-1.0]) ** 0.5, "math domain error"),
    ],
)
def test_bad_input_is_refused(do, says):
    with pytest.raises(ValueError, match=says):
        do()


# -- the trace -----------------------------------------------------------------

FORMULAS = [
    (
        "z = w * x + b; e = exp(z); p = e / (1 + e); loss = -log(p)",
        (0.5, 2, -2),
    ),
    ("y = w * w * x - relu(b) + relu(w)", (1.5, -2, 3)),
    ("a = w ** 3; a = a * a; y = (a - x) / b + 2 ** 2 * w", (1.1, 2, 3)),
    ("unused = log(b); y = w + w + x * 0", (1, 2, 3)),
]


@pytest.mark.parametrize(("formula", "values"), FORMULAS)
def test_trace_ends_with_the_gradients_of_torch(formula, values):
    given = dict(zip("wxb", values, strict=True))
    trace = backward_trace(
        formula, "; ".join(f"{k} = {v}" for k, v in given.items())
    )
    known = {
        k: torch.tensor(float(v), dtype=torch.float64, requires_grad=True)
        for k, v in given.items()
    }
    leaves = dict(known)
    known |= {"exp": torch.exp, "log": torch.log, "relu": torch.relu}
    exec(formula, known)
    result = known[formula.split(";")[-1].split("=")[0].strip()]
    result.backward()

    rows = dict(trace[-1].picture.rows)
    for name, leaf in leaves.items():
        if leaf.grad is None:
            assert name not in rows
            continue
        value, slope = rows[name]
        assert value.text == f"{leaf.item():.4g}"
        assert slope.text == f"{leaf.grad.item():.4g}"
        assert f"{name} {leaf.grad.item():.4g}" in trace[-1].caption
    assert list(rows.values())[-1][0].text == f"{result.item():.4g}"


def test_recording_changes_nothing_and_hears_of_every_edge():
    def gradients(record=None):
        w, x = tensor([[1.0, 2.0]]), tensor([[3.0], [4.0]])
        y = (w @ x).exp().log() * w.sum()
        heard = []
        y.backward(record=record and (lambda *event: heard.append(event)))
        return w.grad, x.grad, heard, tape(y)

    quiet, loud = gradients(), gradients(record=True)
    assert quiet[:2] == loud[:2]
    heard = [(node, edge) for node, edge, _ in loud[2]]
    nodes = reversed(loud[3])
    assert heard == [(node, edge) for node in nodes for edge in node.edges]


def test_default_trace_shows_a_gradient_that_waits_for_its_second_share():
    trace = backward_trace()
    assert 10 <= len(trace) <= 40
    marks = [dict(frame.picture.rows)["e"][1].mark for frame in trace]
    first = marks.index("wait")
    assert marks[first : first + 3] == ["wait", "wait", "new"]
    assert trace[first + 2].caption.endswith("more, -1.987 in all.")
    assert marks[-1] == ""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"values": "w = 1; w"}, "values must be 'name = ...', got 'w'"),
        ({"values": "w = y"}, "values must be numbers, got 'y' for w"),
        ({"values": "w = 1e999"}, "values must be numbers"),
        ({"values": " "}, "values must not be empty"),
        ({"formula": "y = w +"}, r"formula cannot be read at 'y = w \+'"),
        ({"formula": "y = q"}, "formula must not use q: it has no value"),
        ({"formula": "y = w @ w"}, "formula cannot have 'w @ w'"),
        ({"formula": "y = print(w)"}, "formula cannot have 'print"),
        ({"formula": "y = w.data"}, "formula cannot have 'w.data'"),
        ({"formula": "y = exp(2)"}, "formula must not take exp of a number"),
        ({"formula": "y = 2 ** w"}, "formula must have numbers as powers"),
        ({"formula": "y = w / 0"}, "formula fails at y: .*division by zero"),
        ({"formula": "y = log(-w)"}, "formula fails at y: "),
        ({"formula": "y = exp(w * 1e9)"}, "formula fails at y: "),
        ({"formula": "y = (0 - 2) ** 0.5 * w"}, "formula fails at y: "),
        ({"formula": "y = 9.0 ** 9 ** 9 * w"}, "formula fails at y: "),
        ({"formula": "y = w"}, "formula must compute something"),
        ({"formula": "y = 1 + 1"}, "formula must compute something"),
        ({"formula": "y = w" + " * w" * 17}, "at most 16 operations"),
        ({"formula": "y = w" + " * w" * 99}, "at most 300 characters"),
    ],
)
def test_bad_input_of_the_trace_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        backward_trace(**{"formula": "y = w * 2", "values": "w = 1"} | given)
