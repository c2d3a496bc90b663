"""The yardstick accepts what rounding explains, and nothing else."""

import kernel_checks
import pytest
import torch
from kernel_checks import WRONG, assert_accurate, mutant, unit_roundoff

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def exact():
    return torch.randn(4, 300, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rounded_result_passes(exact, dtype):
    assert_accurate(exact.to(dtype), exact, dtype, framework=exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sixteen_roundings_fail(exact, dtype):
    wrong = (exact * (1 + 16 * unit_roundoff(dtype))).to(dtype)
    with pytest.raises(AssertionError, match="times the bound"):
        assert_accurate(wrong, exact, dtype, steps=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3.0], ids=str)
def test_one_wrong_element_fails_and_is_named(exact, value):
    wrong = exact.float()
    wrong[2, 77] = value
    with pytest.raises(AssertionError, match="row 2, column 77"):
        assert_accurate(wrong, exact, torch.float32)


def test_a_sum_may_err_as_float32_sums_do_and_not_as_float16_sums_do():
    x = torch.rand(8, 4096)
    exact = x.double().sum(1, keepdim=True)
    one_by_one = x.cumsum(1)[:, -1:]
    assert_accurate(one_by_one, exact, torch.float32, terms=4096)
    in_half = x.half().cumsum(1, dtype=torch.float16)[:, -1:].float()
    with pytest.raises(AssertionError, match="times the bound"):
        assert_accurate(in_half, exact, torch.float32, terms=4096)


def test_subnormal_results_may_err_by_their_spacing():
    exact = torch.full((1, 3), 1.4 * 2.0**-24, dtype=torch.float64)
    assert_accurate(exact.half(), exact, torch.float16)


def test_worse_than_the_framework_fails_within_the_bound(exact):
    ours = (exact * (1 + 2.0**-20)).float()
    assert_accurate(ours, exact, torch.float32, steps=100)
    with pytest.raises(AssertionError, match="the framework's"):
        assert_accurate(
            ours, exact, torch.float32, steps=100, framework=exact.float()
        )


def test_wrong_shape_and_dtype_fail(exact):
    with pytest.raises(AssertionError, match="instead of"):
        assert_accurate(exact.float(), exact, torch.float16)
    with pytest.raises(AssertionError, match="not"):
        assert_accurate(exact.float()[:, :1], exact, torch.float32)
    with pytest.raises(AssertionError, match="yardstick"):
        assert_accurate(exact.float(), exact.float(), torch.float32)
    with pytest.raises(AssertionError, match="not finite"):
        assert_accurate(exact.float(), exact / 0, torch.float32)


@pytest.mark.parametrize("fault", WRONG)
def test_planted_faults_change_the_result(fault):
    def right(x):
        return (x - 1).cumsum(-1) - x.exp().sum(-1, keepdim=True)

    x = torch.randn(3, 5)
    assert not torch.equal(WRONG[fault](right)(x), right(x))


def test_a_mutant_differs_in_one_place_and_leaves_the_original(tmp_path):
    wrong = mutant(kernel_checks, "eps / 2\n\n", "eps\n\n", tmp_path)
    assert wrong.unit_roundoff(torch.float32) == 2.0**-23
    assert kernel_checks.unit_roundoff(torch.float32) == 2.0**-24
    with pytest.raises(AssertionError, match="0 times"):
        mutant(kernel_checks, "no such code", "", tmp_path)
