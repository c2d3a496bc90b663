import heapq
import itertools
import math
import random
import subprocess
import sys
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from warpmap import DEVICE
from warpmap.training.cost import gradient_checkpointing
from warpmap.training.cost._recompute_calculator import (
    PRESETS,
    recompute_chart,
    recompute_plan,
    recompute_trace,
)
from warpmap.training.cost._recompute_plan import (
    MOST,
    best_segments,
    calls,
    schedule,
    segments_peak,
)
from warpmap.training.cost.gradient_checkpointing import (
    Recomputed,
    checkpoint,
    in_segments,
    nested,
)

ROOT = Path(__file__).parents[3]
CALLS = {"call": False, "reverse": True}  # with a graph?
PAGE = ROOT / "docs/training/cost/gradient_checkpointing.md"


class Layer(nn.Module):
    """A transformer's layer with dropout in three places; logs its calls."""

    def __init__(self, C=16, heads=2, p=0.3):
        super().__init__()
        self.heads, self.p, self.log = heads, p, None
        self.norm_1, self.norm_2 = nn.RMSNorm(C), nn.RMSNorm(C)
        self.qkv = nn.Linear(C, 3 * C)
        self.out = nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        if self.log is not None:
            self.log(self, x)
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (z.transpose(1, 2) for z in qkv.unbind(dim=2))
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        y = y.transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(self.dropout(y)))
        y = self.down(silu(self.up(self.norm_2(x))))
        return x + self.dropout(y)


def chain(n, **kwargs):
    torch.manual_seed(7)
    return [Layer(**kwargs).to(DEVICE) for _ in range(n)]


def tokens(requires_grad=True):
    torch.manual_seed(8)
    return torch.randn(2, 5, 16, device=DEVICE, requires_grad=requires_grad)


def gradients(model, layers, x):
    """Loss, gradients of the input and the weights, and what is drawn next."""
    torch.manual_seed(9)
    x.grad = None
    nn.ModuleList(layers).zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    weights = nn.ModuleList(layers).parameters()
    drawn = torch.rand(3, device=DEVICE)  # by the generator dropout uses
    return [loss, x.grad, *(w.grad for w in weights), drawn]


