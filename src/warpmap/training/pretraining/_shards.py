"""Checkpoints of many ranks, read by any other number of ranks.

Each rank saves the boxes of the tensors that it holds, with their offsets in
the whole. Who loads asks for other boxes and gets them pieced together.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from warpmap.training.pretraining.checkpointing import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
    snapshot,
)

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and lengths, one of each a dimension."""


class Shard(TypedDict):
    """A box of a tensor, and where in the tensor it begins."""

    offset: tuple[int, ...]
    tensor: Tensor


def rows_of(rank: int, ranks: int, shape: tuple[int, ...]) -> Box:
    """The rows that a rank holds: equal parts, the last ones may be short.

    Examples:
        >>> [rows_of(rank, 4, (10, 8)) for rank in (0, 2, 3)]
        [((0, 0), (3, 8)), ((6, 0), (3, 8)), ((9, 0), (1, 8))]
    """
    part = -(-shape[0] // ranks)
    start = min(rank * part, shape[0])
    count = min(part, shape[0] - start)
    return (start, *(0 for _ in shape[1:])), (count, *shape[1:])


def assemble(shards: Iterable[Shard], box: Box) -> Tensor:
    """A box of a tensor, from whatever boxes it was saved in.

    Args:
        shards: Saved boxes; at least one. Where they overlap, they agree.
        box: What to build.

    Raises:
        CheckpointError: If an element of the box is in no shard.

    Examples:
        >>> top = Shard(offset=(0, 0), tensor=torch.tensor([[1, 2]]))
        >>> bottom = Shard(offset=(1, 0), tensor=torch.tensor([[3, 4]]))
        >>> assemble([top, bottom], ((0, 1), (2, 1))).tolist()
        [[2], [4]]
    """
    shards = list(shards)
    offset, lengths = box
    wanted = torch.empty(lengths, dtype=shards[0]["tensor"].dtype)
    missing = torch.ones(lengths, dtype=torch.bool)
    for shard in shards:
        source, target = [], []
        for have, there, want, here in zip(
            shard["offset"], shard["tensor"].shape, offset, lengths, strict=True
        ):
            start = max(have, want)
            stop = max(start, min(have + there, want + here))
            source.append(slice(start - have, stop - have))
            target.append(slice(start - want, stop - want))
        wanted[tuple(target)] = shard["tensor"][tuple(source)]
        missing[tuple(target)] = False
    if missing.any():
        raise CheckpointError(
            f"{missing.sum()} of {missing.numel()} elements are in no shard"
        )
    return wanted


def save_sharded(
    folder: Path, step: int, rank: int, ranks: int, shards: Mapping[str, Shard]
) -> Path:
    """Save what one rank holds, without waiting for the others.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> top = Shard(offset=(0,), tensor=torch.arange(2))
        >>> bottom = Shard(offset=(2,), tensor=torch.arange(2, 4))
        >>> with TemporaryDirectory() as folder:
        ...     for rank, shard in enumerate((top, bottom)):
        ...         path = save_sharded(Path(folder), 5, rank, 2, {"w": shard})
        ...     load_sharded(Path(folder), {"w": ((1,), (2,))})
        (5, {'w': tensor([1, 2])})
    """
    # a view would drag its whole storage into the file
    own = folder / f"rank-{rank}-of-{ranks}"
    return save_checkpoint(own, step, snapshot(dict(shards)))


def load_sharded(
    folder: Path, boxes: Mapping[str, Box]
) -> tuple[int, dict[str, Tensor]] | None:
    """Boxes of the newest step that every rank of its time has saved whole.

    Args:
        folder: Where ``save_sharded`` wrote, with any number of ranks.
        boxes: What this rank will hold, by name.

    Returns:
        The steps done and a tensor a box, or None if no step is complete.
    """
    found: dict[tuple[int, int], list[Path]] = defaultdict(list)
    for path in folder.glob("rank-*-of-*/step-*.ckpt"):
        ranks = int(path.parent.name.split("-")[-1])
        found[int(path.stem.split("-")[1]), ranks].append(path)
    for (step, ranks), paths in sorted(found.items(), reverse=True):
        if len(paths) < ranks:  # killed before the last rank had written
            continue
        try:
            files = [load_checkpoint(path)[1] for path in paths]
        except CheckpointError as refused:
            warnings.warn(str(refused), stacklevel=2)
            continue
        return step, {
            name: assemble([file[name] for file in files], box)
            for name, box in boxes.items()
        }
    return None
