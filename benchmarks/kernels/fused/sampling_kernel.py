"""A token for each row of a vocabulary, beside sorting and FlashInfer.

Logits are normal numbers times 3: thousands of tokens are in a nucleus of 0.9.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from warpmap.kernels.fused.sampling_kernel import sample, sampling_reference
from warpmap_site.harness import Case, compiled, optional

VOCABULARY = 128256


def batch(M: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and seeds."""
    logits = 3 * torch.randn(M, VOCABULARY, device="cuda")
    return logits.to(dtype), torch.randint(2**62, (M,), device="cuda")


def sorting(logits: Tensor, seeds: Tensor, **numbers: Any) -> Tensor:
    """By sorting, as PyTorch's operators would."""
    p = sampling_reference(logits.float(), **numbers)
    return torch.multinomial(p, 1).squeeze(1)


def allowed(logits: Tensor, seeds: Tensor, **numbers: Any) -> Tensor:
    """Our tokens where float64 allows them, else -2."""
    tokens = sample(logits, seeds, **numbers)
    p = sampling_reference(logits.double(), **numbers)
    good = p.gather(1, tokens[:, None]).squeeze(1) > 0
    return torch.where(good, tokens, -2)


def flashinfer(**numbers: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Its softmax, then its sampling: it takes float32."""
    sampling = importlib.import_module("flashinfer.sampling")
    name = "_".join(["top_p" if "top_p" in numbers else "top_k", "sampling"])
    draw = getattr(sampling, f"{name}_from_probs")

    def theirs(logits: Tensor, seeds: Tensor) -> Tensor:
        p = sampling.softmax(logits.float())
        tokens: Tensor = draw(p, *numbers.values())
        return tokens

    return theirs


def cases() -> Iterator[Case]:
    """Top-p in both dtypes and for few rows, top-k, and no filter."""
    for M, dtype, numbers in (
        (256, torch.float32, {"top_p": 0.9}),
        (256, torch.bfloat16, {"top_p": 0.9}),
        (16, torch.float32, {"top_p": 0.9}),
        (256, torch.float32, {"top_k": 50}),
        (256, torch.float32, {}),
    ):
        ours = partial(sample, **numbers)
        peers: dict[str, Any] = {
            "torch": partial(sorting, **numbers),
            "torch.compile": compiled(partial(sorting, **numbers)),
        }
        if numbers:
            peers["flashinfer"] = optional(
                "flashinfer", partial(flashinfer, **numbers)
            )
        else:
            gumbel = torch.empty(M, VOCABULARY, device="cuda")
            peers["gumbel"] = lambda x, seeds, gumbel=gumbel: (
                x - gumbel.exponential_().log_()
            ).argmax(dim=1)
        yield Case(
            labels={
                "filter": next(iter(numbers), "none"),
                "dtype": "fp32" if dtype == torch.float32 else "bf16",
                "M": M,
                "N": VOCABULARY,
            },
            inputs=partial(batch, M, dtype),
            ours=ours,
            peers=peers,
            exact=partial(allowed, **numbers),
            moved=M * VOCABULARY * dtype.itemsize,
            ceiling="read",
            same=False,
        )
