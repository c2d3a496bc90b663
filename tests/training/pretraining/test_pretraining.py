import itertools
import math
import random
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from warpmap import DEVICE
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig
from warpmap.training.pretraining import pretraining
from warpmap.training.pretraining._markov import (
    MarkovSource,
    branching_source,
)
from warpmap.training.pretraining.checkpointing import (
    load_checkpoint,
    random_state,
)
from warpmap.training.pretraining.pretraining import (
    NonFiniteLoss,
    Plan,
    train,
    warmup_stable_decay,
)
from warpmap.training.pretraining.sequence_packing import Packed, pack

ROOT = Path(__file__).parents[3]
PATH = "training/pretraining/pretraining"
SOURCE = branching_source(branches=3)
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Two would mostly wait for each other, the tensors are so small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- the schedule


def late(step, steps, warmup, decay):
    """Wrong: the first step learns nothing."""
    return warmup_stable_decay(max(step - 1, 0), steps, warmup, decay) * (
        step > 0
    )


def ends_at_zero(step, steps, warmup, decay):
    """Wrong: the last step learns nothing."""
    return warmup_stable_decay(step, steps, warmup, decay) * (step < steps - 1)


@pytest.mark.parametrize("rate", [warmup_stable_decay, late, ends_at_zero])
def test_rate_rises_stays_and_falls_in_straight_lines(rate):
    right = True
    for steps, warmup, decay in [(9, 2, 4), (5, 5, 0), (5, 0, 5), (7, 3, 4)]:
        corners = [-1, warmup - 1, steps - decay, steps]
        want = np.interp(range(steps), corners, [0, 1, 1, 0])
        got = [rate(step, steps, warmup, decay) for step in range(steps)]
        right = right and np.allclose(got, want, rtol=1e-14, atol=0)
    assert right is (rate is warmup_stable_decay)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup": 8}, "warmup 8 and decay 3 must fit into 10 steps"),
        ({"decay": -1}, "warmup 0 and decay -1 must fit"),
        ({"clip": 0.0}, "clip must be above 0, got 0.0"),
        ({"clip": math.nan}, "clip must be above 0, got nan"),
        ({"dtype": torch.float16}, "float16 needs a loss scaler"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Plan(**{"steps": 10, "peak": 0.01, "decay": 3, **wrong})


def test_a_step_outside_of_the_run_is_refused():
    with pytest.raises(ValueError, match="step must be 0 to 9, got 10"):
        warmup_stable_decay(10, 10, 0, 0)


# -- one step after the other, written out


class Small(Decoder):
    """A decoder with dropout, so that a run also draws random numbers."""

    def __init__(self, dropout=0.1, width=16):
        torch.manual_seed(3)
        super().__init__(DecoderConfig(9, width, 1, 2, 1, 24))
        self.dropout = dropout
        self.to(DEVICE)

    def forward(self, *args, **kwargs):
        logits = super().forward(*args, **kwargs)
        return functional.dropout(logits, self.dropout, self.training)


def documents_of(step):
    draw = random.Random(step)
    return [SOURCE.text(draw.randint(3, 9), draw) for _ in range(6)]


def batch(step):
    """Documents 100 * step and on, several in a row, and some padding."""
    rows = pack(documents_of(step), capacity=10)
    numbers = torch.where(rows.documents < 0, -1, rows.documents + 100 * step)
    rows = Packed(rows.tokens, rows.targets, numbers)
    return Packed(*(x.to(DEVICE) for x in vars(rows).values()))


STEPS = 10


def plan_of(dtype=F32, **changes):
    wanted = {"steps": STEPS, "peak": 0.02, "warmup": 3, "decay": 4}
    return Plan(**{**wanted, "clip": 0.3, "dtype": dtype, **changes})


def by_the_formulas(fault):
    """Losses, norms and weights of the same run, one document at a time."""
    model, plan = Small(0.0).to(F64), plan_of()
    weights = list(model.parameters())
    means, squares = ([torch.zeros_like(p) for p in weights] for _ in "mv")
    beta1, beta2 = plan.betas
    losses, norms = [], []
    for step in range(STEPS):
        texts = [
            torch.tensor([x], device=DEVICE)
            for x in documents_of(step + (fault == "next batch"))
        ]
        total = sum(
            functional.cross_entropy(
                model(x[:, :-1])[0], x[0, 1:], reduction="sum"
            )
            for x in texts
        )
        loss = total / sum(x.shape[1] - 1 for x in texts)
        grads = torch.autograd.grad(loss, weights)
        norm = torch.cat([g.flatten() for g in grads]).norm().item()
        scale = (
            1 if fault == "no clipping" else min(1, plan.clip / (norm + 1e-6))
        )
        ahead = fault == "next rate"
        rate = plan.peak * np.interp(step + ahead, [-1, 2, 6, 10], [0, 1, 1, 0])
        for p, g, m, v in zip(weights, grads, means, squares, strict=True):
            decays = p.ndim > 1 or fault == "norms decay"
            m.mul_(beta1).add_((1 - beta1) * scale * g)
            v.mul_(beta2).add_((1 - beta2) * (scale * g) ** 2)
            mean = m / (1 - beta1 ** (step + 1))
            square = v / (1 - beta2 ** (step + 1))
            p.data *= 1 - rate * 0.1 * decays
            p.data -= rate * mean / (square.sqrt() + 1e-8)
        losses.append(loss.item())
        norms.append(norm)
    return losses, norms, [p.detach() for p in weights]


@pytest.fixture(scope="module")
def in_float64():
    model, reports = Small(0.0).to(F64), []
    losses = train(model, batch, plan_of(F64), report=reports.append)
    return losses, reports, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    "fault", ["", "norms decay", "no clipping", "next batch", "next rate"]
)
def test_agrees_with_the_formulas(fault, in_float64):
    losses, reports, weights = in_float64
    want_losses, want_norms, want_weights = by_the_formulas(fault)
    assert min(want_norms) > 0.3  # clipping takes effect in every step
    # Adam divides rounding errors of 1e-17 by gradients, or by eps, 1e-8
    close = {"rel": 0, "abs": 1e-9}
    right = (
        losses == pytest.approx(want_losses, **close)
        and [r.gradient_norm for r in reports]
        == pytest.approx(want_norms, **close)
        and all(
            torch.allclose(p, q, rtol=0, atol=1e-9)
            for p, q in zip(weights, want_weights, strict=True)
        )
    )
    assert right is (not fault)


