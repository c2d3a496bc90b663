"""Launches the CUDA C++ that stands beside some modules.

``cuda_kernel(__file__, "name")`` is a kernel of the ``.cu`` file beside a
module. Nothing is compiled, and neither CuPy nor PyTorch imported, before its
first launch: a module of pure Python may have one.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Grid = int | tuple[int, ...]


@functools.cache
def _module(file: Path) -> Any:
    """The file, compiled for this machine's GPU by NVRTC."""
    try:
        import cupy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "CUDA C++ kernels need an NVIDIA GPU and CuPy: "
            "pip install 'warpmap[cuda]'",
            name=error.name,
        ) from None
    return cupy.RawModule(
        code=file.read_text(encoding="utf-8"), options=("--std=c++17",)
    )


class _Current:
    """PyTorch's current stream, as CuPy takes streams of others."""

    def __cuda_stream__(self) -> tuple[int, int]:
        import torch

        return 0, torch.cuda.current_stream().cuda_stream


def cuda_kernel(file: str, name: str) -> Callable[..., None]:
    """A kernel of the CUDA C++ file beside a module.

    Args:
        file: The module's ``__file__``; its kernels are in a file of the same
            name that ends in ``.cu``.
        name: An ``extern "C" __global__`` function there.

    Returns:
        ``kernel(grid, block, *arguments, shared=0)``, which launches it on the
        current stream of the first tensor's GPU. ``grid`` counts blocks and
        ``block`` threads, each an int or up to three of them; ``shared`` is
        dynamic shared memory in bytes. A tensor is passed as a pointer, an int
        as ``long long``, a float as ``float``.

    Raises:
        ModuleNotFoundError: At the launch, where CuPy is not installed.
        ValueError: At the launch, if an argument is of another type, or no
            tensor is on a GPU.
    """
    source = Path(file).with_suffix(".cu")

    def launch(
        grid: Grid,
        block: Grid,
        *arguments: "Tensor | int | float",
        shared: int = 0,
    ) -> None:
        import torch
        from torch import Tensor

        tensors = [a for a in arguments if isinstance(a, Tensor)]
        if not tensors or any(t.device.type != "cuda" for t in tensors):
            raise ValueError(
                f"{name} needs tensors on a GPU, got "
                f"{[str(t.device) for t in tensors]}"
            )
        for argument in arguments:
            if not isinstance(argument, Tensor | int | float):
                raise ValueError(
                    f"{name} takes tensors, int and float, got {argument!r}"
                )
        with torch.cuda.device_of(tensors[0]):
            module = _module(source)
            import cupy
            import numpy

            kernel = module.get_function(name)
            if shared > 48 * 1024:
                kernel.max_dynamic_shared_size_bytes = shared
            # NumPy's scalars tell CuPy the width of an argument
            given = [
                a.data_ptr()
                if isinstance(a, Tensor)
                else numpy.float32(a)
                if isinstance(a, float)
                else numpy.int64(a)
                for a in arguments
            ]
            with cupy.cuda.Stream.from_external(_Current()):
                kernel(
                    grid if isinstance(grid, tuple) else (grid,),
                    block if isinstance(block, tuple) else (block,),
                    given,
                    shared_mem=shared,
                )

    return launch