def equal(a, b):
    return all(
        x is y if x is None or y is None else torch.equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


def torch_model(layers, use_reentrant):
    def run(x):
        for layer in layers:
            x = torch_checkpoint(layer, x, use_reentrant=use_reentrant)
        return x

    return run


WAYS = {
    "plain": lambda layers: nn.Sequential(*layers),
    "each layer": lambda ls: nn.Sequential(*map(Recomputed, ls)),
    "segments": lambda ls: in_segments(ls, [3, 2, 1]),
    "one segment": lambda ls: in_segments(ls, [6]),
    "nested, no slot": lambda ls: nested(ls, 0),
    "nested, one slot": lambda ls: nested(ls, 1),
    "nested, many slots": lambda ls: nested(ls, 9),
    "PyTorch": lambda ls: torch_model(ls, False),
    "PyTorch, reentrant": lambda ls: torch_model(ls, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_the_plain_model_to_the_last_bit(way):
    layers, x = chain(6), tokens()
    want = gradients(WAYS["plain"](layers), layers, x)
    assert equal(gradients(WAYS[way](layers), layers, x), want)
    assert want[1].abs().max() > 0
    # with other masks of dropout they are others
    torch.manual_seed(1)
    x.grad = None
    WAYS["plain"](layers)(x).square().mean().backward()
    assert not torch.equal(x.grad, want[1])


@pytest.mark.parametrize("way", ["segments", "nested, one slot"])
def test_under_autocast_too(way):
    layers, x = chain(6), tokens()

    def low(model):
        def run(x):
            with torch.autocast(DEVICE, torch.bfloat16):
                return model(x)

        return run

    want = gradients(low(WAYS["plain"](layers)), layers, x)
    assert equal(gradients(low(WAYS[way](layers)), layers, x), want)
    assert not equal(gradients(WAYS["plain"](layers), layers, x), want)


class Forgetful(gradient_checkpointing._Conditions):
    """Wrong: dropout draws what comes next."""

    def again(self):
        return torch.autocast(self.device.type, self.low, self.is_low)


class Rewinding(gradient_checkpointing._Conditions):
    """Wrong: what is drawn after the backward pass was drawn before."""

    def again(self):
        torch.set_rng_state(self.cpu)
        for gpu, state in zip(self.gpus, self.cuda, strict=True):
            torch.cuda.set_rng_state(state, gpu)
        return torch.autocast(self.device.type, self.low, self.is_low)


class Wide(gradient_checkpointing._Conditions):
    """Wrong: the second time without autocast."""

    def __init__(self, device):
        super().__init__(device)
        self.is_low = False


@pytest.mark.parametrize("fault", [Forgetful, Rewinding, Wide])
def test_checks_catch(fault, monkeypatch):
    monkeypatch.setattr(gradient_checkpointing, "_Conditions", fault)
    layers, x = chain(6), tokens()
    with torch.autocast(DEVICE, torch.bfloat16):
        want = gradients(WAYS["plain"](layers), layers, x)
        torch.manual_seed(9)
        x.grad = None
        nn.ModuleList(layers).zero_grad()
        loss = WAYS["each layer"](layers)(x).square().mean()
    loss.backward()
    weights = nn.ModuleList(layers).parameters()
    drawn = torch.rand(3, device=DEVICE)
    got = [loss, x.grad, *(w.grad for w in weights), drawn]
    assert not equal(got, want)


def test_weights_get_gradients_though_no_input_needs_one():
    layers, x = chain(2), tokens(requires_grad=False)
    want = gradients(WAYS["plain"](layers), layers, x)
    assert equal(gradients(WAYS["each layer"](layers), layers, x), want)
    # the trap of PyTorch's older way
    with pytest.warns(UserWarning, match="None of the inputs have requires_g"):
        y = torch_checkpoint(layers[0], x, use_reentrant=True)
    assert not y.requires_grad


def test_frozen_weights_and_other_inputs_get_none():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.a.requires_grad_(False)

        def forward(self, x, mask, scale):
            return (self.b(self.a(x)) * scale).masked_fill(mask, 0)

    layer = Masked().to(DEVICE)
    x = torch.randn(3, 4, device=DEVICE)
    mask = torch.eye(3, 4, device=DEVICE).bool()
    scale = torch.ones(4, device=DEVICE, requires_grad=True)
    checkpoint(layer, x, mask, scale).sum().backward()
    got, layer.b.weight.grad = [scale.grad, layer.b.weight.grad], None
    scale.grad = None
    layer(x, mask, scale).sum().backward()
    assert equal(got, [scale.grad, layer.b.weight.grad])
    assert layer.a.weight.grad is None
    assert x.grad is None


def test_a_weight_that_segments_share_sums_its_gradients():
    layer, x = chain(1)[0], tokens()
    want = gradients(WAYS["plain"]([layer] * 3), [layer], x)
    for sizes in [1, 1, 1], [1, 2]:
        model = in_segments([layer] * 3, sizes)
        assert equal(gradients(model, [layer], x), want)
    assert equal(gradients(nested([layer] * 3, 0), [layer], x), want)


@pytest.mark.parametrize("way", ["each layer", "segments", "nested, one slot"])
def test_each_weight_gets_its_gradient_once(way):
    """On top of what is there; and hooks see it once, as in the plain run."""
    layers, seen = chain(6), []
    weights = list(nn.ModuleList(layers).parameters())
    for w in weights:
        w.register_hook(lambda grad: seen.append(grad.shape))
        w.register_post_accumulate_grad_hook(lambda w: seen.append(w))
    found = []
    for model in WAYS["plain"](layers), WAYS[way](layers):
        torch.manual_seed(9)
        nn.ModuleList(layers).zero_grad()
        for x in tokens(), tokens(requires_grad=False) + 1:
            seen.clear()
            model(x).square().mean().backward()
            assert len(seen) == 2 * len(weights)
        found.append([w.grad for w in weights])
    assert equal(*found)


def test_inputs_that_were_computed_pass_gradients_on():
    layers, x = chain(2), tokens()
    before = nn.Linear(16, 16).to(DEVICE)

    def way(layer):
        return lambda x: layer((y := before(x)) + 1) * y

    want = gradients(way(layers[0]), [layers[0], before], x)
    got = gradients(way(Recomputed(layers[0])), [layers[0], before], x)
    assert equal(got, want)
    assert want[1].abs().max() > 0


def test_autograd_grad_through_a_checkpoint_raises():
    layers, x = chain(3), tokens()
    model = in_segments(layers, [1, 1, 1])
    first, last = layers[0].up.weight, layers[2].up.weight
    for wanted in [x], [x, first]:
        with pytest.raises(RuntimeError, match=r"adds to the \.grad of all"):
            torch.autograd.grad(model(x).sum(), wanted)
        with pytest.raises(RuntimeError, match=r"adds to the \.grad of all"):
            model(x).sum().backward(inputs=wanted)
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(model(x).sum(), first)
    (none,) = torch.autograd.grad(model(x).sum(), first, allow_unused=True)
    assert none is None
    model(x).sum().backward(inputs=[first])
    # none of that left something behind
    weights = nn.ModuleList(layers).parameters()
    assert all(w.grad is None for w in (x, *weights))
    # and what is no checkpoint's can be asked for
    (grad,) = torch.autograd.grad(model(x).sum(), last)
    assert grad.abs().max() > 0


def test_weights_changed_in_between_are_told():
    layer, x = Recomputed(nn.Linear(16, 16).to(DEVICE)), tokens()
    y = layer(x)
    with torch.no_grad():
        layer.segment.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


class Most:
    """Bytes that autograd holds, weights left out, and the most of them."""

    def __init__(self, layers):
        weights = nn.ModuleList(layers).parameters()
        self.weights = {w.untyped_storage().data_ptr() for w in weights}
        self.held, self.now, self.most = {}, 0, 0

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        at = storage.data_ptr()
        if at in self.weights:
            return tensor
        holder = self.held.get(at)
        holder = holder and holder()
        if holder is None:
            holder = Holder(tensor)
            self.held[at] = weakref.ref(holder)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(holder, self.free, storage.nbytes())
        return holder, tensor.detach()

    def free(self, size):
        self.now -= size

    @staticmethod
    def unpack(packed):
        return packed if torch.is_tensor(packed) else packed[1]


class Holder:
    """Lives as long as a graph needs a storage, which it keeps in place."""

    def __init__(self, tensor):
        self.storage = tensor.untyped_storage()


class Known(nn.Module):
    """Keeps ``width`` numbers for each of its input, the input included."""

    def __init__(self, width):
        super().__init__()
        self.width = width

    def forward(self, x):
        for _ in range(self.width):
            x = x.sin()  # keeps its input
        return x


def most_held(model, layers, x):
    most = Most(layers)
    with torch.autograd.graph.saved_tensors_hooks(most.pack, most.unpack):
        model(x).sum().backward()
    assert most.now == 0
    return most.most // x.nbytes


@pytest.mark.parametrize("seed", range(8))
def test_segments_hold_what_is_predicted(seed):
    draw = random.Random(seed)
    insides = [draw.randint(1, 5) for _ in range(7)]
    layers = [Known(n) for n in insides]
    x = torch.randn(50, requires_grad=True)
    cuts = sorted(draw.sample(range(1, 7), draw.randint(0, 6)))
    sizes = [b - a for a, b in itertools.pairwise([0, *cuts, 7])]
    got = most_held(in_segments(layers, sizes), layers, x)
    assert got == segments_peak([1] * 7, insides, sizes)
    assert most_held(nn.Sequential(*layers), layers, x) == sum(insides)
    assert got <= sum(insides)


@pytest.mark.parametrize("slots", [0, 1, 3, 20])
@pytest.mark.parametrize("n", [1, 2, 12])
def test_nested_holds_slots_and_calls_layers_as_planned(n, slots):
    done = []
    layers = [Known(4) for _ in range(n)]
    for i, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            lambda module, args, i=i: done.append((torch.is_grad_enabled(), i))
        )
    x = torch.randn(50, requires_grad=True)
    got = most_held(nested(layers, slots), layers, x)
    assert got == min(slots + 1, n - 1) + 4
    assert len(done) == calls(n, slots)
    steps = [(CALLS[w], i) for w, i in schedule(n, slots) if w in CALLS]
    assert done == steps


class Late(torch.autograd.Function):
    """Wrong: returns the weights' gradients, which wait in here till then."""

    @staticmethod
    def forward(ctx, segment, x, *weights):
        ctx.segment = segment
        ctx.save_for_backward(x, *weights)
        return segment(x)

    @staticmethod
    def backward(ctx, grad):
        x, *weights = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.segment(x)
        return None, *torch.autograd.grad(y, [x, *weights], grad)


class Alive(TorchDispatchMode):
    """How many new tensors of so many bytes are alive, and the most of them."""

    def __init__(self, nbytes):
        super().__init__()
        self.nbytes, self.alive, self.most = nbytes, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        old = {
            t.untyped_storage()._cdata
            for t in tree_leaves(args)
            if torch.is_tensor(t)
        }
        out = func(*args, **(kwargs or {}))
        for t in filter(torch.is_tensor, tree_leaves(out)):
            storage = t.untyped_storage()
            at = storage._cdata
            if storage.nbytes() == self.nbytes and at not in self.alive | old:
                self.alive.add(at)
                weakref.finalize(storage, self.alive.remove, at)
        self.most = max(self.most, len(self.alive))
        return out


def most_gradients(model, layers):
    """Of weights, outside of ``.grad``; each layer is one matrix."""
    for layer in layers:
        layer.weight.grad = torch.zeros_like(layer.weight)
    y = model(torch.randn(5, 8, requires_grad=True))
    with Alive(layers[0].weight.nbytes) as alive:
        y.sum().backward()
    assert not alive.alive
    assert all(layer.weight.grad.abs().max() > 0 for layer in layers)
    return alive.most


def test_one_gradient_of_a_weight_waits_at_most(monkeypatch):
    layers = [nn.Linear(8, 8, bias=False) for _ in range(12)]
    ways = [nested(layers, 0), nested(layers, 1), nested(layers, 3)]
    ways += [in_segments(layers, [5, 4, 3])]
    for model in nn.Sequential(*layers), *ways:
        assert most_gradients(model, layers) == 1
    monkeypatch.setattr(
        gradient_checkpointing,
        "checkpoint",
        lambda segment, x: Late.apply(segment, x, *segment.parameters()),
    )
    late = [most_gradients(model, layers) for model in ways]
    # with no slot to keep an input, all but the last layer's wait
    assert max(late) == 11
    assert min(late) > 3


@pytest.mark.parametrize(("n", "slots"), [(1, 0), (2, 1), (7, 0), (30, 3)])
def test_schedule_is_possible(n, slots):
    kept, now, left = set(), None, n
    for what, i in schedule(n, slots):
        if what == "keep":
            assert now in (i, None)
            kept.add(i)
            now = i
        elif what == "free":
            kept.remove(i)
        else:
            assert i in kept or i == now  # its input is there
            now = i + 1
            if what == "reverse":
                assert i == left - 1  # backwards, without a gap
                left, now = i, None
        assert len(kept) <= slots + 1
    assert (left, kept) == (0, set())


def fewest_calls(n, slots):
    """Any order of calling, keeping and freeing, by Dijkstra's search."""
    start = (n, frozenset([0]), 0)  # left, kept inputs, input in hand
    best, queue = {start: 0}, [(0, 0, start)]
    count = itertools.count(1)
    while queue:
        cost, _, state = heapq.heappop(queue)
        left, kept, now = state
        if left == 0:
            return cost
        if cost > best[state]:
            continue
        further = [(0, (left, kept, k)) for k in kept]
        further += [(0, (left, kept - {k}, now)) for k in kept - {0}]
        if now is not None:
            if len(kept) <= slots:
                further.append((0, (left, kept | {now}, now)))
            if now == left - 1:
                further.append((1, (left - 1, kept, None)))
            elif now < left - 1:
                further.append((1, (left, kept, now + 1)))
        for more, then in further:
            if cost + more < best.get(then, math.inf):
                best[then] = cost + more
                heapq.heappush(queue, (cost + more, next(count), then))
    raise AssertionError


@pytest.mark.parametrize("slots", [0, 1, 2, 3])
def test_no_schedule_needs_fewer_calls(slots):
    for n in range(1, 10):
        assert calls(n, slots) == fewest_calls(n, slots)


def test_so_many_layers_need_no_more_calls_each():
    """The page's binomial: one layer more, and some layer is called again."""
    for c, r in [(1, 3), (2, 2), (3, 3), (4, 4), (6, 2)]:
        n = math.comb(c + r, c)
        for layers, most in [(n, r + 1), (n + 1, r + 2)]:
            steps = [i for w, i in schedule(layers, c - 1) if w in CALLS]
            assert max(map(steps.count, range(layers))) == most
    assert math.comb(8, 4) == 70  # as the page says


def test_page_says_what_the_planner_says():
    page = PAGE.read_text(encoding="utf-8")
    plan = recompute_plan(**PRESETS["Llama 3 8B, 8192 tokens"])
    assert f"hold {plan.plain_gib:.0f} GiB" in page
    assert f"{plan.each_layer_gib:.1f} GiB are enough" in page
    assert "eight segments of 8 hold 15 inputs" in page
    assert "segments of 11, 10, 9, … hold 11" in page


@cache
def recurrence(n, slots):
    if n == 1:
        return 1
    if slots == 0:
        return n * (n + 1) // 2
    return min(
        k + recurrence(n - k, slots - 1) + recurrence(k, slots)
        for k in range(1, n)
    )


def halves(n, slots):
    """Wrong, and tempting: always split in the middle."""
    if n == 1 or slots == 0:
        return n * (n + 1) // 2
    k = n // 2
    return k + halves(n - k, slots - 1) + halves(k, slots)


def test_calls_agree_with_the_recurrence():
    for n, slots in itertools.product(range(1, 60), range(8)):
        assert calls(n, slots) == recurrence(n, slots)
    assert halves(40, 3) > recurrence(40, 3)


def all_sizes(n):
    for cuts in itertools.product([False, True], repeat=n - 1):
        places = [i + 1 for i, is_cut in enumerate(cuts) if is_cut]
        yield [b - a for a, b in itertools.pairwise([0, *places, n])]


@pytest.mark.parametrize("seed", range(25))
def test_no_segments_take_less(seed):
    draw = random.Random(seed)
    n = draw.randint(1, 9)
    inputs = [draw.randint(1, 20) for _ in range(n)]
    insides = [size + draw.randint(0, 50) for size in inputs]
    best = min(segments_peak(inputs, insides, s) for s in all_sizes(n))
    assert (
        segments_peak(inputs, insides, best_segments(inputs, insides)) == best
    )


def test_segments_that_shrink_beat_equal_ones():
    """Chen's square root, 2 sqrt(n) - 1, against sqrt(2 n)."""
    ones = [1] * 64
    assert segments_peak(ones, ones, [8] * 8) == 15
    best = best_segments(ones, ones)
    assert best == sorted(best, reverse=True)
    assert segments_peak(ones, ones, best) == 11
    assert sum(range(12)) >= 64 > sum(range(11))


def test_plan_and_chart_say_the_same():
    for given in PRESETS.values():
        plan = recompute_plan(**given)
        chart = recompute_chart(**given)
        plain, each, here = chart.points
        equal, within = (line.points for line in chart.lines)
        assert equal[0] == pytest.approx((plain.x, plain.y))
        assert equal[-1] == pytest.approx((each.x, each.y))
        assert within[0] == pytest.approx((each.x, each.y))
        assert here.y == plan.nested_gib
        assert (here.x, here.y) in within
        assert plan.segments_gib <= min(y for _, y in equal) + 1e-9


def test_trace_reverses_every_layer_within_its_slots():
    for layers, slots in [(8, 1), (1, 0), (6, 0), (12, 3)]:
        frames = recompute_trace(layers, slots)
        counts = [int(c.text) for c in frames[-1].picture.rows[2][1]]
        assert sum(counts) == calls(layers, slots)
        for frame in frames:
            row = frame.picture.rows[1][1]
            assert sum(c.text == "kept" for c in row) <= slots + 1
        ends = [f.caption for f in frames if "reversed" in f.caption]
        want = [f"Layer {i} " for i in range(layers, 0, -1)]
        assert [e[: len(w)] for e, w in zip(ends, want, strict=True)] == want
    assert 10 <= len(recompute_trace()) <= 40


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: calls(0, 1), f"layers must be 1 to {MOST}, got 0"),
        (lambda: calls(MOST + 1, 1), "layers must be 1 to"),
        (lambda: calls(4, -1), "slots must be at least 0, got -1"),
        (lambda: nested([nn.Identity()] * 3, -1), "slots must be at least 0"),
        (lambda: nested([], 1), "layers must be 1 to"),
        (lambda: recompute_plan(slots=-1), "slots must be at least 0"),
        (lambda: recompute_plan(inside_mib=0), "inside_mib must be above 0"),
        (lambda: recompute_plan(input_mib=1e9), "input_mib must be above 0 an"),
        (lambda: recompute_trace(13), "layers must be 1 to 12, got 13"),
        (lambda: best_segments([1], []), "got 1 and 0"),
        (lambda: in_segments([nn.Identity()], [2]), "add up to 1 layers, got"),
        (lambda: in_segments([nn.Identity()], [0, 1]), "1 or more"),
        (lambda: checkpoint(torch.sin, torch.ones(1)), "segment must be a mod"),
        (lambda: checkpoint(nn.Identity()), "inputs must be one or more"),
        (lambda: checkpoint(nn.Identity(), 3), "tensors, got .'int'"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_planner_runs_without_torch_and_numpy():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from warpmap.training.cost._recompute_calculator import *\n"
        "print(recompute_plan().plain_gib)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "src",
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "41.0\n"
