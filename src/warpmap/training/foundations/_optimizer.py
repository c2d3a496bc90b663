"""What all optimizers have: parameters, a learning rate, and states."""

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


class Optimizer:
    """Parameters, a learning rate, and a state for each parameter.

    An optimizer says in ``_new_state`` what it remembers of a parameter, and
    in ``_update`` what a step does to one.

    Args:
        params: Tensors to change, in place.
        lr: Learning rate; the attribute ``lr`` may be set before any step.

    Raises:
        ValueError: If there are no parameters, one comes twice, or a setting
            is out of range.
    """

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        """Make a state for each parameter."""
        self.params = list(params)
        if not self.params:
            raise ValueError("expected params, got none: a used-up generator?")
        if len({id(p) for p in self.params}) < len(self.params):
            raise ValueError("expected params without repeats: tied ones once")
        self.lr = at_least_0("lr", lr)
        self.steps = [0] * len(self.params)
        self.state = [self._new_state(p) for p in self.params]

    def _new_state(self, p: Tensor) -> State:
        raise NotImplementedError

    def _update(self, p: Tensor, g: Tensor, step: int, state: State) -> None:
        raise NotImplementedError

    def _update_all(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        steps: list[int],
        states: list[State],
    ) -> None:
        for args in zip(params, grads, steps, states, strict=True):
            self._update(*args)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a ``.grad``; leave the others."""
        found: list[Any] = []
        for i, p in enumerate(self.params):
            if p.grad is not None:
                self.steps[i] += 1
                found.append((p, p.grad, self.steps[i], self.state[i]))
        if found:
            self._update_all(*map(list, zip(*found, strict=True)))

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.params:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Step counts and states; the tensors themselves, not copies."""
        return {"steps": list(self.steps), "state": [*map(dict, self.state)]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Copy what ``state_dict`` gave, bit for bit.

        Raises:
            ValueError: If it belongs to other parameters or another optimizer;
                then nothing is changed.
        """
        want = _layout(self.steps, self.state)
        got = _layout(saved["steps"], saved["state"])
        for i, (w, g) in enumerate(zip_longest(want, got)):
            if w != g:
                raise ValueError(f"expected state {i} as {w}, got {g}")
        self.steps = list(saved["steps"])
        for mine, theirs in zip(self.state, saved["state"], strict=True):
            for name, x in mine.items():
                x.copy_(theirs[name])


def _layout(steps: Sequence[int], states: Sequence[State]) -> list[Any]:
    """Shapes and dtypes; a step or a state too many shows as None."""
    return [
        None
        if step is None or state is None
        else {name: (tuple(x.shape), x.dtype) for name, x in state.items()}
        for step, state in zip_longest(steps, states)
    ]


def at_least_0(name: str, x: float) -> float:
    """Give ``x`` back, or raise ValueError if it is negative or not finite."""
    if not 0 <= x < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {x}")
    return x


def below_1(name: str, x: float) -> float:
    """Give ``x`` back, or raise ValueError if it is not in [0, 1)."""
    if not 0 <= x < 1:
        raise ValueError(f"{name} must be in [0, 1), got {x}")
    return x