def test_every_step_is_reported(in_float64):
    losses, reports, _ = in_float64
    assert [r.step for r in reports] == [*range(1, STEPS + 1)]
    assert [r.loss for r in reports] == losses
    assert [r.tokens for r in reports] == [
        batch(step).tokens.numel() for step in range(STEPS)
    ]
    assert min(r.seconds for r in reports) > 0


# -- stopping and going on


class Stopped(Exception):
    pass


def stops_after(step):
    def report(told):
        if told.step == step:
            raise Stopped

    return report


def go(folder, plan, stop=0):
    """Train on, as a new process would; stopped after a step, or its end."""
    model = Small().eval()
    # the first generators are the run's own, those after a restart any
    begun = folder is not None and any(folder.glob("*.ckpt"))
    torch.manual_seed(99 if begun else 0)
    if stop:
        with pytest.raises(Stopped):
            train(model, batch, plan, folder, 2, stops_after(stop))
    losses = [] if stop else train(model, batch, plan, folder, 2)
    assert model.training
    return losses, [p.tolist() for p in model.parameters()]


@pytest.fixture(scope="module")
def whole():
    """What runs end with that nothing stopped."""
    return {dtype: go(None, plan_of(dtype)) for dtype in (BF16, F32)}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_a_stopped_run_ends_with_the_same_bits(dtype, tmp_path, whole):
    stops = sorted(random.Random().sample(range(1, STEPS), 3))
    for stop in stops:
        go(tmp_path, plan_of(dtype), stop)
    assert go(tmp_path, plan_of(dtype)) == whole[dtype], stops
    assert len(whole[dtype][0]) == STEPS
    # a run that is done has nothing left to do
    assert go(tmp_path, plan_of(dtype)) == whole[dtype]


def forgets_moments(step, state):
    for saved in state["optimizers"]:
        saved["steps"] = [0] * len(saved["steps"])
        for moments in saved["state"]:
            for x in moments.values():
                x.zero_()
    return step, state


