"""What a mask lets a model learn, and what it lets a cache keep.

A layer hands a token what its mask shows. The next layer hands on what was
handed, so a token knows of all that a chain of looks can reach.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def prefix_mask(T: int, prefix: int) -> Tensor:
    """All see the prefix, its own tokens too; the rest is causal.

    Args:
        T: Tokens.
        prefix: How many of them, at the front, see each other: 0 or 1 gives
            the causal mask, ``T`` hides nothing.

    Returns:
        ``(T, T)`` of bool; row ``t`` is what token ``t`` sees.

    Raises:
        ValueError: If the prefix is not within the text.

    Examples:
        >>> prefix_mask(4, prefix=2).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    """
    if not 0 <= prefix <= T:
        raise ValueError(f"prefix must be 0 to {T}, got {prefix}")
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    seen[:, :prefix] = True
    return seen


def reach(mask: Tensor, layers: int) -> Tensor:
    """Which tokens each token knows of after some layers.

    Args:
        mask: ``(T, T)`` of bool, the mask of every layer.
        layers: Layers of attention.

    Returns:
        ``(T, T)`` of bool. A token always knows itself: the residual stream
        goes past attention.

    Examples:
        >>> only_before = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0]]).bool()
        >>> reach(only_before, layers=1)[2].tolist()
        [False, True, True]
        >>> reach(only_before, layers=2)[2].tolist()
        [True, True, True]
    """
    known = torch.eye(len(mask), dtype=torch.bool)
    for _ in range(layers):
        # of products of bools: whether any token in between has both
        known = known | (mask.float() @ known.float() > 0)
    return known


def trains_on(mask: Tensor, layers: int = 2) -> int:
    """Tokens whose successor is a question, since they do not know it yet.

    Args:
        mask: ``(T, T)`` of bool.
        layers: Layers of attention.

    Returns:
        Positions, of ``T - 1``, that can be trained to predict what follows.

    Examples:
        >>> [trains_on(prefix_mask(8, prefix)) for prefix in (0, 4, 8)]
        [7, 4, 0]
    """
    successor = reach(mask, layers).diagonal(offset=1)
    return int((~successor).sum())


def stays_right(
    mask_of: Callable[[int], Tensor], T: int, layers: int = 2
) -> int:
    """Tokens whose cached keys and values outlive the next token.

    Args:
        mask_of: The mask of a text, from its number of tokens.
        T: Tokens that are cached.
        layers: Layers of attention.

    Returns:
        How many of the ``T`` know the same after token ``T + 1`` came.

    Examples:
        >>> stays_right(lambda T: prefix_mask(T, prefix=4), T=8)
        8
        >>> stays_right(lambda T: prefix_mask(T, prefix=T), T=8)
        0
    """
    # keys of the last layer know what the layers before it handed on
    before = reach(mask_of(T), layers - 1)
    after = reach(mask_of(T + 1), layers - 1)
    same = (after[:T, :T] == before).all(dim=1) & ~after[:T, T]
    return int(same.sum())
