"""The house models: how they are trained and judged, and what is shipped."""

import hashlib
import math
import os
import random
import signal
import subprocess
import sys
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from warpmap import DEVICE
from warpmap.models.families._house_baselines import NGrams, gzip_bits, xz_bits
from warpmap.models.families._house_corpus import (
    corpus,
    library,
    read_sources,
)
from warpmap.models.families._house_training import (
    RECIPES,
    Batches,
    Recipe,
    held_out_nats,
    prepare,
    train_house_model,
)
from warpmap.models.foundations._llama import load_llama
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig
from warpmap.models.foundations.tokenization import BytePairTokenizer
from warpmap.training.pretraining.pretraining import NonFiniteLoss, Plan
from warpmap_site.cli import app
from warpmap_site.training import train_and_tell

RUN = """
import sys
from pathlib import Path
import torch
from warpmap.models.families._house_corpus import corpus, library
from warpmap.models.families._house_training import (
    Recipe, prepare, train_house_model
)
from warpmap.models.foundations.decoder_only import DecoderConfig
from warpmap.training.pretraining.pretraining import Plan

torch.set_num_threads(1)
recipe = Recipe(
    DecoderConfig(300, 32, 2, 4, 2, 64),
    Plan(12, 1e-2, warmup=2, decay=4, dtype=torch.bfloat16),
    context=64,
    rows=4,
)
prepared = prepare(corpus(library() / "asyncio"), 300)
train_house_model(
    recipe, prepared, Path(sys.argv[1]), sys.argv[2], save_every=2,
    report=lambda r: print(r.step, flush=True),
)
"""


