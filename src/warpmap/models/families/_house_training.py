"""How the house models are trained and judged, with this package alone."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from warpmap.models.families._house_corpus import Corpus
from warpmap.models.foundations._llama import save_llama
from warpmap.models.foundations.decoder_only import Decoder, DecoderConfig
from warpmap.models.foundations.tokenization import (
    BytePairTokenizer,
    train_bpe,
)
from warpmap.training.pretraining._order import permuted
from warpmap.training.pretraining.evaluation import windows
from warpmap.training.pretraining.pretraining import (
    NonFiniteLoss,
    Plan,
    Report,
    train,
)
from warpmap.training.pretraining.sequence_packing import (
    IGNORED,
    Packed,
    pack,
)


@dataclass(frozen=True)
class Recipe:
    """All that a training run is made of, besides the corpus.

    Attributes:
        config: The shape; its vocabulary is what the tokenizer learns.
        plan: Steps, learning rate, precision.
        context: Tokens of a row.
        rows: Rows of a batch.
        one_in: One file in so many is read.
    """

    config: DecoderConfig
    plan: Plan
    context: int
    rows: int
    one_in: int = 1


RECIPES = {
    "target": Recipe(
        DecoderConfig(4096, 256, 8, 8, 4, 704),
        Plan(1000, 4e-3, 100, 400, weight_decay=0.4, dtype=torch.bfloat16),
        context=512,
        rows=128,
    ),
    "draft": Recipe(
        DecoderConfig(4096, 128, 3, 4, 2, 352),
        Plan(2000, 8e-3, 100, 800, weight_decay=0.1, dtype=torch.bfloat16),
        context=512,
        rows=128,
    ),
    # for a look, on any machine
    "tiny": Recipe(
        DecoderConfig(512, 64, 2, 4, 2, 176),
        Plan(steps=300, peak=8e-3, warmup=20, decay=100),
        context=128,
        rows=16,
        one_in=16,
    ),
}


class Batches:
    """The rows of every step, as a pure function of its number.

    Each epoch cuts every file anew, at places that depend on the epoch, packs
    the pieces into rows, and shuffles the rows.

    Args:
        documents: Tokens of each file.
        context: Tokens of a row.
        rows: Rows of a batch.
        device: Where the batches go.

    Raises:
        ValueError: If an epoch has fewer rows than a batch.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        context: int,
        rows: int,
        device: str = "cpu",
    ) -> None:
        """Pack the first epoch."""
        self._documents = [torch.tensor(d) for d in documents]
        self._context, self._rows, self._device = context, rows, device
        self._number = -1
        # the same number of steps in every epoch, though the rows of one may
        # be a few more than those of another
        self.steps = int(sum(map(len, documents)) // (context * rows))
        if self.steps < 1:
            raise ValueError(
                f"{sum(map(len, documents))} tokens do not fill a batch of "
                f"{rows} rows of {context}"
            )
        self._epoch = self._packed(0)

    def __call__(self, step: int) -> Packed:
        """The batch of a step."""
        number, place = divmod(step, self.steps)
        if number != self._number:
            self._epoch, self._number = self._packed(number), number
        n = len(self._epoch.tokens)
        first = place * self._rows
        chosen = [
            permuted(i, n, f"house/{number}")
            for i in range(first, first + self._rows)
        ]
        index = torch.tensor(chosen, device=self._device)
        return Packed(
            self._epoch.tokens[index],
            self._epoch.targets[index],
            self._epoch.documents[index],
        )

    def _packed(self, number: int) -> Packed:
        T = self._context
        pieces, owners = [], []
        for i, document in enumerate(self._documents):
            # the first piece is short by another length in each epoch
            short = permuted(i % T, T, f"house/cut/{number}") + 1
            cuts = [0, *range(short, len(document), T), len(document)]
            for begin, end in pairwise(cuts):
                pieces.append(document[begin:end])
                owners.append(i)
        rows = pack(pieces, T)
        # pieces of one file may share a row and must not see each other, so
        # their numbers stay; files are found by ``document_of``
        self._owners = torch.tensor(owners)
        return Packed(*(x.to(self._device) for x in vars(rows).values()))

    def document_of(self, piece: int) -> int:
        """The document that a piece of the present epoch was cut from."""
        return int(self._owners[piece])


@dataclass(frozen=True)
class Prepared:
    """A corpus as tokens.

    Attributes:
        corpus: What was read.
        tokenizer: Learned from the training files.
        training: Tokens of each training file.
        held_out: Tokens of each held-out file.
        held_out_bytes: Of the held-out files, in UTF-8.
    """

    corpus: Corpus
    tokenizer: BytePairTokenizer
    training: list[list[int]]
    held_out: list[list[int]]
    held_out_bytes: int


def prepare(corpus: Corpus, vocab_size: int) -> Prepared:
    """Learn a tokenizer and encode a corpus; 20 seconds for Python's library.

    Args:
        corpus: What to read.
        vocab_size: Tokens to learn.

    Raises:
        ValueError: If the training files are too few for so many tokens.
    """
    tokenizer = train_bpe(corpus.training.values(), vocab_size)
    if tokenizer.vocab_size < vocab_size:
        raise ValueError(
            f"{corpus.name} gives {tokenizer.vocab_size} tokens, too few for "
            f"a vocabulary of {vocab_size}"
        )
    return Prepared(
        corpus,
        tokenizer,
        encode(tokenizer, corpus.training),
        encode(tokenizer, corpus.held_out),
        sum(len(text.encode()) for text in corpus.held_out.values()),
    )


def encode(
    tokenizer: BytePairTokenizer, texts: Mapping[str, str]
) -> list[list[int]]:
    """Tokens of each text, with ``end_of_text`` before and behind it.

    Examples:
        >>> encode(BytePairTokenizer([]), {"a.py": "x"})
        [[256, 120, 256]]
    """
    end = [tokenizer.end_of_text]
    return [end + tokenizer.encode(text) + end for text in texts.values()]


def train_house_model(
    recipe: Recipe,
    prepared: Prepared,
    folder: Path,
    device: str,
    save_every: int = 500,
    report: Callable[[Report], object] | None = None,
) -> tuple[Decoder, list[float]]:
    """Train a model, from the newest checkpoint in ``folder`` if there is one.

    With the same files, on the same kind of machine, the weights are the same
    bit for bit, whether or not the run was interrupted.

    Args:
        recipe: What to train.
        prepared: Tokens to train on.
        folder: Gets checkpoints, then ``model/`` and ``tokenizer.json``.
        device: Where the model computes.
        save_every: Steps between checkpoints.
        report: Hears of every step.

    Returns:
        The model, in evaluation mode, and the loss of every step in nats a
        token.

    Raises:
        ValueError: If ``folder`` holds a run on other files.
        NonFiniteLoss: If a loss is infinite or NaN; its message names files.
    """
    files = folder / "files.json"
    hashes = dict(prepared.corpus.hashes)
    if files.exists() and json.loads(files.read_text()) != hashes:
        raise ValueError(
            f"{folder} holds a run on other files than those of "
            f"{prepared.corpus.name}: give another folder"
        )
    batches = Batches(prepared.training, recipe.context, recipe.rows, device)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(json.dumps(hashes, indent=0) + "\n")

    torch.manual_seed(0)  # the first weights, drawn on the CPU
    model = Decoder(recipe.config).to(device)
    try:
        with deterministic():
            losses = train(
                model, batches, recipe.plan, folder, save_every, report
            )
    except NonFiniteLoss as error:
        names = list(prepared.corpus.training)
        of = sorted({names[batches.document_of(i)] for i in error.documents})
        error.add_note("pieces of " + ", ".join(of))
        raise
    prepared.tokenizer.save(folder / "tokenizer.json")
    save_llama(
        model,
        folder / "model",
        context=recipe.context,
        end_of_text=prepared.tokenizer.end_of_text,
    )
    return model.eval(), losses


class deterministic:
    """Within it, PyTorch uses algorithms that add in a fixed order."""

    def __enter__(self) -> None:
        """Ask for them; cuBLAS reads its variable when it is first used."""
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self._before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        # every tensor here is written before it is read: to fill it first
        # would be hundreds of launches more a step
        settings: Any = torch.utils.deterministic
        self._filled = settings.fill_uninitialized_memory
        settings.fill_uninitialized_memory = False

    def __exit__(self, *error: object) -> None:
        """Leave things as they were."""
        torch.use_deterministic_algorithms(self._before)
        settings: Any = torch.utils.deterministic
        settings.fill_uninitialized_memory = self._filled


@torch.no_grad()
def held_out_nats(
    model: Decoder,
    documents: Sequence[Sequence[int]],
    context: int,
    device: str,
    rows: int = 64,
) -> float:
    """Loss of every token of the documents but the first, in nats, summed.

    Each is predicted from half a context or more, as far as there is one.

    Args:
        model: In evaluation mode.
        documents: Tokens of each.
        context: Most tokens that the model sees at once.
        device: Where the model is.
        rows: Windows at a time.
    """

    def laid() -> Iterator[tuple[Tensor, Tensor]]:
        for document in documents:
            tokens = torch.tensor(document)
            for begin, first, end in windows(
                len(tokens), context, context // 2
            ):
                row = torch.zeros(context, dtype=torch.long)
                row[: end - begin - 1] = tokens[begin : end - 1]
                targets = torch.full((context,), IGNORED)
                targets[first - begin - 1 : end - begin - 1] = tokens[first:end]
                yield row, targets

    found, total = laid(), 0.0
    while batch := list(islice(found, rows)):
        tokens, targets = (
            torch.stack(x).to(device) for x in zip(*batch, strict=True)
        )
        logits = model(tokens).float()
        total += cross_entropy(
            logits.flatten(0, 1),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
        ).item()
    return total
