import random
import time
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from warpmap import DEVICE
from warpmap.training.pretraining import sequence_packing
from warpmap.training.pretraining._bins import packing_trace
from warpmap.training.pretraining._waste import document_lengths, packing_waste
from warpmap.training.pretraining.sequence_packing import (
    IGNORED,
    Packed,
    best_fit_decreasing,
    cut_when_full,
    document_mask,
    document_starts,
    pack,
    packed_loss,
    pieces,
    positions_of,
)

V, C, T = 11, 8, 10  # tokens, width, capacity


class Tiny(nn.Module):
    """Two layers of attention with learned positions, in float64."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, C), nn.Embedding(T, C)
        self.layers = nn.ModuleList(nn.Linear(C, 3 * C) for _ in range(2))
        self.head = nn.Linear(C, V)
        self.double().to(DEVICE)

    def forward(self, tokens, positions, mask):
        x = self.tokens(tokens) + self.places(positions)
        for layer in self.layers:
            q, k, v = layer(x)[:, None].chunk(3, dim=-1)  # (B, 1, T, C)
            y = scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + torch.tanh(y[:, 0])
        return self.head(x)


def documents(count=9):
    sizes = [random.randint(1, T) for _ in range(count)]
    return [random.choices(range(V), k=size) for size in sizes]


def alone(model, sequences, by_document):
    """The loss with every document in a batch of its own, unpadded."""
    losses = []
    for sequence in sequences:
        x = torch.tensor([sequence], device=DEVICE)
        here = torch.arange(x.shape[1], device=DEVICE)
        logits = model(x, here, here[:, None] >= here)
        losses.append(cross_entropy(logits[0, :-1], x[0, 1:], reduction="none"))
    if by_document:
        losses = [each.mean()[None] for each in losses if len(each)]
    return torch.cat(losses).mean()


def packed_up(model, sequences, by_document):
    rows = sequence_packing.pack(sequences, T)
    documents = rows.documents.to(DEVICE)
    logits = model(
        rows.tokens.to(DEVICE),
        sequence_packing.positions_of(documents),
        sequence_packing.document_mask(documents),
    )
    return sequence_packing.packed_loss(logits, rows, by_document)


def check_equal(by_document=False):
    model, sequences = Tiny(), documents()
    values = []
    for loss in (alone, packed_up):
        value = loss(model, sequences, by_document)
        values.append([value, *torch.autograd.grad(value, model.parameters())])
    # sums of some hundred terms, in another order: far below 1e-12
    torch.testing.assert_close(*values, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("by_document", [False, True])
def test_loss_and_gradients_are_those_of_each_document_alone(by_document):
    check_equal(by_document)


def causal_only(documents):
    B, T = documents.shape
    seen = torch.ones(T, T, dtype=torch.bool, device=documents.device)
    return seen.tril().expand(B, 1, T, T)


def sees_its_future(documents):
    return documents[:, None, :, None] == documents[:, None, None]


def counts_through(documents):
    B, T = documents.shape
    return torch.arange(T, device=documents.device).expand(B, T)


def predicts_the_next_document(sequences, capacity):
    rows = pack(sequences, capacity)
    targets = rows.tokens.roll(-1, dims=1)
    targets[:, -1] = IGNORED
    targets[rows.documents < 0] = IGNORED
    return Packed(rows.tokens, targets, rows.documents)


def mean_of_rows(logits, packed, by_document):
    losses = cross_entropy(
        logits.mT, packed.targets.to(DEVICE), reduction="none"
    )
    return (losses.sum(1) / (losses != 0).sum(1)).mean()


def padding_counts(logits, packed, by_document):
    return packed_loss(logits, packed) * (packed.targets >= 0).double().mean()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("document_mask", causal_only),
        ("document_mask", sees_its_future),
        ("positions_of", counts_through),
        ("pack", predicts_the_next_document),
        ("packed_loss", mean_of_rows),
        ("packed_loss", padding_counts),
    ],
)
def test_equality_catches(monkeypatch, name, wrong):
    monkeypatch.setattr(sequence_packing, name, wrong)
    with pytest.raises(AssertionError):
        check_equal()


def test_weights_of_documents_and_of_tokens_differ():
    rows = pack([[0] * 9, [1, 1]], T + 1)
    logits = torch.zeros(1, T + 1, 2, dtype=torch.float64)
    logits[..., 0] = 3.0  # right in the long document, wrong in the short
    right, wrong = (
        cross_entropy(logits[0, :1], torch.tensor([i])) for i in (0, 1)
    )
    got = packed_loss(logits, rows)
    torch.testing.assert_close(got, (8 * right + wrong) / 9)
    got = packed_loss(logits, rows, by_document=True)
    torch.testing.assert_close(got, (right + wrong) / 2)


def test_half_precision_logits_give_a_float32_loss():
    rows = pack([[0, 1] * 500], 1000)
    logits = torch.randn(1, 1000, 2)
    got = packed_loss(logits.bfloat16(), rows)
    want = packed_loss(logits.bfloat16().double(), rows)
    # each loss errs by some roundings of 6e-8, their mean by no more
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_mask_and_positions_agree_with_loops_over_tokens():
    rows = pack(documents(20), T)
    numbers = rows.documents.tolist()
    mask, positions = (
        document_mask(rows.documents),
        positions_of(rows.documents),
    )
    for b, row in enumerate(numbers):
        for t, number in enumerate(row):
            want = [s <= t and row[s] == number for s in range(T)]
            if number < 0:
                want = [s == t for s in range(T)]
            assert mask[b, 0, t].tolist() == want
            assert positions[b, t] == t - row.index(number)


def test_starts_bound_each_document():
    rows = pack(documents(20), T)
    flat = rows.documents.flatten().tolist()
    bounds = document_starts(rows.documents).tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(flat)
    for a, b in pairwise(bounds):
        assert len(set(flat[a:b])) == 1
        # a document ends where another begins, or its row ends
        assert b % T == 0 or flat[b] != flat[a]


def test_every_token_is_packed_once_and_predicts_its_next():
    sequences = documents(50)
    rows = pack(sequences, T)
    got = {i: [] for i in range(50)}
    for row in zip(rows.documents, rows.tokens, rows.targets, strict=True):
        for number, token, target in zip(
            *(x.tolist() for x in row), strict=True
        ):
            if number >= 0:
                got[number].append((token, target))
            else:
                assert (token, target) == (0, IGNORED)
    for i, sequence in enumerate(sequences):
        assert got[i] == list(
            zip(sequence, [*sequence[1:], IGNORED], strict=True)
        )


def naive_best_fit(lengths, capacity):
    """Rooms left, by looking at every bin for every item."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, room in enumerate(rooms) if room >= length]
        if fits:
            rooms[min(fits, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


def fewest_bins(lengths, capacity):
    """By trying every bin for every item."""
    best = len(lengths)

    def place(i, rooms):
        nonlocal best
        if len(rooms) >= best:
            return
        if i == len(lengths):
            best = len(rooms)
            return
        for j in range(len(rooms)):
            if rooms[j] >= lengths[i]:
                place(
                    i + 1, [*rooms[:j], rooms[j] - lengths[i], *rooms[j + 1 :]]
                )
        place(i + 1, [*rooms, capacity - lengths[i]])

    place(0, [])
    return best


def check_bins(bins_of):
    worse = 0
    for _ in range(150):
        capacity = random.randint(5, 20)
        lengths = random.choices(range(1, capacity + 1), k=random.randint(0, 8))
        bins = bins_of(lengths, capacity)
        assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
        rooms = [capacity - sum(lengths[i] for i in b) for b in bins]
        assert sorted(rooms) == naive_best_fit(lengths, capacity)
        fewest = fewest_bins(lengths, capacity)
        assert fewest <= len(bins) <= 11 / 9 * fewest + 4  # Johnson's bound
        worse += len(bins) > fewest
    assert worse < 5


def test_bins_agree_with_looking_at_all_and_are_nearly_the_fewest():
    check_bins(best_fit_decreasing)


def increasing(lengths, capacity):
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    bins, room = [], 0
    for i in order:
        if lengths[i] > room:
            bins.append([])
            room = capacity
        bins[-1].append(i)
        room -= lengths[i]
    return bins


@pytest.mark.parametrize(
    "wrong",
    [
        increasing,
        lambda lengths, capacity: [[i] for i in range(len(lengths))],
        lambda lengths, capacity: best_fit_decreasing(lengths, capacity)[1:],
        lambda lengths, capacity: best_fit_decreasing(lengths, 2 * capacity),
    ],
    ids=["shortest first", "no packing", "a bin lost", "overfull"],
)
def test_bin_checks_catch(wrong):
    with pytest.raises(AssertionError):
        check_bins(wrong)


def test_the_best_is_sometimes_missed():
    lengths = [4, 4, 3, 3, 3, 3]  # 4 3 3 twice fills two bins of 10
    assert fewest_bins(lengths, 10) == 2
    assert len(best_fit_decreasing(lengths, 10)) == 3


def test_a_hundred_thousand_lengths_take_seconds():
    lengths = document_lengths(20_000, 600, 1.2) * 5
    lengths = [min(length, 8192) for length in lengths]
    start = time.process_time()
    bins = best_fit_decreasing(lengths, 8192)
    assert time.process_time() - start < 5
    assert len(bins) <= 1.001 * sum(lengths) / 8192


def test_pieces_cut_only_what_is_too_long():
    lengths = [random.randint(0, 30) for _ in range(50)]
    cut = pieces(lengths, 8)
    for i, length in enumerate(lengths):
        mine = [(a, b) for document, a, b in cut if document == i]
        assert [t for a, b in mine for t in range(a, b)] == list(range(length))
        assert len(mine) == -(-length // 8)


def test_joined_documents_are_cut_at_every_row_end_inside_them():
    for _ in range(100):
        lengths = [random.randint(0, 9) for _ in range(12)]
        owner = [i for i, length in enumerate(lengths) for _ in range(length)]
        ends = range(6, len(owner), 6)
        cut = {owner[e] for e in ends if owner[e] == owner[e - 1]}
        assert cut_when_full(lengths, 6) == len(cut)


def test_waste_is_what_the_packed_batch_holds():
    lengths = document_lengths(40, 20, 1.0)
    parts = [range(a, b) for _, a, b in pieces(lengths, 64)]
    waste = packing_waste(40, 20, 1.0, 64)
    documents = pack(parts, 64).documents
    assert waste.packed_rows == len(documents)
    padding = (documents < 0).double().mean().item()
    assert waste.packed_percent == pytest.approx(100 * padding)
    mask = document_mask(documents) & (documents >= 0)[:, None, :, None]
    share = mask.sum().item() / (len(documents) * 64 * 65 / 2)
    assert waste.seen_percent == pytest.approx(100 * share)


def test_the_numbers_on_the_page():
    waste = packing_waste()  # its defaults are the page's example
    assert (waste.must_cut, waste.joined_cut) == (109, 501)
    assert round(waste.padded_percent) == 72
    assert round(waste.packed_percent, 1) == 0.1
    assert round(waste.seen_percent) == 58


def test_the_trace_is_of_the_same_packing():
    frames = packing_trace("3 7 2 5 4 6 1 4", capacity=8)
    bins = best_fit_decreasing([3, 7, 2, 5, 4, 6, 1, 4], 8)
    assert len(frames) == 9
    names = [
        [cell.text for cell in cells] for _, cells in frames[-1].picture.rows
    ]
    sizes = [3, 7, 2, 5, 4, 6, 1, 4]
    assert names == [
        (text := [c for i in b for c in "ABCDEFGH"[i] * sizes[i]])
        + [""] * (8 - len(text))
        for b in bins
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: best_fit_decreasing([3, 9], 8), "lengths must be 1 to 8"),
        (lambda: best_fit_decreasing([0], 8), "lengths must be 1 to 8"),
        (lambda: best_fit_decreasing([], 0), "capacity must be 1 or more"),
        (lambda: pieces([1], 0), "capacity must be 1 or more"),
        (lambda: cut_when_full([1], 0), "capacity must be 1 or more"),
        (lambda: pack([[1], [2]], 1, [[0, 1]]), "bins must hold at most 1"),
        (lambda: document_mask(torch.zeros(3)), r"\(B, T\), got \(3,\)"),
        (lambda: positions_of(torch.zeros(3)), r"\(B, T\), got \(3,\)"),
        (
            lambda: packed_loss(torch.zeros(1, 3, 2), pack([[1]], 2)),
            r"targets \(1, 2\), got \(1, 3, 2\)",
        ),
        (lambda: packing_trace("a"), "lengths must be 1 to 16 numbers"),
        (lambda: packing_trace("1", capacity=0), "capacity must be 1 to 24"),
        (lambda: packing_waste(documents=0), "documents must be"),
        (lambda: packing_waste(median=0), "median must be"),
        (lambda: packing_waste(spread=-1.0), "spread must be"),
        (lambda: packing_waste(capacity=0), "capacity must be"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
