"""Rows that hold several sequences: parts are taken at once, and joined to the same table."""

import pytest
import torch

from cbsa_torch.ops.packing import group_rows, join_rows, split_rows


@pytest.mark.parametrize("ends", [[0, 3, 8, 10], [0, 3, 8, 11], [0, 0, 4, 4, 9], [0, 2, 4, 6]])
def test_what_is_split_is_joined_again(ends):
    table = torch.randn(ends[-1], 2, dtype=torch.float64, requires_grad=True)
    rows = [group.rows[0] for group in group_rows(ends, device=table.device)]
    parts = split_rows(table, rows)
    for part, where in zip(parts, rows, strict=True):
        assert torch.equal(part, table[where])
    joined = join_rows(parts, rows)
    assert torch.equal(joined, table)
    weights = torch.randn_like(table)
    (gradient,) = torch.autograd.grad((joined * weights).sum(), table)
    assert torch.equal(gradient, weights)


def test_rows_that_are_left_out_are_in_no_part():
    table = torch.arange(10.0)
    first, second = split_rows(table, [slice(0, 3), slice(5, 9)])
    assert torch.equal(first, table[:3])
    assert torch.equal(second, table[5:9])


def test_parts_have_one_gradient_of_the_table_not_one_each():
    table = torch.randn(9, 2, requires_grad=True)
    rows = [group.rows[0] for group in group_rows([0, 2, 5, 9], device=table.device)]
    assert {part.grad_fn.name() for part in split_rows(table, rows)} == {"SplitWithSizesBackward0"}
