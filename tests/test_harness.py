"""The harness sees wrong results, and judges by the strongest peer."""

import statistics

import pytest
import torch

from warpmap_site import harness
from warpmap_site.harness import (
    Case,
    Missing,
    Prepared,
    compare,
    gradient,
    optional,
    summary,
)


def case(ours=torch.neg, peers=None, device="cpu", **options):
    given = {
        "labels": {"dtype": "fp32", "N": 4096},
        "inputs": lambda: (torch.randn(64, 64, device=device),),
        "ours": ours,
        "peers": {"torch": torch.neg} if peers is None else peers,
        "exact": lambda x: -x.double(),
        "moved": 2 * 64 * 64 * 4,
    }
    return Case(**{**given, **options})


def check(case):
    known = {"warpmap": case.ours, **case.peers}
    return harness._check(
        case, {name: harness._split(f) for name, f in known.items()}
    )


def unwritten(x):
    y = torch.empty_like(x)
    y[1:] = -x[1:]
    return y


WRONG = {
    "zeros": torch.zeros_like,
    "one off": lambda x: (-x).index_fill(0, torch.tensor([3]), 1.0),
    "not a number": lambda x: -x / (x != x[0, 0]),
    "a row unwritten": unwritten,
    "another shape": lambda x: -x[1:],
    "half precision": lambda x: (-x).half().float(),
    "no result": lambda x: (),
}


def test_right_results_pass_with_their_errors():
    errors, failed = check(case())
    assert errors == {"warpmap": 0.0, "torch": 0.0}
    assert failed == {}


@pytest.mark.parametrize("fault", WRONG)
def test_nothing_is_measured_when_ours_is_wrong(fault):
    with pytest.raises(RuntimeError, match="ours is wrong"):
        check(case(WRONG[fault]))


@pytest.mark.parametrize("fault", sorted(set(WRONG) - {"a row unwritten"}))
def test_a_peer_that_is_wrong_is_told_apart(fault):
    peers = {"torch": torch.neg, "other": WRONG[fault]}
    _, failed = check(case(peers=peers))
    assert list(failed) == ["other"]
    assert failed["other"].startswith("wrong: error")


def test_a_pytorch_that_is_wrong_excuses_nobody():
    peers = {"torch": lambda x: -1.4 * x}
    _, failed = check(case(peers=peers))
    assert list(failed) == ["torch"]
    with pytest.raises(RuntimeError, match="ours is wrong"):
        check(case(lambda x: -1.5 * x, peers))


def test_whole_numbers_must_be_equal():
    right = {
        "exact": lambda x: (x.double().max(), x.argmax()),
        "ours": lambda x: (x.max(), x.argmax()),
        "peers": {},
    }
    assert check(case(**right)) == ({"warpmap": 0.0}, {})
    with pytest.raises(RuntimeError, match="ours is wrong"):
        check(case(**{**right, "ours": lambda x: (x.max(), x.argmax() + 1)}))


def test_a_peer_that_raises_says_so_and_ours_may_not():
    def broken(x):
        raise TypeError("no such shape")

    _, failed = check(case(peers={"torch": torch.neg, "other": broken}))
    assert failed == {"other": "TypeError: no such shape"}
    with pytest.raises(TypeError, match="no such shape"):
        check(case(broken))


def test_inputs_changed_in_place_are_copies():
    kept = torch.randn(64, 64)
    found = check(case(torch.neg_, inputs=lambda: (kept,)))
    assert found == ({"warpmap": 0.0, "torch": 0.0}, {})


def test_gradient_times_the_backward_pass_of_the_chosen_inputs():
    x, w, dy = torch.randn(3, 4), torch.randn(4), torch.randn(3, 4)
    both = gradient(torch.mul)
    dx, dw = both.run(*both.prepare(x, w, dy))
    torch.testing.assert_close(dx, dy * w)
    torch.testing.assert_close(dw, (dy * x).sum(0))
    one = gradient(torch.mul, wrt=[1])
    (again,) = one.run(*one.prepare(x, w, dy))
    torch.testing.assert_close(again, dw)


def test_a_missing_package_is_a_missing_peer():
    missing = optional("quack", lambda: __import__("no_such_package").f)
    assert isinstance(missing, Missing)
    assert "no_such_package" in missing.reason
    assert optional("math", lambda: abs) is abs


def test_a_package_that_breaks_when_imported_is_a_missing_peer():
    broken = optional("quack", lambda: abs("a number"))
    assert isinstance(broken, Missing)
    assert "quack: TypeError" in broken.reason


