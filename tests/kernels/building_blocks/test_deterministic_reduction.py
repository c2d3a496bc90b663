"""Orders decide bits; errors keep their bounds; fixed splits keep a row's."""

import math
import random

import pytest
import torch

from warpmap import DEVICE
from warpmap.kernels.building_blocks.deterministic_reduction import (
    UNIT,
    atomic_total,
    float32,
    kahan_sum,
    row_sums,
    sequential_sum,
    split_sum,
    splits_for,
    tree_sum,
)
from warpmap.kernels.data_movement.reduce import total


def numbers(n, seed=0):
    rng = random.Random(seed)
    return [
        float32(rng.gauss(0, 1) * 10 ** rng.uniform(-3, 3)) for _ in range(n)
    ]


def bound(name, n):
    return {
        "sequential": n - 1,
        "tree": math.ceil(math.log2(n)),
        "kahan": 2,
    }[name] * UNIT


SUMS = {"sequential": sequential_sum, "tree": tree_sum, "kahan": kahan_sum}


def check_bound(name, op):
    for n in (2, 3, 17, 256, 1000):
        for xs in (numbers(n), [float32(0.1)] * n):
            error = abs(op(xs) - math.fsum(xs))
            slack = 1 + 4 * n * UNIT  # the bounds are of first order
            assert error <= bound(name, n) * slack * math.fsum(map(abs, xs))


@pytest.mark.parametrize("name", SUMS)
def test_errors_keep_their_bounds(name):
    check_bound(name, SUMS[name])


def test_the_bounds_are_narrow_enough_to_tell_sums_apart():
    for name in ("tree", "kahan"):
        with pytest.raises(AssertionError):
            check_bound(name, sequential_sum)
    with pytest.raises(AssertionError):
        check_bound("sequential", lambda xs: sequential_sum(xs[:-1]))


def test_sequential_sums_are_those_of_torch_in_float32():
    xs = numbers(300)
    acc = torch.zeros(())
    for x in xs:
        acc = acc + torch.tensor(x)
    assert sequential_sum(xs) == acc.item()


def test_orders_give_other_bits_and_a_fixed_tree_does_not():
    xs = numbers(500)
    rng = random.Random(1)
    orders = [rng.sample(range(500), 500) for _ in range(50)]
    assert len({sequential_sum([xs[i] for i in o]) for o in orders}) > 10
    # work done in any order, but stored in its place, then added as a tree
    results = set()
    for order in orders:
        places = [0.0] * 500
        for i in order:
            places[i] = xs[i]
        results.add(tree_sum(places))
    assert len(results) == 1


def test_of_nothing_and_of_one():
    for op in SUMS.values():
        assert op([]) == 0
        assert op([1.5]) == 1.5


@pytest.mark.sanitize
def test_a_rows_bits_depend_on_the_split_and_not_on_its_neighbours():
    row = torch.randn(1, 20000, device=DEVICE)
    others = torch.randn(4, 20000, device=DEVICE)
    batches = [torch.cat([others[:n], row]) for n in (0, 1, 4)]
    dealt = {row_sums(x, splits_for(len(x), 8))[-1].item() for x in batches}
    fixed = {row_sums(x, 4)[-1].item() for x in batches}
    assert len(dealt) > 1
    assert len(fixed) == 1
    for x in batches:
        error = (row_sums(x, 4).double() - x.double().sum(dim=1)).abs()
        assert (error <= 40 * UNIT * x.double().abs().sum(dim=1)).all()
    assert abs(atomic_total(row) - total(row)) <= 40 * UNIT * row.abs().sum()


def test_empty_and_ragged():
    assert row_sums(torch.zeros(2, 0, device=DEVICE), 3).tolist() == [0, 0]
    assert row_sums(torch.ones(1, 3, device=DEVICE), 7).tolist() == [3]
    assert atomic_total(torch.ones(0, device=DEVICE)).item() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_sum([1.0], 0), "splits must be at least 1, got 0"),
        (lambda: splits_for(0), "rows must be at least 1, got 0"),
        (lambda: row_sums(torch.ones(3), 1), r"\(M, N\), got \(3,\)"),
        (lambda: row_sums(torch.ones(1, 1, device=DEVICE), 0), "got 0"),
        (lambda: atomic_total(torch.ones(3).half()), "got torch.float16"),
        (lambda: atomic_total(torch.ones(3, 2).T), "strides"),
        (lambda: atomic_total(torch.ones(3, device="meta")), "got meta"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
def test_on_a_gpu_atomics_give_several_results_and_the_tree_one():
    x = torch.randn(2**26, device="cuda")
    assert len({atomic_total(x).item() for _ in range(100)}) > 1
    assert len({total(x).item() for _ in range(100)}) == 1
    assert len({row_sums(x[None], 1024).item() for _ in range(100)}) == 1


@pytest.mark.gpu
def test_a_row_may_have_more_than_2_to_the_31_elements():
    x = torch.ones(1, 2**31 + 2**20, device="cuda")
    assert row_sums(x, 1024).item() == x.numel()  # as are all partial sums
