"""All-reduce out of point-to-point sends: a ring and a binomial tree.

All-reduce leaves the sum of every rank's tensor on every rank. The ring cuts
the tensor into one chunk per rank and keeps all links busy; the tree sends
whole tensors, but in fewer steps. For p ranks and a tensor of n bytes:

    ring   2 (p - 1) steps         2 (p - 1) n / p bytes
    tree   2 ceil(log2 p) steps    2 ceil(log2 p) n bytes

Every rank of the group makes the same call, with the same shape and dtype.
No gradient flows through these functions.

References: Patarasuk and Yuan, 2009, doi:10.1016/j.jpdc.2008.09.002;
Thakur, Rabenseifner and Gropp, 2005, doi:10.1177/1094342005051521
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from warpmap.training.sharding._ring import (
    all_gather_steps,
    reduce_scatter_steps,
)
from warpmap.training.sharding._tree import tree_children

# the types that both Gloo and NCCL can add
DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int8, torch.uint8),
)


class Cost(NamedTuple):
    """What stands one after another between the first send and the result."""

    steps: int
    bytes: int

    def seconds(self, latency: float, bandwidth: float) -> float:
        """Time in the alpha-beta model: a start-up per step, then the bytes.

        Args:
            latency: Alpha, seconds before a message's first byte arrives.
            bandwidth: 1 / beta, bytes per second of one link.

        Examples:
            >>> Cost(steps=6, bytes=3_000_000).seconds(1e-5, 1e11)
            9e-05
        """
        return self.steps * latency + self.bytes / bandwidth


def ring_cost(numel: int, itemsize: int, world_size: int) -> Cost:
    """Cost of :func:`ring_all_reduce`, which every rank pays alike.

    Args:
        numel: Elements of the tensor.
        itemsize: Bytes of one element.
        world_size: Ranks of the group, at least 1.

    Examples:
        >>> ring_cost(1_000_000, 4, world_size=4)
        Cost(steps=6, bytes=6000000)
    """
    if world_size < 1:
        raise ValueError(f"expected a rank or more, got {world_size}")
    steps = 2 * (world_size - 1) if numel else 0
    return Cost(steps, steps * -(-numel // world_size) * itemsize)


def tree_cost(numel: int, itemsize: int, world_size: int) -> Cost:
    """Cost of :func:`tree_all_reduce`, which is what its root pays.

    Arguments are those of :func:`ring_cost`.

    Examples:
        >>> tree_cost(1_000_000, 4, world_size=4)
        Cost(steps=4, bytes=16000000)
    """
    steps = 2 * len(tree_children(0, world_size)) if numel else 0
    return Cost(steps, steps * numel * itemsize)


def ring_reduce_scatter(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks, of which each keeps one chunk.

    Args:
        x: Any shape and strides, at least one element.
        group: Who takes part; by default every rank.

    Returns:
        ``(ceil(x.numel() / p),)``: rank ``r`` holds chunk ``r`` of the flat
        sum. Zeros fill up the last chunks.

    Raises:
        ValueError: If the dtype is not in ``DTYPES``, ``x`` is empty, or this
            rank is not in the group.

    Examples:
        >>> from warpmap.training._process_group import process_group
        >>> with process_group():
        ...     ring_reduce_scatter(torch.tensor([1, 2, 3])).tolist()
        [1, 2, 3]
    """
    rank, size = _place(x, group)
    if not x.numel():
        raise ValueError(f"expected something to cut up, got {tuple(x.shape)}")
    chunks = x.new_zeros(size, -(-x.numel() // size))
    chunks.view(-1)[: x.numel()] = x.detach().reshape(-1)

    received = torch.empty_like(chunks[0])
    for send, receive in reduce_scatter_steps(rank, size):
        _pass_on(chunks[send], received, group)
        chunks[receive] += received
    return chunks[rank].clone()


def ring_all_gather(shard: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Every rank's shard, on every rank.

    Args:
        shard: ``(...)``, at least one element.
        group: Who takes part; by default every rank.

    Returns:
        ``(p, ...)``, row ``r`` from rank ``r``.

    Raises:
        ValueError: As :func:`ring_reduce_scatter`.

    Examples:
        >>> from warpmap.training._process_group import process_group
        >>> with process_group():
        ...     ring_all_gather(torch.tensor([1, 2, 3])).tolist()
        [[1, 2, 3]]
    """
    rank, size = _place(shard, group)
    if not shard.numel():
        raise ValueError(f"expected a shard, got {tuple(shard.shape)}")
    shards = shard.new_empty(size, *shard.shape)
    shards[rank] = shard.detach()

    for send, receive in all_gather_steps(rank, size):
        _pass_on(shards[send], shards[receive], group)
    return shards


def ring_all_reduce(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks, on every rank, the same to the last bit.

    Args:
        x: Any shape and strides.
        group: Who takes part; by default every rank.

    Returns:
        The shape and dtype of ``x``; ``x`` itself is left alone.

    Raises:
        ValueError: If the dtype is not in ``DTYPES`` or this rank is not in
            the group.

    Examples:
        >>> from warpmap.training._process_group import process_group
        >>> with process_group():
        ...     ring_all_reduce(torch.tensor([1, 2, 3])).tolist()
        [1, 2, 3]
    """
    _place(x, group)
    if not x.numel():
        return torch.empty_like(x)
    chunks = ring_all_gather(ring_reduce_scatter(x, group), group)
    return chunks.view(-1)[: x.numel()].view(x.shape)


def tree_all_reduce(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks: reduce up to rank 0, then broadcast down.

    Arguments, result and errors are those of :func:`ring_all_reduce`.

    Examples:
        >>> from warpmap.training._process_group import process_group
        >>> with process_group():
        ...     tree_all_reduce(torch.tensor([1, 2, 3])).tolist()
        [1, 2, 3]
    """
    rank, size = _place(x, group)
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if not x.numel():
        return total
    parent = rank & (rank - 1)
    children = tree_children(rank, size)

    received = torch.empty_like(total)
    for child in children:
        dist.recv(received, group=group, group_src=child)
        total += received
    if rank != 0:
        dist.send(total, group=group, group_dst=parent)
        dist.recv(total, group=group, group_src=parent)
    for child in reversed(children):  # the deepest subtree goes first
        dist.send(total, group=group, group_dst=child)
    return total


def _pass_on(send: Tensor, receive: Tensor, group: ProcessGroup | None) -> None:
    """Send to the next rank of the ring while receiving from the last one."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    to, source = (rank + 1) % size, (rank - 1) % size
    # as one batch: if all ranks sent first, none would come to receive
    works = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, send, group=group, group_peer=to),
            dist.P2POp(dist.irecv, receive, group=group, group_peer=source),
        ]
    )
    for work in works:
        work.wait()


def _place(x: Tensor, group: ProcessGroup | None) -> tuple[int, int]:
    """This rank's number in the group and the group's size."""
    if x.dtype not in DTYPES:
        raise ValueError(f"cannot add {x.dtype}; expected one of {DTYPES}")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"rank {dist.get_rank()} is not in the group")
    return rank, dist.get_world_size(group)
