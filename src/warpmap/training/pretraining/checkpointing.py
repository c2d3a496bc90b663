"""Checkpoints that survive a kill at any moment, and say when they are broken.

A file is written beside its final name, forced to the disk, then renamed. The
rename is atomic: under the final name stands a whole file or none.

    header    8 bytes of magic, 8 of payload length, 32 of SHA-256
    payload   torch.save of {"step": ..., "state": ...}

A run continues bit for bit if the state holds all that a step reads: weights,
the optimizer's moments and count, the random generators, the place in the data.

Reference: Mohan et al., 2021, https://www.usenix.org/conference/fast21/presentation/mohan
"""

import hashlib
import io
import os
import pickle
import random
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MAGIC = b"warpmap1"
HEADER = struct.Struct("<8sQ32s")
KEEP = 2
"""Checkpoints in a folder: the newest, and one to fall back on."""

State = dict[str, Any]
_PLAIN = (bool, int, float, str, bytes, type(None))


class CheckpointError(ValueError):
    """A file is no whole checkpoint; the message names it and says why."""


def save_checkpoint(folder: Path, step: int, state: State) -> Path:
    """Write a checkpoint so that a crash leaves the old ones or the new one.

    The newest ``KEEP`` stay. Files of later steps belong to a run that was
    rolled back: they are renamed to ``*.superseded``, never deleted.

    Args:
        folder: Where the run's checkpoints lie, for one writer; made if need
            be.
        step: Steps done, at most 8 digits.
        state: Nested dicts, lists and tuples of tensors and plain values.

    Returns:
        The file, ``step-00000012.ckpt`` for step 12.

    Raises:
        ValueError: If ``step`` has more than 8 digits, or ``state`` holds an
            object that ``load_checkpoint`` would refuse.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for step in (10, 20, 30):
        ...         path = save_checkpoint(Path(folder), step, {"w": step})
        ...     print(sorted(p.name for p in Path(folder).iterdir()))
        ['step-00000020.ckpt', 'step-00000030.ckpt']
    """
    if not 0 <= step < 10**8:  # names sort as numbers do
        raise ValueError(f"step must be 0 to 99999999, got {step}")
    _check(state, "state")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.ckpt"
    for old in _checkpoints(folder):
        if old.name > path.name:
            os.replace(old, old.with_suffix(".superseded"))

    part = folder / "saving.tmp"  # overwrites what a killed run has left
    with part.open("w+b") as file:
        file.write(bytes(HEADER.size))
        torch.save({"step": step, "state": state}, file)
        size = file.tell() - HEADER.size
        file.seek(HEADER.size)
        digest = hashlib.file_digest(file, "sha256").digest()
        file.seek(0)
        file.write(HEADER.pack(MAGIC, size, digest))
        file.flush()
        # else the new name may reach the disk before the bytes do
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_folder(folder)

    for old in _checkpoints(folder)[KEEP:]:
        old.unlink()
    return path


def load_checkpoint(path: Path) -> tuple[int, State]:
    """Read a checkpoint, with every tensor on the CPU.

    Nothing in the file is executed: it may hold tensors and plain values only.

    Args:
        path: A file that ``save_checkpoint`` wrote.

    Returns:
        The steps done, and the state.

    Raises:
        CheckpointError: If the file is truncated, corrupted or something else.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = save_checkpoint(Path(folder), 7, {"w": torch.ones(2)})
        ...     load_checkpoint(path)
        (7, {'w': tensor([1., 1.])})
    """
    data = memoryview(Path(path).read_bytes())
    if len(data) < HEADER.size or data[: len(MAGIC)] != MAGIC:
        raise CheckpointError(f"{path} is no checkpoint: no such header")
    _, size, digest = HEADER.unpack_from(data)
    payload = data[HEADER.size :]
    if len(payload) != size:
        raise CheckpointError(
            f"{path} is truncated: {len(payload)} bytes of {size}"
        )
    if hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"{path} is corrupted: its SHA-256 differs")
    try:
        found = torch.load(
            io.BytesIO(payload), map_location="cpu", weights_only=True
        )
        return found["step"], found["state"]
    except (pickle.UnpicklingError, RuntimeError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path} holds no state: {e}") from e


