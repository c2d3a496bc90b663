"""Kernels to try ``aot`` on."""

import triton
import triton.language as tl


@triton.autotune([triton.Config({"BLOCK": 1024})], key=["N"])
@triton.jit
def double(x_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at, at < N) * 2, at < N)


@triton.jit
def hoard(x_ptr, N, BLOCK: tl.constexpr):
    """Needs the whole block twice: before the sum, and after."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < N, other=0.0)
    tl.static_print("what a compiler prints does not disturb the answers")
    tl.store(x_ptr + at, x / tl.sum(x, axis=0), at < N)
