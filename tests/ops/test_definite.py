"""Systems of definite matrices, by a factorisation and, for ONNX, by elimination."""

import pytest
import torch

from cbsa_torch.ops.definite import eliminated, inverse, solve
from tests.helpers.compare import assert_close


def definite(*shape, size=6, energy=1.0):
    rows = energy * torch.randn(*shape, 4, size, dtype=torch.float64)
    return torch.eye(size, dtype=torch.float64) + rows.mT @ rows


@pytest.mark.parametrize("energy", [0.0, 1.0, 1e4])
def test_three_ways_to_the_inverse(energy):
    matrix, right = definite(2, 3, energy=energy), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    expected = torch.linalg.inv(matrix)
    assert_close(inverse(matrix), expected, 1e-7)
    assert_close(eliminated(matrix), expected, 1e-7)
    assert_close(solve(matrix, right), expected @ right, 1e-7)


@pytest.mark.parametrize("method", [inverse, eliminated])
def test_what_has_no_solution_is_nan_and_leaves_the_others_alone(method):
    matrices = definite(3)
    expected = torch.linalg.inv(matrices[1])
    matrices[0, 2, 2] = -1.0
    matrices[2, 1, 1] = float("nan")
    result = method(matrices)
    assert result[0].isnan().all()
    assert result[2].isnan().all()
    assert_close(result[1], expected, 1e-10)
