"""Ring and tree against the backend, a float64 sum and a count of messages."""

import inspect
import re
import types
from collections import defaultdict, deque

import pytest
import torch
import torch.distributed as dist
from ranks import device

from warpmap.training.sharding import _ring, _tree
from warpmap.training.sharding import collective_operations as ours
from warpmap.training.sharding._ring import (
    all_gather_steps,
    all_reduce_lists,
    reduce_scatter_steps,
    ring_trace,
)
from warpmap.training.sharding._tree import tree_children
from warpmap.training.sharding.collective_operations import (
    DTYPES,
    Cost,
    ring_cost,
    tree_cost,
)

ALL_REDUCES = ["ring_all_reduce", "tree_all_reduce"]
# a scalar, nothing, fewer elements than ranks, no multiple of 2, 3, 4 or 5
SHAPES = [(), (0,), (3, 0), (1,), (2,), (7, 11), (60,), (1, 4099)]

# 3 and 5 are no powers of two; with GPUs, as many ranks as there are GPUs
GPUS = range(2, 1 + max(2, min(4, torch.cuda.device_count())))
WORLDS = [
    *(pytest.param(n, id=f"{n}-cpu") for n in range(1, 6)),
    *(
        pytest.param(n, id=f"{n}-gpu", marks=pytest.mark.multi_gpu)
        for n in GPUS
    ),
]


def make_input(rank, shape, dtype):
    """What a rank holds, rebuilt by the parent to know the exact sum."""
    generator = torch.Generator().manual_seed(rank)
    if dtype.is_floating_point:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
    else:  # five such numbers fit into int8
        x = torch.randint(0, 25, shape, generator=generator)
    return x.to(dtype)


def plant(fault):
    """The module with one piece of its source replaced."""
    old, new = fault
    source = inspect.getsource(ours)
    assert source.count(old) == 1, f"{old!r} is not there once"
    module = types.ModuleType("planted")
    exec(source.replace(old, new), vars(module))
    return module


# jobs: these run on every rank


def reduce_all(operation, cases, fault=None):
    module = plant(fault) if fault else ours
    answers = []
    for case in cases:
        x = make_input(dist.get_rank(), *case).to(device())
        before = x.clone()
        y = getattr(module, operation)(x)
        assert torch.equal(x, before), "the input was written to"
        dist.all_reduce(x)
        answers.append((y.cpu(), x.cpu()))
    return answers


def reduce_views(operation):
    """A transpose, every other column, one number seen many times."""
    base = make_input(dist.get_rank(), (6, 8), torch.float32).to(device())
    views = [base.t(), base[:, ::2], base[:1, :1].expand(5, 7)]
    results = [getattr(ours, operation)(view) for view in views]
    for view, result in zip(views, results, strict=True):
        theirs = view.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(theirs)
        torch.testing.assert_close(result, theirs)