def run(folder: Path, kill_at: int = 0) -> str:
    """Train in a process of its own, killed after a step; a digest."""
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), DEVICE],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) == kill_at:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == (-signal.SIGKILL if kill_at else 0)
    weights = folder / "model/model.safetensors"
    return (
        hashlib.sha256(weights.read_bytes()).hexdigest() if not kill_at else ""
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> str:
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.slow
def test_a_run_killed_at_random_steps_ends_with_the_same_bits(
    tmp_path, uninterrupted
):
    steps = sorted(random.Random().sample(range(1, 12), 2))
    for step in steps:
        run(tmp_path, kill_at=step)
    assert run(tmp_path) == uninterrupted, f"killed at {steps}"


DOCUMENTS = [
    list(range(100 * i, 100 * i + n)) for i, n in enumerate([9, 30, 4])
]


def pieces(rows):
    """The tokens of each document number in a batch, without padding."""
    numbers = rows.documents.unique().tolist()
    return [
        rows.tokens[rows.documents == i].tolist() for i in numbers if i >= 0
    ]


@pytest.mark.parametrize("epoch", range(4))
def test_an_epoch_gives_every_token_at_most_once_and_in_pieces_of_a_file(epoch):
    batches = Batches(DOCUMENTS, context=8, rows=2)
    found = []
    for step in range(epoch * batches.steps, (epoch + 1) * batches.steps):
        for piece in pieces(batches(step)):
            # side by side in one document, and no longer than a row
            assert piece == list(range(piece[0], piece[0] + len(piece)))
            assert len(piece) <= 8
            found += piece
    assert len(found) == len(set(found))
    assert set(found) <= {token for d in DOCUMENTS for token in d}


def test_a_batch_depends_on_its_number_alone_and_epochs_differ():
    one, other = (Batches(DOCUMENTS, context=8, rows=2) for _ in "ab")
    steps = list(range(3 * one.steps))
    in_order = [one(step).tokens.tolist() for step in steps]
    random.shuffle(steps)
    for step in steps:
        assert other(step).tokens.tolist() == in_order[step]
    epochs = [in_order[i :: one.steps] for i in range(one.steps)]
    assert all(len({str(batch) for batch in e}) == 3 for e in epochs)


def test_over_epochs_every_cut_is_made():
    # no two neighbours are always in different pieces
    batches, together = Batches(DOCUMENTS, context=8, rows=2), set()
    for step in range(20 * batches.steps):
        for piece in pieces(batches(step)):
            together |= set(pairwise(piece))
    assert together == {pair for d in DOCUMENTS for pair in pairwise(d)}


def test_too_few_tokens_for_a_batch_are_refused():
    with pytest.raises(ValueError, match="43 tokens do not fill a batch of 9"):
        Batches(DOCUMENTS, context=8, rows=9)


def test_held_out_loss_is_that_of_each_token_after_half_a_context_or_more():
    config = DecoderConfig(40, 16, 1, 2, 1, 24)
    model = Decoder(config).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    documents = [torch.randint(40, (n,)).tolist() for n in (3, 8, 9, 21)]
    context, nats = 8, 0.0
    for document in documents:
        for i in range(1, len(document)):
            # windows of 8 end at 8, 12, 16, ... or with the document
            end = min(max(8, 8 + -(-(i - 7) // 4) * 4), len(document))
            window = document[max(0, end - context) : i]
            logits = model(torch.tensor([window]))[0, -1]
            nats -= logits.log_softmax(-1)[document[i]].item()
    found = held_out_nats(model, documents, context, "cpu", rows=3)
    assert found == pytest.approx(nats, rel=1e-6)


def test_n_grams_give_probabilities_that_sum_to_one():
    documents = [[0, 1, 2, 0, 1, 3], [3, 3, 0]]
    model = NGrams(documents, order=3, vocab_size=5)
    for history in ([], [0], [0, 1], [4, 4], [2, 0, 1]):
        total = sum(model.probability(history, token) for token in range(5))
        assert total == pytest.approx(1, abs=1e-12)


def test_n_grams_follow_the_formula():
    documents, d = [[0, 1, 2, 0, 1, 3, 0, 1, 2]], 0.75
    model = NGrams(documents, order=3, vocab_size=4, discount=d)
    # counted by hand: 0 and 1 and three kinds; "0 1" twice before 2
    one = (2 - d) / 9 + d * 4 / 9 / 4  # of 2, among nine tokens
    two = (2 - d) / 3 + d * 2 / 3 * one  # after 1: 2, 3, 2
    three = (2 - d) / 3 + d * 2 / 3 * two  # after 0 1: 2, 3, 2
    assert model.probability([0, 1], 2) == pytest.approx(three, rel=1e-12)


def test_compressors_are_charged_for_what_they_write():
    text = {
        "a": "def f(x):\n    return x\n" * 40,
        "b": random.randbytes(500).hex(),
    }
    data = "".join(text.values()).encode()
    by_zlib = 8 * (len(zlib.compress(data, 9)) + 12) / len(data)
    assert gzip_bits(text) == pytest.approx(by_zlib, rel=0.01)
    # what is known already costs next to nothing
    assert xz_bits(text, known=text) < 0.1 * xz_bits(text)


def test_sources_leave_out_packages_and_what_is_no_python(tmp_path):
    (tmp_path / "site-packages").mkdir()
    for name, data in {
        "good.py": b"x = 1\n",
        "latin.py": b"# coding: latin-1\ny = '\xe4'\n",
        "bad.py": b"z = '\xff'\n",
        "site-packages/other.py": b"x = 2\n",
        "note.txt": b"no\n",
    }.items():
        (tmp_path / name).write_bytes(data)
    assert read_sources(tmp_path) == {
        "good.py": "x = 1\n",
        "latin.py": "# coding: latin-1\ny = 'ä'\n",
    }
    with pytest.raises(ValueError, match="holds no Python files"):
        read_sources(tmp_path / "site-packages" / "none")


def tiny(**changes):
    plan = Plan(2, 1e-2)
    recipe = Recipe(DecoderConfig(300, 16, 1, 2, 1, 24), plan, 32, 4)
    return replace(recipe, **changes)


@pytest.fixture(scope="module")
def prepared():
    return prepare(corpus(library() / "asyncio"), 300)


def test_a_folder_with_a_run_on_other_files_is_refused(tmp_path, prepared):
    train_house_model(tiny(), prepared, tmp_path, "cpu")
    other = replace(prepared.corpus, hashes={"a.py": "0"}, name="mine")
    with pytest.raises(ValueError, match="other files than those of mine"):
        train_house_model(
            tiny(), replace(prepared, corpus=other), tmp_path, "cpu"
        )


def test_a_loss_that_is_no_number_names_the_files(tmp_path, prepared):
    recipe = tiny(plan=Plan(3, 1e30))  # the first update is too much
    with pytest.raises(NonFiniteLoss, match="at step 1; its batch") as caught:
        train_house_model(recipe, prepared, tmp_path, "cpu")
    (note,) = caught.value.__notes__
    named = note.removeprefix("pieces of ").split(", ")
    assert named
    assert set(named) <= set(prepared.corpus.training)


def test_what_is_written_is_what_was_trained(tmp_path, prepared):
    model, losses = train_house_model(tiny(), prepared, tmp_path, "cpu")
    assert len(losses) == 2
    assert losses[0] == pytest.approx(math.log(300), abs=0.1)
    again = load_llama(tmp_path / "model")
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(tokens), model(tokens))
    tokenizer = BytePairTokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.merges == prepared.tokenizer.merges


@pytest.mark.slow
def test_the_command_trains_and_goes_on(tmp_path, monkeypatch):
    recipe = tiny(plan=Plan(4, 1e-2))
    monkeypatch.setitem(RECIPES, "tiny", recipe)
    said = []
    given = ("tiny", tmp_path, library() / "asyncio", said.append)
    train_and_tell(*given)
    assert "asyncio: 31 files to train on, 2 held out" in said[1]
    assert "step     4 of 4" in said[3]
    (tmp_path / "step-00000004.ckpt").unlink()
    said.clear()
    train_and_tell(*given)
    assert "going on after step 3" in said


def test_the_command_refuses_a_folder_without_python(tmp_path):
    done = CliRunner().invoke(
        app, ["train", "house-model", "--corpus", str(tmp_path)]
    )
    assert done.exit_code == 1
    assert f"warpmap: {tmp_path} holds no Python files" in done.output