def rounds_masters(step, state):
    for master in state["masters"].values():
        master.copy_(master.to(BF16))
    return step, state


def forgets_generators(step, state):
    return step, {**state, "generators": random_state()}


FAULTS = {
    "none": lambda step, state: (step, state),
    "moments": forgets_moments,
    "masters": rounds_masters,
    "generators": forgets_generators,
    "a batch left out": lambda step, state: (step + 1, state),
    "a batch twice": lambda step, state: (step - 1, state),
    "losses": lambda step, state: (step, {**state, "losses": []}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_nothing_of_the_state_may_be_lost(name, tmp_path, monkeypatch, whole):
    go(tmp_path, plan_of(BF16), stop=5)
    found = pretraining.latest_checkpoint(tmp_path)
    monkeypatch.setattr(
        pretraining, "latest_checkpoint", lambda folder: FAULTS[name](*found)
    )
    same = go(tmp_path, plan_of(BF16)) == whole[BF16]
    assert same is (name == "none")


def test_a_truncated_checkpoint_costs_its_steps_alone(tmp_path, whole):
    go(tmp_path, plan_of(), stop=7)
    newest = tmp_path / "step-00000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-00000006.ckpt is truncated"):
        assert go(tmp_path, plan_of()) == whole[F32]


def cosine(step, steps, warmup, decay):
    return (1 + math.cos(math.pi * step / steps)) / 2


@pytest.mark.parametrize(
    ("rate", "stop"),
    [(warmup_stable_decay, 6), (warmup_stable_decay, 9), (cosine, 6)],
    ids=["stable", "falling", "cosine"],
)
def test_a_run_may_be_prolonged_before_its_rate_falls(
    rate, stop, tmp_path, monkeypatch
):
    monkeypatch.setattr(pretraining, "warmup_stable_decay", rate)
    longer = plan_of(steps=STEPS + 3)
    want = go(None, longer)
    go(tmp_path, plan_of(), stop)
    same = go(tmp_path, longer) == want
    assert same is (rate is warmup_stable_decay and stop == 6)


class Swapped(Small):
    """As many weights of the same shapes, by other names."""

    def __init__(self):
        super().__init__()
        block = self.blocks[0].attention
        block.query, block.q = block.q, None


@pytest.mark.parametrize(
    ("other", "plan", "says"),
    [
        (lambda: Small(width=20), plan_of(BF16), "a run of another model"),
        (Swapped, plan_of(BF16), "a run of another model"),
        (Small, plan_of(BF16, steps=7), "holds 10 steps, the plan has 7"),
    ],
    ids=["wider", "renamed", "shorter"],
)
def test_what_does_not_belong_is_refused(other, plan, says, tmp_path):
    go(tmp_path, plan_of())
    model, before = other(), other().state_dict()
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}.*{says}"):
        train(model, batch, plan, tmp_path)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {p.dtype for p in model.parameters()} == {F32}


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
def test_weights_end_in_the_dtype_of_the_plan(dtype, tmp_path):
    model = Small()
    train(model, batch, plan_of(dtype, steps=8), tmp_path)
    [file] = tmp_path.glob("*.ckpt")  # without save_every the end alone
    masters = load_checkpoint(file)[1]["masters"]
    for name, weight in model.named_parameters():
        assert weight.dtype == dtype
        assert masters[name].dtype == torch.promote_types(dtype, F32)
        assert torch.equal(weight.cpu(), masters[name].to(dtype))


# -- losses that are no number


def nan(logits):
    return logits * math.nan


def infinite(logits):
    return logits - torch.tensor([math.inf] + [0.0] * 8, device=logits.device)


def gradient(logits):
    """The same numbers, but the slope of a root at 0 is infinite."""
    return logits + (logits - logits.detach()).abs().sqrt()


