import errno
import hashlib
import io
import itertools
import math
import os
import random
import signal
import statistics
import sys
import threading
from pathlib import Path

import pytest
import torch
from ranks import RankError
from torch import nn

from warpmap import DEVICE
from warpmap.training.foundations.optimizers import AdamW
from warpmap.training.pretraining import checkpointing
from warpmap.training.pretraining._goodput import (
    PRESETS,
    background_goodput,
    saving_chart,
    saving_cost,
)
from warpmap.training.pretraining._shards import (
    Shard,
    assemble,
    load_sharded,
    rows_of,
    save_sharded,
)
from warpmap.training.pretraining.checkpointing import (
    HEADER,
    BackgroundWriter,
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from warpmap_site.traces import impure_imports

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/training/pretraining/checkpointing.md"
STEPS, EVERY = 9, 2


def train(folder, steps=STEPS, forget=()):
    """A run that draws from every generator; resumes from what is there."""
    random.seed(1)
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 1)
    ).to(DEVICE)
    # torch.optim would import torch.compile in every process
    optimizer = AdamW(model.parameters(), lr=0.05)
    data = torch.randn(32, 8, device=DEVICE)
    done, losses = 0, []
    found = latest_checkpoint(folder)
    if found:
        done, state = found
        losses = state["losses"]
        if "weights" not in forget:
            model.load_state_dict(state["weights"])
        if "optimizer" not in forget:
            optimizer.load_state_dict(state["optimizer"])
        if "generators" not in forget:
            set_random_state(state["generators"])
    for step in range(done + 1, steps + 1):
        batch = data[random.sample(range(32), 4)]
        loss = (model(batch) - batch.sum(dim=1, keepdim=True)).square().mean()
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % EVERY == 0:
            state = {
                "losses": losses,
                "weights": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generators": random_state(),
            }
            save_checkpoint(folder, step, state)
    return losses, [p.tolist() for p in model.parameters()]


def train_until_killed(folder, line):
    """Trains, and dies before that line of checkpointing.py; counts lines."""
    left = [line]

    def trace(frame, event, arg):
        code = frame.f_code
        if code.co_filename != checkpointing.__file__:
            return None
        if code.co_name == "_check":  # thousands of lines, nothing written
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                kill = getattr(signal, "SIGKILL", signal.SIGTERM)
                os.kill(os.getpid(), kill)  # nothing is cleaned up
        return trace

    sys.settrace(trace)
    try:
        return train(folder), line - left[0]
    finally:
        sys.settrace(None)


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(ranks, tmp_path):
    [(whole, lines)] = ranks(1).run(train_until_killed, tmp_path / "whole", 0)
    folder, kills = tmp_path / "killed", 0
    for line in [*random.Random(0).sample(range(lines // 2), 6), 0]:
        try:
            [(got, _)] = ranks(1).run(train_until_killed, folder, line)
        except RankError:
            kills += 1
    assert kills >= 3
    assert got == whole  # every loss and every weight, to the last bit


def test_all_of_the_state_is_needed(tmp_path):
    whole = train(tmp_path / "whole")
    for number, forget in enumerate(
        [(), ("weights",), ("optimizer",), ("generators",)]
    ):
        folder = tmp_path / str(number)
        train(folder, steps=4)
        assert (train(folder, forget=forget) == whole) is (not forget)


def packed(value):
    """A header and its payload, whatever the value is."""
    file = io.BytesIO()
    torch.save(value, file)
    payload = file.getvalue()
    digest = hashlib.sha256(payload).digest()
    return HEADER.pack(checkpointing.MAGIC, len(payload), digest), payload


def in_place(folder, step, state):
    """Wrong: the name is there before the bytes are."""
    header, payload = packed({"step": step, "state": state})
    with open(folder / f"step-{step:08d}.ckpt", "wb") as file:
        file.write(header)
        file.flush()
        file.write(payload)


def clears_first(folder, step, state):
    """Wrong: a moment without any checkpoint."""
    for old in folder.glob("*.ckpt"):
        old.unlink()
    save_checkpoint(folder, step, state)


def what_crashes_leave(save, folder):
    """Interrupt ``save`` before each of its lines; what can be loaded then?"""
    left = [0]

    def trace(frame, event, arg):
        if frame.f_code.co_name != save.__name__:
            return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return trace

    found = set()
    for line in itertools.count(1):
        own = folder / str(line)
        save_checkpoint(own, 1, {"w": 1})
        left[0] = line
        sys.settrace(trace)
        try:
            save(own, 2, {"w": 2})
            done = True
        except KeyboardInterrupt:
            done = False
        finally:
            sys.settrace(None)
        latest = latest_checkpoint(own)
        found.add(latest and latest[0])
        if done:
            return found


def test_a_crash_before_any_line_leaves_the_old_or_the_new(tmp_path):
    assert what_crashes_leave(save_checkpoint, tmp_path) == {1, 2}


@pytest.mark.filterwarnings("ignore:.*(truncated|no checkpoint)")
def test_crashes_tell_unsafe_ways_to_save(tmp_path):
    assert None in what_crashes_leave(clears_first, tmp_path / "a")
    with pytest.warns(UserWarning, match="truncated: 0 bytes of"):
        what_crashes_leave(in_place, tmp_path / "b")


def test_bytes_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    """What a power cut needs, and no kill can show."""
    events = []
    for real in (os.fsync, os.replace):

        def noted(*args, real=real):
            events.append(real.__name__)
            return real(*args)

        monkeypatch.setattr(os, real.__name__, noted)
    save_checkpoint(tmp_path, 1, {})
    folder = ["fsync"] if os.name == "posix" else []
    assert events == ["fsync", "replace", *folder]


@pytest.mark.slow
def test_every_truncated_file_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"w": torch.arange(4.0)})
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        kind = "is truncated" if size >= HEADER.size else "is no checkpoint"
        with pytest.raises(CheckpointError, match=kind):
            load_checkpoint(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match="is truncated"):
        load_checkpoint(path)


@pytest.mark.slow
def test_every_flipped_bit_is_refused_and_torch_takes_some(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"w": torch.arange(64.0)})
    data = bytearray(path.read_bytes())
    taken = 0
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            load_checkpoint(path)
        if at % 8 == 7:  # each takes a while
            payload = io.BytesIO(data[HEADER.size :])
            try:
                w = torch.load(payload, weights_only=True)["state"]["w"]
                taken += not torch.equal(w, torch.arange(64.0))
            except Exception:
                pass
        data[at] ^= 1 << at % 8
    assert taken >= 32  # of 256 bytes of numbers, an eighth was tried


