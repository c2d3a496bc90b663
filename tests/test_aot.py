"""Kernels compile for Hopper here, and what came out is read right."""

import pytest
from aot import compile_cuda, compile_sm90a


def hoard(block, num_warps, x="*fp32:16", n="i32:16"):
    return compile_sm90a(
        "aot_examples:hoard",
        {"x_ptr": x, "N": n},
        {"BLOCK": block},
        num_warps=num_warps,
    )


def test_a_block_that_fits_does_not_spill():
    small = hoard(4096, 4)
    assert (small.spills, small.stack, small.threads) == (0, 0, 128)
    assert 32 <= small.registers <= 255
    assert small.shared >= 4 * 4  # a partial sum for each of four warps


def test_a_block_that_does_not_fit_is_seen_to_spill():
    # 128 elements a thread, where 1024 threads have 64 registers each
    large = hoard(1 << 17, 32)
    assert large.registers == 64
    assert large.spills > 0
    assert large.stack > 0


@pytest.mark.slow
def test_alignment_decides_how_wide_the_loads_are():
    wide, narrow = hoard(4096, 4), hoard(4096, 4, n="i32")
    assert wide.opcodes["LDG.E.128"] == wide.opcodes["STG.E.128"] == 8
    assert "ld.global.v4" in wide.ptx
    assert "LDG.E.128" not in narrow.opcodes
    assert narrow.opcodes["LDG.E"] == 32


def test_autotuned_kernels_compile():
    done = compile_sm90a(
        "aot_examples:double", {"x_ptr": "*fp16", "N": "i32"}, {"BLOCK": 128}
    )
    assert done.opcodes["EXIT"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "constexprs", "message"),
    [
        ("no_such_module:hoard", {"BLOCK": 128}, "No module named"),
        ("aot_examples:no_such_kernel", {"BLOCK": 128}, "no attribute"),
        ("aot_examples:hoard", {}, r"\['BLOCK'\]"),
        ("aot_examples:hoard", {"BLOCK": 100}, "power of 2"),
    ],
)
def test_errors_reach_the_caller_and_the_worker_goes_on(
    kernel, constexprs, message
):
    signature = {"x_ptr": "*fp32", "N": "i32"}
    with pytest.raises(RuntimeError, match=message):
        compile_sm90a(kernel, signature, constexprs)
    assert hoard(4096, 4).spills == 0


CUDA = """
#include <cuda_fp16.h>

__device__ float twice(float x) {
  return 2 * x;
}

extern "C" __global__ void doubled(const float4* x, float4* y) {
  float4 v = x[threadIdx.x];
  y[threadIdx.x] = {twice(v.x), twice(v.y), twice(v.z), twice(v.w)};
}

extern "C" __global__ void reverse(const __half* x, __half* y) {
  __shared__ __half s[256];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[255 - threadIdx.x];
}
"""


@pytest.mark.nvcc
def test_kernels_of_a_cuda_file_are_told_apart(tmp_path):
    file = tmp_path / "kernels.cu"
    file.write_text(CUDA)
    kernels = compile_cuda(file)
    assert set(kernels) == {"doubled", "reverse"}
    assert kernels["doubled"].opcodes["LDG.E.128"] == 1
    assert "BAR.SYNC.DEFER_BLOCKING" not in kernels["doubled"].opcodes
    assert kernels["reverse"].opcodes["BAR.SYNC.DEFER_BLOCKING"] == 1
    assert kernels["reverse"].shared >= 512
    assert all(k.spills == k.stack == 0 for k in kernels.values())
    assert 0 < kernels["reverse"].registers < 32


@pytest.mark.nvcc
def test_cuda_that_does_not_compile_says_why(tmp_path):
    file = tmp_path / "kernels.cu"
    file.write_text(CUDA.replace("256", "oops"))
    with pytest.raises(RuntimeError, match='identifier "oops" is undefined'):
        compile_cuda(file)