def compare_halves(numel):
    """Reduce-scatter and all-gather, each against the backend's own."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x = make_input(rank, (numel,), torch.int64).to(device())
    width = -(-numel // size)
    padded = torch.cat([x, x.new_zeros(size * width - numel)])
    theirs = x.new_empty(width)
    dist.reduce_scatter_tensor(theirs, padded)
    assert torch.equal(ours.ring_reduce_scatter(x), theirs)

    rows = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(rows, x)
    assert torch.equal(ours.ring_all_gather(x), torch.stack(rows))


def reduce_in_subgroups(operation):
    groups = [dist.new_group([0, 2, 4]), dist.new_group([1, 3])]
    mine = groups[dist.get_rank() % 2]
    other = groups[1 - dist.get_rank() % 2]
    x = torch.full((4,), 10 ** dist.get_rank(), device=device())
    with pytest.raises(ValueError, match=f"{dist.get_rank()} is not in the"):
        getattr(ours, operation)(x, other)
    return getattr(ours, operation)(x, mine).tolist()


def reduce_leaf(operation):
    x = torch.ones(5, device=device(), requires_grad=True)
    return getattr(ours, operation)(x).requires_grad


def refuse(operation, shape, dtype, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(ours, operation)(torch.zeros(shape, dtype=dtype))


def log_traffic(operation, numel, dtype):
    """Batches of ("send" or "recv", peer, bytes) that this rank asked for."""
    log = []
    batch, send, recv = dist.batch_isend_irecv, dist.send, dist.recv

    def spy_batch(ops):
        names = {dist.isend: "send", dist.irecv: "recv"}
        log.append([(names[o.op], o.peer, o.tensor.nbytes) for o in ops])
        return batch(ops)

    def spy_send(tensor, group, group_dst):
        log.append([("send", group_dst, tensor.nbytes)])
        return send(tensor, group=group, group_dst=group_dst)

    def spy_recv(tensor, group, group_src):
        log.append([("recv", group_src, tensor.nbytes)])
        return recv(tensor, group=group, group_src=group_src)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "batch_isend_irecv", spy_batch)
        patch.setattr(dist, "send", spy_send)
        patch.setattr(dist, "recv", spy_recv)
        getattr(ours, operation)(torch.zeros(numel, dtype=dtype))
    return log


# checks: these run in the test's process


def assert_sum(outputs, inputs):
    """Right to rounding: p - 1 additions, each off by half an ulp at most."""
    exact = sum(x.double() for x in inputs)
    magnitude = sum(x.double().abs() for x in inputs)
    dtype, additions = inputs[0].dtype, len(inputs) - 1
    unit = 0.0
    if dtype.is_floating_point:  # the float64 sum rounds as well
        unit = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float64).eps / 2
    bound = additions * unit / (1 - additions * unit) * magnitude
    for output in outputs:
        assert output.dtype == dtype
        assert output.shape == exact.shape
        assert ((output.double() - exact).abs() <= bound).all()


def check(pool, operation, cases, fault=None):
    answers = pool.run(reduce_all, operation, cases, fault)
    for case, of_ranks in zip(cases, zip(*answers, strict=True), strict=True):
        results, theirs = zip(*of_ranks, strict=True)
        inputs = [make_input(rank, *case) for rank in range(pool.size)]
        assert_sum(results, inputs)
        assert_sum(theirs, inputs)
        assert all(torch.equal(results[0], r) for r in results), "bits differ"


def sent(log):
    sizes = [n for batch in log for kind, _, n in batch if kind == "send"]
    return len(sizes), sum(sizes)


def longest_chain(logs, weight):
    """Replay the logs: what stands in a row if a link takes one at a time."""
    clocks, position = [0] * len(logs), [0] * len(logs)
    posted, on_the_way = set(), defaultdict(deque)
    while any(at < len(log) for at, log in zip(position, logs, strict=True)):
        moved = False
        for rank, log in enumerate(logs):
            if position[rank] == len(log):
                continue
            batch, key = log[position[rank]], (rank, position[rank])
            busy = clocks[rank] + max(weight(n) for _, _, n in batch)
            for kind, peer, _ in batch:
                if kind == "send" and key not in posted:
                    on_the_way[rank, peer].append(busy)
            posted.add(key)
            sources = [peer for kind, peer, _ in batch if kind == "recv"]
            if all(on_the_way[source, rank] for source in sources):
                arrived = [on_the_way[s, rank].popleft() for s in sources]
                clocks[rank] = max(busy, *arrived, 0)
                position[rank] += 1
                moved = True
        assert moved, "deadlock"
    return max(clocks)


@pytest.mark.slow
@pytest.mark.parametrize("operation", ALL_REDUCES)
@pytest.mark.parametrize("size", WORLDS)
def test_every_shape_and_dtype_is_summed(ranks, size, operation):
    cases = [(shape, dtype) for shape in SHAPES for dtype in DTYPES]
    check(ranks(size), operation, cases)


@pytest.mark.slow
@pytest.mark.parametrize("operation", ALL_REDUCES)
@pytest.mark.parametrize("size", WORLDS)
def test_strided_views_are_summed(ranks, size, operation):
    ranks(size).run(reduce_views, operation)


@pytest.mark.parametrize("numel", [1, 12, 13])
@pytest.mark.parametrize("size", WORLDS)
def test_the_halves_of_the_ring_agree_with_the_backend(ranks, size, numel):
    ranks(size).run(compare_halves, numel)


@pytest.mark.parametrize("operation", ALL_REDUCES)
def test_a_group_sums_its_own_members(ranks, operation):
    even, odd = [10101] * 4, [1010] * 4
    answers = ranks(5).run(reduce_in_subgroups, operation)
    assert answers == [even, odd, even, odd, even]


@pytest.mark.parametrize("operation", ALL_REDUCES)
def test_the_result_claims_no_gradient(ranks, operation):
    assert ranks(2).run(reduce_leaf, operation) == [False, False]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("numel", [0, 1, 12, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_costs_are_what_is_sent(ranks, size, numel, dtype):
    ring = ring_cost(numel, dtype.itemsize, size)
    logs = ranks(size).run(log_traffic, "ring_all_reduce", numel, dtype)
    assert [sent(log) for log in logs] == [ring] * size
    assert longest_chain(logs, lambda n: 1) == ring.steps
    assert longest_chain(logs, lambda n: n) == ring.bytes

    tree = tree_cost(numel, dtype.itemsize, size)
    logs = ranks(size).run(log_traffic, "tree_all_reduce", numel, dtype)
    one_way = size - 1 if numel else 0
    assert sum(sent(log)[0] for log in logs) == 2 * one_way
    assert longest_chain(logs, lambda n: 1) == tree.steps
    assert longest_chain(logs, lambda n: n) == tree.bytes


def test_costs_in_closed_form():
    assert ring_cost(8_000, 4, 8) == Cost(2 * 7, 2 * 7 * 8_000 * 4 // 8)
    assert tree_cost(8_000, 4, 8) == Cost(2 * 3, 2 * 3 * 8_000 * 4)
    assert tree_cost(1, 4, 1000).steps == 2 * 10
    assert Cost(3, 500).seconds(latency=2.0, bandwidth=100.0) == 11.0


@pytest.mark.parametrize("size", [*range(1, 34), 100])
def test_every_rank_is_the_child_of_one_parent(size):
    reached = [0]
    for rank in reached:
        reached.extend(tree_children(rank, size))
    assert sorted(reached) == list(range(size))


@pytest.mark.parametrize(
    ("operation", "shape", "dtype", "message"),
    [
        ("ring_all_reduce", (2,), torch.bool, "cannot add torch.bool"),
        (
            "tree_all_reduce",
            (2,),
            torch.complex64,
            "cannot add torch.comp",
        ),
        ("ring_all_gather", (2,), torch.int16, "cannot add torch.int16"),
        ("ring_reduce_scatter", (0, 3), torch.float32, "got (0, 3)"),
        ("ring_all_gather", (0,), torch.float32, "got (0,)"),
    ],
)
def test_bad_tensors_are_refused(ranks, operation, shape, dtype, message):
    ranks(2).run(refuse, operation, shape, dtype, message)


def test_bad_worlds_are_refused():
    with pytest.raises(ValueError, match="expected a rank or more, got 0"):
        ring_cost(1, 1, 0)
    with pytest.raises(ValueError, match="expected a rank below 0, got 0"):
        tree_cost(1, 1, 0)
    with pytest.raises(ValueError, match="expected a rank below 4, got 4"):
        tree_children(4, 4)


ADD_CHUNK = "chunks[receive] += received"
ADD_CHILD = "        total += received"
PLACE = "shards[receive]"
STEPS = "in reduce_scatter_steps(rank, size)"
FAULTS = {
    "ring is off by one chunk": (ADD_CHUNK, "chunks[receive - 1] += received"),
    "ring forgets its own chunk": (ADD_CHUNK, ADD_CHUNK.replace("+=", "=")),
    "ring stops a step early": (STEPS, f"{STEPS}[:-1]"),
    "ring gathers into the wrong row": (PLACE, "shards[receive - 1]"),
    "tree skips a child": (
        ADD_CHILD,
        f"        if child > 1:\n    {ADD_CHILD}",
    ),
    "tree keeps the partial sum": (
        "dist.recv(total, group=group",
        "dist.recv(received, group=group",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(ranks, name):
    operation = f"{name.split()[0]}_all_reduce"
    for size in (3, 4):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            with pytest.raises(AssertionError):
                check(ranks(size), operation, [((13,), dtype)], FAULTS[name])


def test_only_an_odd_world_catches_a_tree_for_powers_of_two(ranks):
    fault = (
        ADD_CHILD,
        "        if child != size - 1 or size & (size - 1) == 0:\n"
        f"    {ADD_CHILD}",
    )
    case = [((13,), torch.float32)]
    check(ranks(4), "tree_all_reduce", case, fault)
    for size in (3, 5):
        with pytest.raises(AssertionError):
            check(ranks(size), "tree_all_reduce", case, fault)


# -- the steps, without processes ----------------------------------------------


@pytest.mark.parametrize("schedule", [reduce_scatter_steps, all_gather_steps])
@pytest.mark.parametrize("size", range(1, 9))
def test_what_one_rank_sends_the_next_receives(schedule, size):
    for rank in range(size):
        mine, theirs = schedule(rank, size), schedule((rank + 1) % size, size)
        assert len(mine) == size - 1
        assert [s.send for s in mine] == [s.receive for s in theirs]


def reduce_lists(inputs):
    """What one rank of the lists' ring holds; every rank runs all of it."""
    mine = torch.tensor(inputs[dist.get_rank()], device=device())
    return ours.ring_all_reduce(mine).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 4, 7])
