"""Three caches of keys and values, and what each lets a model see.

A key and a value depend on the tokens up to their own, so they are computed
once and read at every later step.

    growing  appends; every step copies all that is held
    static   writes into room made at the start; a step copies what is new
    ring     writes over the oldest; memory ends at the window

Texts of a batch end together: shorter ones are padded on the left. So all
write to one slot, and ``pads`` tells where each of them begins. The model
asks the cache for positions and mask, so it need not know which cache it has.

Reference: Shazeer, 2019, https://arxiv.org/abs/1911.02150
Reference: Pope et al., 2022, https://arxiv.org/abs/2211.05102
"""

import torch
from torch import Tensor

from warpmap.models.foundations.decoder_only import DecoderConfig


class KVCache:
    """What the three have in common: who sees what, and from where.

    Made for inference: there is no gradient through what is written over.

    Args:
        layers: Layers of the model.
        pads: ``(B,)``, tokens of padding in front of each text; None for
            none.
        device: Where keys and values are; else where ``pads`` is, or the CPU.
    """

    def __init__(
        self,
        layers: int,
        pads: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Start with nothing."""
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        if pads is not None and (pads.ndim != 1 or pads.is_floating_point()):
            raise ValueError(
                f"pads must be integers (B,), got {pads.dtype} of shape "
                f"{tuple(pads.shape)}"
            )
        self.layers, self.length = layers, 0
        given = "cpu" if pads is None else pads.device
        self.device = torch.device(given if device is None else device)
        self.pads = None if pads is None else pads.to(self.device)
        self.k: list[Tensor] = []
        self.v: list[Tensor] = []

    @property
    def window(self) -> int | None:
        """How far back a token sees, itself included; None for all the way."""
        return None

    @property
    def nbytes(self) -> int:
        """Bytes of memory, in use or not."""
        return sum(held.nbytes for held in (*self.k, *self.v))

    def positions(self, T: int) -> Tensor | None:
        """Where the next ``T`` tokens stand in their texts.

        Returns:
            ``(B, T)``, 0 for padding; None where all texts begin together.
        """
        if self.pads is None:
            return None
        return (self._new(T) - self.pads[:, None]).clamp(min=0)

    def mask(self, T: int) -> Tensor | None:
        """Which of the keys of ``update`` the next ``T`` tokens may see.

        Returns:
            ``(T, S)`` or ``(B, 1, T, S)`` of bool; None where the model's
            own mask, all keys up to the token, says the same.
        """
        if self.pads is None and (T == 1 or self.window is None):
            return None
        token, key = self._new(T)[:, None], self._keys(T)  # (T, 1), (S,)
        seen = key <= token
        if self.window is not None:
            seen = seen & (key > token - self.window)
        if self.pads is None:
            return seen
        text = key >= self.pads[:, None, None]  # (B, 1, S)
        # padding sees itself: a row without keys is 0 / 0 to some kernels
        return (seen & text | (key == token))[:, None]

    def _new(self, T: int) -> Tensor:
        """Numbers of the next tokens, padding counted."""
        return torch.arange(self.length, self.length + T, device=self.device)

    def _keys(self, T: int) -> Tensor:
        """Number of the token in each slot that ``update`` gives back."""
        return torch.arange(self.length + T, device=self.device)

    def _finish(self, layer: int, T: int) -> None:
        # until the last layer has them, the new tokens are not held
        if layer == self.layers - 1:
            self.length += T


class GrowingCache(KVCache):
    """Keys and values of each layer, made longer by every step.

    Examples:
        >>> cache, new = GrowingCache(layers=1), torch.zeros(2, 4, 7, 8)
        >>> _ = cache.update(0, new, new)
        >>> cache.length, cache.nbytes
        (7, 3584)
    """

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keep what is new, and give back all.

        Args:
            layer: Which layer; every step goes through all, in order.
            k: ``(B, Hkv, T, D)``, keys turned to their positions.
            v: ``(B, Hkv, T, D)``.

        Returns:
            Keys and values that this step attends to, ``(B, Hkv, S, D)``.
        """
        if layer == len(self.k):
            self.k.append(k)
            self.v.append(v)
        else:
            self.k[layer] = torch.cat((self.k[layer], k), dim=2)
            self.v[layer] = torch.cat((self.v[layer], v), dim=2)
        self._finish(layer, k.shape[2])
        return self.k[layer], self.v[layer]


class StaticCache(KVCache):
    """Keys and values in memory that is taken once.

    Args:
        config: Shape of the model.
        batch: Texts.
        capacity: Tokens that each has room for.
        pads: As in ``KVCache``.
        dtype: Of keys and values.
        device: Where they are.

    Examples:
        >>> shape = DecoderConfig(100, 16, 2, 4, 2, 32)
        >>> cache = StaticCache(shape, batch=3, capacity=10)
        >>> cache.length, cache.nbytes
        (0, 3840)
    """

    def __init__(
        self,
        config: DecoderConfig,
        batch: int,
        capacity: int,
        pads: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Take the memory."""
        super().__init__(config.layers, pads, device)
        if batch < 1 or capacity < 1:
            raise ValueError(
                f"batch and capacity must be at least 1, got {batch} "
                f"and {capacity}"
            )
        self.capacity = capacity
        D = config.width // config.heads
        shape = (config.layers, 2, batch, config.kv_heads, capacity, D)
        room = torch.zeros(shape, dtype=dtype, device=device)
        self.k, self.v = list(room[:, 0]), list(room[:, 1])

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write what is new behind what is held; copy nothing else.

        Raises:
            ValueError: If the room is used up. Nothing was written then.
        """
        first, T = self.length, k.shape[2]
        end = first + T
        if end > self.capacity:
            raise ValueError(
                f"{end} tokens do not fit into a capacity of {self.capacity}"
            )
        self.k[layer][:, :, first:end] = k
        self.v[layer][:, :, first:end] = v
        self._finish(layer, T)
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]


class RingCache(StaticCache):
    """Keys and values of the last ``capacity`` tokens, for window attention.

    Token ``p`` lies in slot ``p % capacity``. Attention does not mind the
    order of slots: positions are in the keys already.

    Examples:
        >>> shape = DecoderConfig(100, 16, 2, 4, 2, 32)
        >>> cache = RingCache(shape, batch=3, capacity=4)
        >>> cache.length = 6  # tokens so far; 0 and 1 are gone
        >>> cache.held().tolist()
        [4, 5, 2, 3]
    """

    @property
    def window(self) -> int:
        """How far back a token sees, itself included."""
        return self.capacity

    def held(self, new: int = 0) -> Tensor:
        """Number of the token in each slot, after ``new`` more."""
        last = self.length + new - 1
        slots = min(last + 1, self.capacity)
        slot = torch.arange(slots, device=self.device)
        return last - (last - slot) % self.capacity

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write over the oldest; give back all that a new token may see."""
        first, T = self.length, k.shape[2]
        ring_k, ring_v = self.k[layer], self.v[layer]
        old = min(first, self.capacity)
        if T > 1:
            # the first of the new still see what the last will write over
            seen = (
                torch.cat((ring_k[:, :, :old], k), dim=2),
                torch.cat((ring_v[:, :, :old], v), dim=2),
            )
        kept = min(T, self.capacity)
        tokens = torch.arange(first + T - kept, first + T, device=k.device)
        ring_k[:, :, tokens % self.capacity] = k[:, :, T - kept :]
        ring_v[:, :, tokens % self.capacity] = v[:, :, T - kept :]
        if T == 1:
            held = min(first + 1, self.capacity)
            seen = ring_k[:, :, :held], ring_v[:, :, :held]
        self._finish(layer, T)
        return seen

    def _keys(self, T: int) -> Tensor:
        if T == 1:
            return self.held(new=1)
        return torch.cat((self.held(), self._new(T)))