def test_the_newest_whole_checkpoint_is_used(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for step in (10, 20):
        save_checkpoint(tmp_path, step, {"w": step})
    newest = tmp_path / "step-00000020.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"step-00000020.ckpt is truncated"):
        assert latest_checkpoint(tmp_path) == (10, {"w": 10})
    # the run does step 20 again, and goes on
    save_checkpoint(tmp_path, 20, {"w": 21})
    assert latest_checkpoint(tmp_path) == (20, {"w": 21})


def test_a_run_that_was_rolled_back_does_not_jump_ahead(tmp_path):
    for step in (10, 20):
        save_checkpoint(tmp_path, step, {})
    save_checkpoint(tmp_path, 15, {})
    assert latest_checkpoint(tmp_path)[0] == 15
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [
        "step-00000010.ckpt",
        "step-00000015.ckpt",
        "step-00000020.superseded",
    ]


class Trojan:
    def __reduce__(self):
        return os.mkdir, ("trojan",)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step-00000001.ckpt"
    for value in (Trojan(), {"step": 1}, [1]):
        path.write_bytes(b"".join(packed(value)))
        with pytest.raises(CheckpointError, match="holds no state"):
            load_checkpoint(path)
    assert not Path("trojan").exists()


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"a": [Path("x")]}, r"got state\['a'\]\[0\] of type \w*Path"),
        ({"a": {1, 2}}, r"got state\['a'\] of type set"),
        ({Path("x"): 1}, "a key of state of type"),
        (nn.Linear(1, 1), "got state of type Linear"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(state, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        save_checkpoint(tmp_path, 1, state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [False, True])
def test_a_step_during_the_write_is_not_in_the_file(
    wrong, tmp_path, monkeypatch
):
    if wrong:  # the planted fault: no copy
        monkeypatch.setattr(checkpointing, "snapshot", lambda state: state)
    stepped = threading.Event()

    def slow(*args):
        stepped.wait(10)
        return save_checkpoint(*args)

    w, log = torch.zeros(3, device=DEVICE), [0]
    with BackgroundWriter(tmp_path, slow) as writer:
        writer.save(1, {"nested": [{"w": w}], "log": log})
        w += 1
        log.append(1)
        stepped.set()
    _, state = latest_checkpoint(tmp_path)
    got = state["log"], state["nested"][0]["w"].tolist()
    assert got == (([0, 1], [1, 1, 1]) if wrong else ([0], [0, 0, 0]))


def test_a_write_that_fails_in_the_background_is_told(tmp_path):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with BackgroundWriter(tmp_path, full) as writer:
        writer.save(1, {})
        with pytest.raises(OSError, match="No space left"):
            writer.save(2, {})
        with pytest.raises(ValueError, match="inside"):  # ours, not hidden
            raise ValueError("inside")
    with pytest.raises(OSError, match="No space left"):  # noqa: SIM117
        with BackgroundWriter(tmp_path, full) as writer:
            writer.save(1, {})


def pieces(whole, cuts):
    """A matrix cut into boxes, in random order."""
    ends = zip(cuts, whole.shape, strict=True)
    rows, columns = ([0, *sorted(cut), n] for cut, n in ends)
    boxes = [
        Shard(offset=(a, c), tensor=whole[a:b, c:d])
        for a, b in itertools.pairwise(rows)
        for c, d in itertools.pairwise(columns)
    ]
    return random.sample(boxes, len(boxes))


@pytest.mark.parametrize("seed", range(20))
def test_any_box_comes_out_of_any_cut(seed):
    draw = random.Random(seed)
    whole = torch.arange(70).view(10, 7)
    cuts = [[draw.randrange(n + 1) for _ in range(3)] for n in whole.shape]
    row, column = draw.randrange(11), draw.randrange(8)
    rows, columns = draw.randrange(11 - row), draw.randrange(8 - column)
    got = assemble(pieces(whole, cuts), ((row, column), (rows, columns)))
    want = whole[row : row + rows, column : column + columns]
    assert torch.equal(got, want)


def test_what_nobody_saved_is_told():
    whole = torch.arange(70).view(10, 7)
    shards = pieces(whole, [[5], [3]])[1:]
    with pytest.raises(CheckpointError, match=r"of 70 elements are in no"):
        assemble(shards, ((0, 0), (10, 7)))


def save_all(folder, step, whole, ranks, only=None):
    for rank in range(ranks):
        if only is None or rank in only:
            (start, _), (count, _) = rows_of(rank, ranks, tuple(whole.shape))
            shard = Shard(
                offset=(start, 0), tensor=whole[start : start + count]
            )
            save_sharded(folder, step, rank, ranks, {"w": shard})


@pytest.mark.parametrize(("before", "after"), [(12, 5), (1, 4), (4, 16)])
def test_another_number_of_ranks_goes_on(before, after, tmp_path):
    whole = torch.randn(34, 4, device=DEVICE)
    save_all(tmp_path, 7, whole, before)
    parts = []
    for rank in range(after):
        box = rows_of(rank, after, (34, 4))
        step, state = load_sharded(tmp_path, {"w": box})
        assert step == 7
        parts.append(state["w"])
    assert torch.equal(torch.cat(parts), whole.cpu())

    # by their names, rank-10 comes before rank-2
    files = sorted(tmp_path.glob("*/*.ckpt"))
    named = [load_checkpoint(path)[1]["w"]["tensor"] for path in files]
    assert torch.equal(torch.cat(named), whole.cpu()) is (before < 11)


def test_a_step_that_some_ranks_lack_is_not_used(tmp_path):
    old, new = torch.zeros(8, 2), torch.ones(8, 2)
    box = {"w": ((0, 0), (8, 2))}
    assert load_sharded(tmp_path, box) is None
    save_all(tmp_path, 1, old, 4)
    save_all(tmp_path, 2, new, 4, only=(0, 1, 3))
    step, state = load_sharded(tmp_path, box)
    assert step == 1
    assert torch.equal(state["w"], old)
    save_all(tmp_path, 2, new, 4)
    save_all(tmp_path, 3, new, 2)  # goes on with other ranks
    assert load_sharded(tmp_path, box)[0] == 3
    broken = tmp_path / "rank-1-of-2" / "step-00000003.ckpt"
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="truncated"):
        assert load_sharded(tmp_path, box)[0] == 2


def test_a_shard_does_not_drag_the_whole_along(tmp_path):
    whole = torch.randn(64, 1000)
    save_all(tmp_path, 1, whole, 64, only=(5,))
    (path,) = tmp_path.glob("*/*.ckpt")
    assert path.stat().st_size < 4000 + 3000
    # what torch.save makes of a view
    save_checkpoint(tmp_path, 1, {"w": whole[5:6]})
    (path,) = tmp_path.glob("*.ckpt")
    assert path.stat().st_size > whole.nbytes


def save_with_torch(folder, whole):
    """On every rank: PyTorch's distributed checkpoint of a sharded matrix."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard as Rows
    from torch.distributed.tensor import distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    dcp.save(
        {"w": distribute_tensor(whole, mesh, [Rows(0)])}, checkpoint_id=folder
    )


@pytest.mark.filterwarnings("ignore")  # of deprecated names inside PyTorch
def test_agrees_with_torch_distributed_checkpoint(ranks, tmp_path):
    import torch.distributed.checkpoint as dcp

    whole = torch.arange(35.0).view(7, 5)
    ranks(2).run(save_with_torch, tmp_path / "torch", whole)
    save_all(tmp_path / "ours", 1, whole, 2)

    # the same boxes are saved
    reader = dcp.FileSystemReader(tmp_path / "torch")
    saved = reader.read_metadata().state_dict_metadata["w"]
    chunks = [(tuple(c.offsets), tuple(c.sizes)) for c in saved.chunks]
    assert chunks == [rows_of(rank, 2, (7, 5)) for rank in range(2)]

    # one process gets all of it
    state = {"w": torch.zeros(7, 5)}
    dcp.load(state, checkpoint_id=tmp_path / "torch")
    _, ours = load_sharded(tmp_path / "ours", {"w": ((0, 0), (7, 5))})
    assert torch.equal(ours["w"], state["w"])


def play(interval, stall, write, restart, mtbf, failures, draw):
    """Useful share of a run, event by event; a save is safe when written."""
    clock = safe = 0.0
    for _ in range(failures):
        fails = clock + draw.expovariate(1 / mtbf)
        work, clock, writing = safe, clock + restart, []
        while clock < fails:
            work, clock = work + interval, clock + interval + stall
            if clock < fails:
                writing.append((clock + write, work))
        done = [work for written, work in writing if written < fails]
        safe, clock = max([safe, *done]), fails
    return safe / clock


# interval, stall, write, restart, mtbf
RUNS = [
    (10.0, 1.0, 0.0, 5.0, 100.0),
    (10.0, 0.5, 10.0, 20.0, 50.0),
    (30.0, 3.0, 33.0, 0.0, 25.0),
]
GOODPUTS = {
    "ours": background_goodput,
    "a free write": lambda t, d, w, r, M: background_goodput(t, d, 0, r, M),
    "a write that stalls": lambda t, d, w, r, M: background_goodput(
        t, d + w, 0, r, M
    ),
    "restarts never fail": lambda t, d, w, r, M: (
        background_goodput(t, d, w, 0, M) / (1 + r / M)
    ),
    "first order": lambda t, d, w, r, M: 1 - d / t - (t / 2 + w + r) / M,
}


@pytest.mark.parametrize("name", GOODPUTS)
def test_goodput_agrees_with_failures_drawn_at_random(name):
    far = []
    for run in RUNS:
        draw = random.Random(0)
        shares = [play(*run, 500, draw) for _ in range(40)]
        mean = statistics.fmean(shares)
        error = statistics.stdev(shares) / math.sqrt(40)
        far.append(abs(GOODPUTS[name](*run) - mean) > 4 * error)
    assert any(far) is (name != "ours")


def test_the_best_interval_is_best():
    for preset in PRESETS.values():
        cost = saving_cost(**preset)
        M, R = 3600 * cost.hours_between_failures, 600
        write, copy = cost.write_seconds, cost.copy_seconds
        grid = [1.01**k for k in range(1400)]
        waiting = max(background_goodput(t, write, 0, R, M) for t in grid)
        background = max(
            background_goodput(t, copy, write, R, M)
            for t in grid
            if t + copy >= write
        )
        assert cost.waiting_percent == pytest.approx(100 * waiting, abs=0.02)
        assert cost.background_percent == pytest.approx(
            100 * background, abs=0.02
        )


def test_chart_says_what_the_calculator_says():
    chart, cost = saving_chart(), saving_cost()
    copy, storage = (dict(line.points) for line in chart.lines)
    assert copy[16384] == chart.points[0].y == cost.background_percent
    assert storage[16384] == cost.waiting_percent


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: save_checkpoint(ROOT, -1, {}), "step must be .* got -1"),
        (lambda: save_checkpoint(ROOT, 10**8, {}), "step must be .* got 1000"),
        (lambda: set_random_state({"cuda": [0] * 99}), "got 99"),
        (lambda: saving_cost(parameters_b=0), "parameters_b must .* got 0"),
        (lambda: saving_cost(405, -1), "bytes_per_parameter must be above"),
        (lambda: saving_cost(gpus=0), "gpus must be above 0, got 0"),
        (lambda: saving_cost(storage_gb_s=math.inf), "storage_gb_s .* got inf"),
        (lambda: saving_cost(restart_minutes=-1), "restart_minutes must be at"),
        (lambda: background_goodput(10, 1, 12, 5, 100), "be at most 11"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_page_says_what_the_calculator_says():
    page = PAGE.read_text(encoding="utf-8")
    cost, small = saving_cost(), saving_cost(**PRESETS["8B on one server"])
    for words in (
        f"{cost.checkpoint_gb:.0f}$ GB",
        f"{cost.write_seconds:.0f} seconds",
        f"every {cost.waiting_interval_minutes:.0f} minutes",
        f"{cost.waiting_percent:.1f}% to {cost.background_percent:.1f}%",
        f"{100 * math.exp(-10 / 60 / cost.hours_between_failures):.1f}% is",
        f"once in {small.hours_between_failures / 24:.0f} days",
    ):
        assert words in page


def test_calculator_runs_in_a_browser():
    assert impure_imports("warpmap.training.pretraining._goodput") == []