def test_lists_agree_with_processes(ranks, size, length):
    inputs = [[(r + 2) ** i for i in range(length)] for r in range(size)]
    heard = []
    lists = all_reduce_lists(inputs, lambda *what: heard.append(what))
    assert lists == all_reduce_lists(inputs)
    assert lists == ranks(size).run(reduce_lists, inputs)
    assert len(heard) == 1 + 4 * (size - 1)


def check_ring(ranks, elements):
    """Every frame of the trace agrees with itself, the last is the sum."""
    trace = ring_trace(ranks, elements)
    shares = [10**rank for rank in range(ranks)]
    width = -(-elements // ranks)
    before = None
    for frame in trace:
        held = [
            [list(map(int, cell.text.split())) for cell in cells]
            for _, cells in frame.picture.nodes
        ]
        for number in (n for node in held for chunk in node for n in chunk):
            assert set(str(number)) <= {"0", "1"}, "a share came in twice"
        for arrow in frame.picture.arrows:
            assert arrow.target == (arrow.source + 1) % ranks
        if frame.picture.arrows:
            before, sent = held, frame.picture.arrows
        elif before:
            for arrow in sent:
                chunk = int(arrow.text.split()[1])
                came = before[arrow.source][chunk]
                mine = before[arrow.target][chunk]
                added = [a + b for a, b in zip(mine, came, strict=True)]
                reduces = frame.caption.startswith("Reduce")
                now = held[arrow.target][chunk]
                assert now == (added if reduces else came)
                before[arrow.target][chunk] = now
            assert held == before, "something else changed"
    total = [sum(shares)] * elements
    total += [0] * (ranks * width - elements)
    for node in held:
        assert [n for chunk in node for n in chunk] == total
    assert len(trace) == 1 + 4 * (ranks - 1)


@pytest.mark.parametrize("size", range(2, 7))
def test_trace_keeps_every_share_and_ends_in_the_sum(size):
    for elements in (1, size, 2 * size):
        check_ring(size, elements)


STEPS_FAULTS = {
    "reduce_scatter_steps": (
        lambda rank, size: reduce_scatter_steps(rank, size)[:-1],
        lambda rank, size: [
            s._replace(receive=(s.receive + 1) % size)
            for s in reduce_scatter_steps(rank, size)
        ],
        all_gather_steps,  # rank r would hold the finished chunk r + 1
    ),
    "all_gather_steps": (
        lambda rank, size: all_gather_steps(rank, size)[::-1],
        lambda rank, size: all_gather_steps(rank, size)[:-1],
        reduce_scatter_steps,
    ),
}


@pytest.mark.parametrize("name", STEPS_FAULTS)
@pytest.mark.parametrize("which", range(3))
def test_wrong_steps_are_caught(monkeypatch, name, which):
    monkeypatch.setattr(_ring, name, STEPS_FAULTS[name][which])
    inputs = [[1, 2, 3], [10, 20, 30], [100, 200, 300]]
    assert all_reduce_lists(inputs) != [[111, 222, 333]] * 3
    with pytest.raises((AssertionError, IndexError)):
        check_ring(3, 3)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ((1, 4), "ranks must be 2 to 6, got 1"),
        ((4, 9), "elements must be 1 to 8, got 9"),
    ],
)
def test_bad_input_of_the_trace_is_refused(given, says):
    with pytest.raises(ValueError, match=says):
        ring_trace(*given)