def latest_checkpoint(folder: Path) -> tuple[int, State] | None:
    """The newest checkpoint that is whole; warns of each that is not.

    Args:
        folder: Where ``save_checkpoint`` wrote; it need not exist.

    Returns:
        The steps done and the state, or None if the folder holds none.

    Examples:
        >>> latest_checkpoint(Path("nowhere")) is None
        True
    """
    for path in _checkpoints(Path(folder)):
        try:
            return load_checkpoint(path)
        except CheckpointError as refused:
            warnings.warn(str(refused), stacklevel=2)
    return None


def random_state() -> State:
    """What Python's and PyTorch's generators will draw next.

    Examples:
        >>> state = random_state()
        >>> drawn = torch.rand(2), random.random()
        >>> set_random_state(state)
        >>> torch.equal(torch.rand(2), drawn[0]), random.random() == drawn[1]
        (True, True)
    """
    return {
        "python": random.getstate(),
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),  # empty without a GPU
    }


def set_random_state(state: State) -> None:
    """Put the generators where ``random_state`` found them.

    Raises:
        ValueError: If the state is of another number of GPUs.

    Examples:
        >>> set_random_state(random_state())
    """
    gpus = torch.cuda.device_count()
    if len(state["cuda"]) != gpus:
        raise ValueError(
            f"expected the generators of {gpus} GPUs, got {len(state['cuda'])}"
        )
    random.setstate(state["python"])
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state_all(state["cuda"])


def snapshot(state: Any) -> Any:
    """A copy in host memory that no later step can change.

    Examples:
        >>> w = torch.zeros(2)
        >>> copy = snapshot({"w": w})
        >>> w += 1
        >>> copy["w"]
        tensor([0., 0.])
    """
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(value) for value in state)
    return state


class BackgroundWriter:
    """Saves while training goes on: waits for the copy, not for the disk.

    One write is under way at a time; the next waits for it, and raises what
    went wrong in it. Leaving the ``with`` block waits for the last.

    Args:
        folder: Where the run's checkpoints lie.
        write: What writes a snapshot.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     w = torch.zeros(2)
        ...     with BackgroundWriter(Path(folder)) as writer:
        ...         writer.save(1, {"w": w})
        ...         w += 1  # does not reach the file
        ...     latest_checkpoint(Path(folder))
        (1, {'w': tensor([0., 0.])})
    """

    def __init__(
        self,
        folder: Path,
        write: Callable[[Path, int, State], Path] = save_checkpoint,
    ) -> None:
        """Start no thread yet."""
        self.folder, self._write = folder, write
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._under_way: Future[Path] | None = None

    def save(self, step: int, state: State) -> None:
        """Copy the state, and write the copy in a thread."""
        self.wait()
        copy = snapshot(state)
        self._under_way = self._pool.submit(
            self._write, self.folder, step, copy
        )

    def wait(self) -> None:
        """Until the write under way is on the disk; raises its error."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def __enter__(self) -> "BackgroundWriter":
        """The writer."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for the last write, and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()


def _checkpoints(folder: Path) -> list[Path]:
    """Finished files, the newest first."""
    return sorted(folder.glob("step-*.ckpt"), reverse=True)


def _check(value: Any, name: str) -> None:
    """What ``torch.load(weights_only=True)`` takes, and nothing else."""
    if type(value) in (dict, OrderedDict):
        for key, inner in value.items():
            _check(key, f"a key of {name}")
            _check(inner, f"{name}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, inner in enumerate(value):
            _check(inner, f"{name}[{i}]")
    elif type(value) not in (Tensor, nn.Parameter, *_PLAIN):
        raise ValueError(
            f"expected tensors and plain values, got {name} of type "
            f"{type(value).__name__}"
        )


def _sync_folder(folder: Path) -> None:
    """Force a rename to the disk; Windows opens no folders."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
