"""CUDA C++ beside a module: refused clearly, launched with the right types."""

import builtins
import subprocess
import sys

import pytest
import torch

from warpmap.kernels.cuda import _module, cuda_kernel

SOURCE = """
extern "C" __global__ void axpy(
    const float* x, float* y, long long n, float a) {
  extern __shared__ float given[];
  long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  given[threadIdx.x] = i < n ? a * x[i] : 0;
  if (i < n) y[i] += given[threadIdx.x];
}
"""


@pytest.fixture
def axpy(tmp_path):
    (tmp_path / "module.cu").write_text(SOURCE)
    return cuda_kernel(str(tmp_path / "module.py"), "axpy")


def test_importing_it_costs_nothing():
    code = (
        "import sys, warpmap.kernels.cuda; "
        "print({'cupy', 'torch'} & sys.modules.keys() != set())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_tensors_that_are_not_on_a_gpu_are_refused(axpy):
    with pytest.raises(ValueError, match=r"axpy needs tensors on a GPU.*cpu"):
        axpy(1, 32, torch.zeros(3), torch.zeros(3), 3, 2.0)
    with pytest.raises(ValueError, match="axpy needs tensors on a GPU"):
        axpy(1, 32, 3)


def test_without_cupy_one_line_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "cupy":
            raise ModuleNotFoundError("No module named 'cupy'", name="cupy")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"warpmap\[cuda\]"):
        _module(tmp_path / "module.cu")


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [4 * 256, 100 * 1024])
def test_arguments_arrive_as_their_types(axpy, shared):
    x = torch.randn(1000, device="cuda")
    y = torch.ones(1000, device="cuda")
    axpy((4, 1), 256, x, y, 1000, 2.0, shared=shared)
    torch.testing.assert_close(y, 1 + 2 * x)
    with pytest.raises(ValueError, match="takes tensors, int and float"):
        axpy(4, 256, x, y, "1000", 2.0)


@pytest.mark.gpu
def test_it_runs_on_the_current_stream(axpy):
    x, y = torch.ones(1000, device="cuda"), torch.zeros(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    axpy(4, 256, x, y, 1000, 1.0, shared=1024)  # compiles
    with torch.cuda.graph(graph):  # sees launches on its own stream alone
        axpy(4, 256, x, y, 1000, 1.0, shared=1024)
    for _ in range(3):
        graph.replay()
    assert y.unique().tolist() == [4.0]