@pytest.mark.parametrize("inputs", [[], [[]], [[1], [1, 2]]])
def test_lists_of_other_lengths_are_refused(inputs):
    with pytest.raises(ValueError, match="expected lists of one length"):
        all_reduce_lists(inputs)


def check_tree(size):
    """Every frame agrees with the one before it; the last is the sum."""
    trace = _tree.tree_trace(size)
    assert len(trace) == 1 + tree_cost(1, 1, size).steps
    held = [10**rank for rank in range(size)]
    for frame in trace:
        now, mark = {}, {}
        for node in frame.picture.nodes:
            rank, number = re.fullmatch(
                r"rank (\d+): (\d+)", node.text
            ).groups()
            now[int(rank)], mark[int(rank)] = int(number), node.mark
            assert set(number) <= {"0", "1"}, "a share came in twice"
        edges = [
            (int(a), int(b))
            for a, b in re.findall(r"(\d+) to (\d+)", frame.caption)
        ]
        ends = [rank for edge in edges for rank in edge]
        assert len(ends) == len(set(ends)), "a rank does two things at once"
        for source, target in edges:
            assert abs(source - target).bit_count() == 1
            up = "up" in frame.caption
            held[target] = held[source] + (held[target] if up else 0)
            assert (mark[source], mark[target]) == ("on", "new")
        assert now == dict(enumerate(held))
    assert held == [sum(10**rank for rank in range(size))] * size