def test_ratios_are_of_the_same_round_and_judged_by_the_strongest_peer():
    # the clock drops to half in the last two rounds: for all
    clock = [1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 2.0]
    wobble = [1.0, 1.01, 1.0, 0.99, 1.0, 1.0, 1.0]
    times = {
        name: [base * c for c in clock]
        for name, base in {
            "warpmap": 2.0,
            "torch": 6.0,
            "fast": 1.9,
            "wrong": 1.0,
            "ceiling": 1.8,
        }.items()
    }
    times[harness.CONTROL] = [
        2 * c * w for c, w in zip(clock, wobble, strict=True)
    ]
    peers = dict.fromkeys(["torch", "fast", "wrong", "gone"])
    rows = harness._rows(
        case(peers=peers, moved=10**9),
        times,
        errors={"warpmap": 1e-7, "torch": 2e-7},
        missing={"gone": "not installed"},
        failed={"wrong": "wrong: error 1"},
        peaks={},
        launch="stream",
    )
    by = {row["implementation"]: row for row in rows}
    assert list(by) == ["warpmap", "torch", "fast", "wrong", "gone", "copy"]
    ours = by["warpmap"]
    assert ours["best_peer"] == "fast"
    assert ours["ratio_to_best"] == pytest.approx(1.9 / 2)
    assert ours["share"] == pytest.approx(1.8 / 2)
    assert ours["ms"] == statistics.median(times["warpmap"])
    assert ours["gb_s"] == pytest.approx(10**9 / 2 / 1e6)
    assert 0.003 < ours["control"] <= 0.0101
    assert by["torch"]["ratio"] == pytest.approx(3)
    assert "ratio" not in by["wrong"]
    assert by["gone"]["missing"] == "not installed"
    line = summary(rows)
    assert "0.900 of copy, 0.950 x fast (control 0.004)" in line
    assert "gone missing: not installed" in line


def test_without_a_gpu_or_with_few_rounds_nothing_begins(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        compare([case()])
    with pytest.raises(ValueError, match="at least 7, got 3"):
        compare([case()], rounds=3)


# On a GPU


def slow(x):
    return (-x).clone().clone().clone().clone()


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1024, 8192], ids=["graph", "stream"])
def test_more_work_takes_longer_and_a_copy_is_the_ceiling(size):
    made = {
        "inputs": lambda: (torch.randn(size, size, device="cuda"),),
        "moved": 2 * size * size * 4,
        "peers": {"torch": torch.neg, "slow": slow},
        "memory": True,
    }
    rows = compare([case(**made)], rounds=9)
    by = {row["implementation"]: row for row in rows}
    ours = by["warpmap"]
    assert ours["launch"] == ("graph" if size == 1024 else "stream")
    assert by["slow"]["ratio"] > 2
    assert by["torch"]["ratio"] == pytest.approx(1, abs=0.1)
    assert 0.5 < ours["share"] < 1.5
    assert ours["peak_mib"] == pytest.approx(size * size * 4 / 2**20, abs=3)
    assert by["slow"]["peak_mib"] > 1.5 * ours["peak_mib"]


@pytest.mark.gpu
def test_gradients_in_place_functions_and_products_are_timed():
    def product(x):
        return x @ x

    rows = compare(
        [
            case(
                gradient(torch.sin),
                {"torch": gradient(torch.sin)},
                inputs=lambda: tuple(torch.randn(2, 512, 512, device="cuda")),
                exact=lambda x, dy: x.double().cos() * dy.double(),
            ),
            case(torch.neg_, device="cuda", peers={"torch": torch.neg_}),
            case(
                product,
                {"torch": product},
                inputs=lambda: (
                    torch.randn(4096, 4096, device="cuda").bfloat16(),
                ),
                exact=lambda x: x.double() @ x.double(),
                ceiling="matmul",
                flops=2 * 4096**3,
            ),
        ],
        rounds=7,
    )
    shares = [r["share"] for r in rows if r["implementation"] == "warpmap"]
    assert len(shares) == 3
    assert 0.6 < shares[2] < 1.3


@pytest.mark.gpu
def test_a_result_that_goes_wrong_later_is_seen():
    calls = []

    def tires(x):
        calls.append(1)
        return -x if len(calls) < 20 else x

    with pytest.raises(RuntimeError, match="ours is wrong"):
        compare([case(tires, device="cuda")], rounds=30)


def test_prepared_functions_are_called_with_what_they_prepared():
    doubled = Prepared(lambda x: (x, -1), torch.mul)
    assert check(case(doubled)) == ({"warpmap": 0.0, "torch": 0.0}, {})