@pytest.mark.parametrize(
    ("poison", "says", "checked"),
    [
        (nan, "loss is nan", True),
        (infinite, "loss is inf", True),
        (gradient, "gradient is nan", True),
        (gradient, "", False),
    ],
)
def test_no_update_with_what_is_no_number(
    poison, says, checked, tmp_path, monkeypatch
):
    if not checked:  # wrong: updates with anything
        monkeypatch.setattr(pretraining.math, "isfinite", lambda x: True)
    model, before = Small(), []

    def poisoned(step):
        if step == 5:
            before.extend(p.tolist() for p in model.parameters())
            model.register_forward_hook(lambda *args: poison(args[-1]))
        return batch(step)

    names = ", ".join(map(str, range(500, 506)))
    message = f"{says} at step 5; its batch holds the documents {names}$"
    if checked:
        with pytest.raises(NonFiniteLoss, match=message) as told:
            train(model, poisoned, plan_of(), tmp_path, 2)
        assert told.value.step == 5
        assert told.value.documents == [*range(500, 506)]
    else:
        train(model, poisoned, plan_of(), tmp_path, 2)
    assert ([p.tolist() for p in model.parameters()] == before) is checked
    newest = max(tmp_path.glob("*.ckpt"))
    assert (newest.name == "step-00000004.ckpt") is checked


def test_many_documents_are_cut_short():
    error = NonFiniteLoss(math.inf, 7, [*range(10)])
    assert str(error).endswith("documents 0, 1, 2, 3, 4, 5, 6, 7, ...")


# -- a source that is known


def random_source(seed, tokens=3):
    draw = random.Random(seed)
    table = {}
    for pair in itertools.product(range(tokens), repeat=2):
        row = [draw.random() ** 3 for _ in range(tokens)]
        table[pair] = [p / sum(row) for p in row]
    return MarkovSource(table)


def joint(source, length):
    """Probability of every text, from a linear system solved by numpy."""
    V = max(b for _, b in source.table) + 1
    step = np.zeros((V, V, V))
    for (a, b), row in source.table.items():
        step[a, b] = row
    moves = np.zeros((V * V, V * V))  # from (a, b) to (b, c)
    for a, b, c in itertools.product(range(V), repeat=3):
        moves[a * V + b, b * V + c] = step[a, b, c]
    system = np.vstack([moves.T - np.eye(V * V), np.ones(V * V)])
    right = np.append(np.zeros(V * V), 1)
    pairs = np.linalg.lstsq(system, right, rcond=None)[0].clip(0)
    texts = pairs.reshape(V, V)
    while texts.ndim < length:
        texts = texts[..., None] * step
    return texts if length > 1 else texts.sum(1)


def entropy(p):
    p = p[p > 0]
    return -(p * np.log(p)).sum()


@pytest.mark.parametrize("fault", ["", "all pairs alike"])
def test_best_losses_agree_with_the_entropies_of_all_texts(fault):
    right = True
    for source in [random_source(1), random_source(2), branching_source(3)]:
        if fault:
            source.pairs = dict.fromkeys(source.pairs, 1 / len(source.pairs))
        first, *more = [entropy(joint(source, n)) for n in range(1, 6)]
        # what one more token adds to the entropy of a text
        best = np.diff([0, first, *more])
        got = [source.best_loss(context=n) for n in range(5)]
        floor = (more[-1] - first) / 4
        right = right and np.allclose(got, best, rtol=1e-10)
        right = right and math.isclose(source.floor(5), floor, rel_tol=1e-10)
    assert right is (not fault)


@pytest.mark.parametrize("branches", [2, 3, 5])
def test_branching_source_has_round_entropies(branches):
    source = branching_source(branches, likely=0.7)
    rest = 0.3 / (branches - 1)
    rate = -0.7 * math.log(0.7) - 0.3 * math.log(rest)
    best = [2 * math.log(branches), math.log(branches), rate, rate]
    got = [source.best_loss(context=n) for n in range(4)]
    assert got == pytest.approx(best, rel=1e-12)


def test_text_has_the_frequencies_of_the_source():
    source, length = random_source(1), 20_000
    text = source.text(length, random.Random(0))
    surprise = [
        -math.log(source.table[a, b][c])
        for a, b, c in zip(text, text[1:], text[2:], strict=False)
    ]
    error = np.std(surprise) / math.sqrt(length)
    assert np.mean(surprise) == pytest.approx(
        source.best_loss(context=2), abs=5 * error
    )


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: MarkovSource({(0, 0): [0.5]}), r"row \(0, 0\) must sum to 1"),
        (lambda: MarkovSource({(0, 0): [0, 1]}), r"no row for \(0, 1\)"),
        (lambda: SOURCE.best_loss(-1), "context must be at least 0, got -1"),
        (lambda: SOURCE.floor(1), "length must be at least 2, got 1"),
    ],
)
def test_bad_sources_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# -- the experiment of the page: the snippet's own run