@pytest.mark.parametrize("size", range(2, 10))
def test_tree_trace_sends_along_the_edges_and_ends_in_the_sum(size):
    check_tree(size)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_tree_on_numbers_is_the_tree_on_tensors(ranks, size):
    inputs = [[3 * rank + 1] for rank in range(size)]
    heard = []
    numbers = [n for (n,) in inputs]
    sums = _tree.all_reduce_numbers(numbers, lambda *what: heard.append(what))
    assert sums == _tree.all_reduce_numbers(numbers)
    assert [[n] for n in sums] == ranks(size).run(tree_reduce_lists, inputs)
    assert len(heard) == tree_cost(1, 1, size).steps


def tree_reduce_lists(inputs):
    mine = torch.tensor(inputs[dist.get_rank()], device=device())
    return ours.tree_all_reduce(mine).tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        lambda rank, size: tree_children(rank, size)[:-1],
        lambda rank, size: tree_children(rank, size)[::-1],
        lambda rank, size: list(range(1, size)) if rank == 0 else [],
    ],
    ids=["one child is forgotten", "farthest first", "a star"],
)
def test_wrong_tree_is_caught(monkeypatch, wrong):
    monkeypatch.setattr(_tree, "tree_children", wrong)
    with pytest.raises((AssertionError, IndexError, KeyError)):
        check_tree(7)


@pytest.mark.parametrize("wrong", [1, 10])
def test_bad_size_of_the_tree_trace_is_refused(wrong):
    with pytest.raises(ValueError, match="ranks must be 2 to 9"):
        _tree.tree_trace(wrong)
