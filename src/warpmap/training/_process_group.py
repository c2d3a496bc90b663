"""How a program joins the other ranks: shared by the distributed topics."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the ranks that ``torchrun`` started; without it, be the only one.

    The backend is NCCL where every rank of the host gets a GPU, else Gloo.

    Yields:
        This rank's device.

    Examples:
        >>> with process_group():
        ...     dist.get_world_size()
        1
    """
    device = torch.device("cpu")
    gpus = torch.cuda.device_count() if dist.is_nccl_available() else 0
    if gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    alone = "RANK" not in os.environ
    dist.init_process_group(
        backend="gloo" if device.type == "cpu" else "nccl",
        # connects all ranks now: NCCL wants that before any single send
        device_id=None if device.type == "cpu" else device,
        store=dist.HashStore() if alone else None,  # type: ignore[attr-defined]
        rank=0 if alone else -1,
        world_size=1 if alone else -1,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()
