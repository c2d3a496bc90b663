"""Rotary embedding of queries and keys beside its peers.

Liger turns its inputs in place: it gets copies, made outside the timing. It
has no interleaved layout, and views of a projection reach it contiguous.
QuACK turns one tensor a launch.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from warpmap.kernels.fused.rope import rope, rope_cache, rope_reference
from warpmap_site.harness import Case, Missing, Prepared, compiled, optional

D = 128
SHAPES = (
    {"B": 4, "T": 4096, "H": 32, "Hkv": 8},
    {"B": 8, "T": 8192, "H": 64, "Hkv": 8},
)
LAYOUTS = {"half-split": False, "interleaved": True}
Pair = tuple[Tensor, Tensor]


def both(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> Pair:
    """The reference, of queries and keys."""
    return (
        rope_reference(q, cos, sin, None, interleaved),
        rope_reference(k, cos, sin, None, interleaved),
    )


def quack(interleaved: bool) -> Callable[..., Pair]:
    """Two launches."""
    turn = importlib.import_module("quack.rotary").apply_rotary_emb

    def f(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return turn(q, cos, sin, interleaved), turn(k, cos, sin, interleaved)

    return f


def liger(interleaved: bool) -> Callable[..., Pair]:
    """In place; heads before tokens, as it wants them."""
    if interleaved:
        raise AttributeError("has no interleaved layout")
    turn = importlib.import_module("liger_kernel.ops.rope")

    def f(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        q, k = turn.LigerRopeFunction.apply(
            q.transpose(1, 2), k.transpose(1, 2), cos, sin, None, 1, D
        )
        return q.transpose(1, 2), k.transpose(1, 2)

    return f


def on_copies(f: Callable[..., Pair] | Missing) -> Prepared | Missing:
    """For a function that changes its inputs."""
    if isinstance(f, Missing):
        return f
    return Prepared(lambda q, k, *tables: (q.clone(), k.clone(), *tables), f)


def backward(f: Callable[..., Pair] | Missing) -> Prepared | Missing:
    """The gradients of queries and keys; inputs are those of the results.

    Gradients are copies too, since Liger overwrites them.
    """
    if isinstance(f, Missing):
        return f

    def prepare(dyq: Tensor, dyk: Tensor, *tables: Tensor) -> tuple[Any, ...]:
        leaves = [torch.zeros_like(d, requires_grad=True) for d in (dyq, dyk)]
        results = f(*leaves, *tables)
        return results, leaves, (dyq.clone(), dyk.clone())

    def run(results: Pair, leaves: list[Tensor], dy: Pair) -> Any:
        return torch.autograd.grad(results, leaves, dy, retain_graph=True)

    return Prepared(prepare, run)


def peers(interleaved: bool) -> dict[str, Any]:
    """The same from others, made anew for every shape."""
    steps = partial(both, interleaved=interleaved)
    return {
        "torch": steps,
        "torch.compile": compiled(steps),
        "liger": optional("liger_kernel", lambda: liger(interleaved)),
        "quack": optional("quack", lambda: quack(interleaved)),
    }


def exact(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> Pair:
    """By complex numbers in float64."""
    turn = torch.complex(cos.double(), sin.double())[: q.shape[1], None]

    def one(x: Tensor) -> Tensor:
        x = x.double()
        if interleaved:
            z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(z * turn).flatten(-2)
        z = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat((z.real, z.imag), dim=-1)

    return one(q), one(k)


def inputs(
    B: int, T: int, H: int, Hkv: int, packed: bool = False
) -> tuple[Tensor, ...]:
    """Queries, keys and tables; packed: views of one projection."""
    tables = rope_cache(T, D)
    heads = H + 2 * Hkv if packed else H + Hkv
    x = torch.randn(B, T, heads, D, device="cuda", dtype=torch.bfloat16)
    q, k = x[:, :, :H], x[:, :, H : H + Hkv]
    return (q, k, *tables) if packed else (q.clone(), k.clone(), *tables)


def moved(B: int, T: int, H: int, Hkv: int) -> int:
    """Queries and keys in and out in bf16, and the tables once."""
    return 2 * 2 * B * T * (H + Hkv) * D + 2 * 4 * T * D // 2


def cases() -> Iterator[Case]:
    """Both layouts and directions; views of a projection; one new token."""
    for layout, interleaved in LAYOUTS.items():
        for shape in SHAPES:
            labels = {"dtype": "bf16", "layout": layout, **shape}
            known = peers(interleaved)
            yield Case(
                labels={"pass": "forward", "input": "separate", **labels},
                inputs=partial(inputs, **shape),
                ours=partial(rope, interleaved=interleaved),
                peers={**known, "liger": on_copies(known["liger"])},
                exact=partial(exact, interleaved=interleaved),
                moved=moved(**shape),
            )
        shape, labels = SHAPES[0], {**labels, **SHAPES[0]}
        yield Case(
            labels={"pass": "backward", "input": "separate", **labels},
            inputs=partial(inputs, **shape),
            ours=backward(partial(rope, interleaved=interleaved)),
            peers={name: backward(f) for name, f in peers(interleaved).items()},
            exact=lambda q, k, cos, sin, i=interleaved: exact(
                q, k, cos, -sin, i
            ),
            moved=moved(**shape),
        )
    for name, shape in {
        "views of qkv": SHAPES[0],
        "one token": {"B": 256, "T": 1, "H": 32, "Hkv": 8},
    }.items():
        known = peers(False)
        yield Case(
            labels={
                "pass": "forward",
                "input": name,
                "dtype": "bf16",
                "layout": "half-split",
                **shape,
            },
            inputs=partial(inputs, **shape, packed=True),
            ours=rope,
            peers={**known, "liger": on_copies(known["liger"])},
            exact=partial(exact, interleaved=False),
            moved=moved(**shape),
        )