@pytest.fixture(scope="module")
def found():
    return runpy.run_path(str(ROOT / "snippets" / f"{PATH}.py"))


def mean(numbers):
    return sum(numbers) / len(numbers)


def surprise(rows):
    """What the source itself loses on a batch."""
    tokens, total, count = rows.tokens.tolist(), 0.0, 0
    for row in tokens:
        total += math.log(3)  # one token known: three successors, all alike
        for a, b, c in zip(row, row[1:], row[2:], strict=False):
            total -= math.log(SOURCE.table[a, b][c])
        count += len(row) - 1
    return total / count


def test_loss_starts_at_ln_v_and_passes_order_1(found):
    losses = found["learned"]
    assert losses[0] == pytest.approx(math.log(9), abs=0.1)
    tens = [mean(losses[i : i + 10]) for i in range(0, 120, 10)]
    assert min(abs(x - math.log(3)) for x in tens) < 0.05
    assert tens[-1] < math.log(3) - 0.3
    assert tens == sorted(tens, reverse=True)


def excess(found, losses, batch):
    """What the model loses above the source on the same last 20 batches."""
    steps = range(len(losses) - 20, len(losses))
    return mean([losses[i] - surprise(batch(i)) for i in steps])


def test_fresh_text_approaches_the_bound_and_stays_above(found):
    fresh = found["fresh"]
    assert 0 < excess(found, found["learned"], fresh) < 0.1
    by_heart = excess(found, found["by_heart"], lambda step: fresh(0))
    assert by_heart < -0.02


def test_targets_that_are_not_shifted_fall_through_the_bound(found):
    def unshifted(step):
        rows = found["fresh"](step)
        return Packed(rows.tokens, rows.tokens, rows.documents)

    losses = found["losses"](unshifted, 40)
    assert excess(found, losses, found["fresh"]) < -0.3


def test_who_sees_one_token_stops_at_order_1(found):
    def pairs(step):
        rows = found["fresh"](step)
        documents = torch.arange(rows.tokens.numel(), device=DEVICE) // 2
        targets = rows.targets.clone()
        targets[:, 1::2] = -100
        return Packed(rows.tokens, targets, documents.view_as(rows.tokens))

    losses = found["losses"](pairs, 40)
    assert mean(losses[-10:]) == pytest.approx(math.log(3), abs=0.03)


def test_figure_shows_the_run_of_the_snippet(found):
    figure = runpy.run_path(str(ROOT / f"docs/{PATH}_figure.py"))
    every = figure["EVERY"]
    for drawn, losses in [
        (figure["LEARNED"], found["learned"]),
        (figure["BY_HEART"], found["by_heart"]),
    ]:
        means = [
            mean(losses[i : i + every]) for i in range(0, len(losses), every)
        ]
        # other machines round otherwise, and steps carry that on
        assert [float(x) for x in drawn.split()] == pytest.approx(
            means, abs=0.03
        )


def test_page_says_what_the_code_says():
    page = (ROOT / f"docs/{PATH}.md").read_text(encoding="utf-8")
    best = [SOURCE.best_loss(context=n) for n in range(3)]
    row = [p for p in SOURCE.table[0, 0] if p]
    spread = sum(p * math.log(p) ** 2 for p in row) - best[2] ** 2
    for words in (
        f"{math.log(4096):.2f} for 4096 tokens",
        f"\\ln 9 = {best[0]:.3f}",
        f"\\ln 3 = {best[1]:.3f}",
        f"leave {best[2]:.3f}",
        f"/ 63 = {SOURCE.floor(64):.3f}",
        f"{8 * 63} predictions",
        f"standard error of {math.sqrt(spread / (8 * 63)):.2f}",
        str(NonFiniteLoss(math.nan, 5, [*range(500, 509)])).split("3, ")[0],
    ):
        assert words in page
