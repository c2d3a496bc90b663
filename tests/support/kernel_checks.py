"""Is a kernel right? The float64 yardstick, and wrong kernels to try it on.

A kernel's tests put their comparison into a function, ``check(op)``. The
kernel passes it, and every fault planted with ``WRONG`` and ``mutant`` fails
it: a check that a wrong kernel passes is no check.
"""

import importlib.util
import inspect
import itertools
import math
import sys
from pathlib import Path

import torch

FLOAT32 = torch.finfo(torch.float32)
_mutants = itertools.count()


def unit_roundoff(dtype):
    """The relative error of one rounding to ``dtype``: half its ``eps``.

    Triton's interpreter cuts bfloat16 off instead of rounding: all of ``eps``.
    """
    eps = torch.finfo(dtype).eps
    triton = sys.modules.get("triton")
    if dtype == torch.bfloat16 and triton and triton.knobs.runtime.interpret:
        return eps
    return eps / 2


def assert_accurate(
    actual,
    exact,
    dtype,
    *,
    scale=None,
    stored=1,
    steps=4,
    terms=1,
    framework=None,
    factor=8.0,
):
    r"""Compare a kernel's result with the same computed in float64.

    The bound, for each element, with u the unit roundoff of a dtype:

        |actual - exact| <= stored * u(dtype) * max(scale, smallest normal)
                          + (steps + 8 sqrt(terms)) * u(float32) * scale
                          + the smallest normal float32

    A kernel loads, computes in float32, and stores; so there are three errors.
    Storing v in ``dtype`` changes it by at most u |v|, or as much as for the
    smallest normal number where v is subnormal. Each float32 operation on the
    way changes its result by u; what it adds to the result depends on how
    sensitive that is, and the caller counts it in ``steps`` (an exp of t has
    relative sensitivity |t|). A sum of n terms has n such errors, which are as
    often up as down: they add up to less than 8 sqrt(n) u times the sum of the
    terms' magnitudes with probability above 1 - 2n exp(-32), whatever the
    order of the sum (Higham and Mary, 2019, doi.org/10.1137/18M1226312). Last,
    a GPU may flush to zero what is smaller than a normal float32.

    Args:
        actual: The kernel's result.
        exact: The float64 result, from the same inputs.
        dtype: What ``actual`` must be.
        scale: Magnitude of what is added or subtracted on the way, before it
            cancels, as seen in the result. Default: ``|exact|``.
        stored: How often a value on the way is stored in ``dtype``.
        steps: Float32 roundings on the way, weighted by sensitivity.
        terms: Length of the longest sum.
        framework: The framework's result from the same inputs. It has to keep
            the bound too, and the kernel's worst error, as a share of the
            bound, has to be within ``factor`` of the framework's or of one
            rounding of the result.
        factor: See ``framework``.

    Raises:
        AssertionError: If the shape, the dtype or an element is wrong; ``nan``
            and ``inf`` are always wrong.
    """
    assert actual.dtype == dtype, f"{actual.dtype} instead of {dtype}"
    assert actual.shape == exact.shape, f"{actual.shape}, not {exact.shape}"
    assert exact.dtype == torch.float64, f"a yardstick in {exact.dtype}"
    assert exact.isfinite().all(), "the yardstick is not finite"
    if exact.numel() == 0:
        return

    scale = exact.abs() if scale is None else scale
    u, smallest = unit_roundoff(dtype), torch.finfo(dtype).smallest_normal
    rounding = u * exact.abs().clamp(min=smallest)
    bound = (
        stored * u * scale.clamp(min=smallest)
        + (steps + 8 * math.sqrt(terms)) * FLOAT32.eps / 2 * scale
        + FLOAT32.smallest_normal
    )

    def worst(result):
        share = (result.double() - exact).abs() / bound
        share = share.nan_to_num(nan=math.inf)
        place = divmod(int(share.argmax()), exact.shape[-1])
        return share.max().item(), place

    ours, (row, col) = worst(actual)
    assert ours <= 1, (
        f"{ours:.3g} times the bound at row {row}, column {col}: "
        f"{actual.flatten(0, -2)[row, col].item()!r} "
        f"instead of {exact.flatten(0, -2)[row, col].item()!r}"
    )
    if framework is not None:
        theirs, _ = worst(framework)
        assert theirs <= 1, f"the framework errs {theirs:.3g} times the bound"
        limit = factor * max(theirs, (rounding / bound).max().item())
        assert ours <= limit, (
            f"error {ours:.3g} of the bound, but the framework's {theirs:.3g}"
        )


def _zeros(op):
    return lambda *args: torch.zeros_like(op(*args))


def _row_shifted(op):
    """The last row holds the result of the one before it."""

    def wrong(*args):
        out = op(*args).clone()
        out[-1] = out[-2]
        return out

    return wrong


def _unwritten(op):
    """The last element was never stored, and holds what memory held."""

    def wrong(*args):
        out = op(*args).clone()
        out[..., -1] = torch.nan
        return out

    return wrong


def _tail_unmasked(op):
    """Zeros beyond the end of each row take part."""

    def wrong(*args):
        N = args[0].shape[-1]
        pad = (0, 2 ** N.bit_length() - N)
        padded = [torch.nn.functional.pad(a, pad) for a in args]
        return op(*padded)[..., :N].contiguous()

    return wrong


def _half(op):
    """Everything in float16, as if the upcast were missing."""

    def wrong(*args):
        return op(*(a.half() for a in args)).to(args[0].dtype)

    return wrong


WRONG = {
    "all zeros": _zeros,
    "one row shifted": _row_shifted,
    "last element unwritten": _unwritten,
    "tail unmasked": _tail_unmasked,
    "half precision": _half,
}
"""Makes a wrong function of a right one; for tensors of two or more rows."""


def mutant(module, old, new, folder):
    """A copy of a module with one mistake in its source.

    Args:
        module: The right one.
        old: Code that stands in it exactly once.
        new: What stands there instead.
        folder: Where to write it, pytest's ``tmp_path``: Triton reads kernels
            from files.

    Returns:
        The wrong module, its operators (``"warpmap::..."``) renamed.
    """
    code = inspect.getsource(module)
    found = code.count(old)
    assert found == 1, f"{old!r} stands {found} times in {module.__name__}"
    name = f"mutant{next(_mutants)}"
    code = code.replace(old, new).replace('"warpmap::', f'"{name}::')
    file = Path(folder, f"{name}.py")
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    wrong = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wrong)
    return wrong
