"""The pool of real processes fails loudly and works again afterwards."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, device


def who_and_where(tag):
    return tag, dist.get_rank(), dist.get_world_size(), os.getpid()


def total_of_ranks():
    x = torch.full((3,), float(dist.get_rank()), device=device())
    dist.all_reduce(x)
    return x.tolist()


def raise_on(bad_rank):
    if dist.get_rank() == bad_rank:
        raise KeyError("planted")
    dist.barrier()  # the others wait for the one that failed


def die_on(bad_rank):
    if dist.get_rank() == bad_rank:
        os._exit(7)
    time.sleep(30)


def hang_on(bad_rank):
    if dist.get_rank() == bad_rank:
        time.sleep(30)


def random_and_unwritten():
    return torch.rand(()).item(), torch.empty(1000).isnan().all().item()


def return_a_lock():
    import threading

    return threading.Lock()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_rank_runs_the_function_once(ranks, size):
    answers = ranks(size).run(who_and_where, "x")
    assert [answer[:3] for answer in answers] == [
        ("x", rank, size) for rank in range(size)
    ]
    pids = {answer[3] for answer in answers}
    assert len(pids) == size
    assert os.getpid() not in pids


def test_processes_are_kept(ranks):
    assert ranks(2).run(who_and_where, 0) == ranks(2).run(who_and_where, 0)


def test_ranks_talk_to_each_other(ranks):
    assert ranks(3).run(total_of_ranks) == [[3.0, 3.0, 3.0]] * 3


@pytest.mark.multi_gpu
def test_each_rank_has_its_gpu(ranks):
    assert ranks(2).run(total_of_ranks) == [[1.0, 1.0, 1.0]] * 2


def test_a_job_is_seeded_by_rank_and_poisoned(ranks):
    first, again = (ranks(2).run(random_and_unwritten) for _ in range(2))
    assert first == again
    assert first[0][0] != first[1][0]
    assert all(unwritten for _, unwritten in first)


def test_a_rank_that_raises_is_named_with_its_traceback(ranks):
    before = ranks(3).run(who_and_where, 0)
    with pytest.raises(RankError, match="rank 1 of 3") as error:
        ranks(3).run(raise_on, 1)
    assert "in raise_on" in str(error.value)
    assert "KeyError: 'planted'" in str(error.value)

    after = ranks(3).run(who_and_where, 0)
    assert not {a[3] for a in before} & {a[3] for a in after}, "old processes"


def test_a_rank_that_dies_is_named(ranks):
    with pytest.raises(RankError, match=r"rank 1 of 2: died, exit code 7"):
        ranks(2).run(die_on, 1)
    assert ranks(2).run(total_of_ranks) == [[1.0, 1.0, 1.0]] * 2


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_line(ranks):
    ranks(3).run(hang_on, None)  # all have loaded this file
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 2 of 3 hangs") as error:
        ranks(3).run(hang_on, 2, timeout=2)
    assert time.monotonic() - start < 15
    assert "in hang_on" in str(error.value)
    assert "rank 0" not in str(error.value)
    assert ranks(3).run(total_of_ranks) == [[3.0, 3.0, 3.0]] * 3


def test_an_answer_that_cannot_travel_is_an_error(ranks):
    with pytest.raises(RankError, match="cannot pickle"):
        ranks(2).run(return_a_lock)


def test_a_local_function_is_refused(ranks):
    with pytest.raises(ValueError, match="expected a function of a module"):
        ranks(2).run(lambda: None)
