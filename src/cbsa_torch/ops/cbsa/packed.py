"""The operator on rows of several sequences: those with as many tokens and representatives are one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cbsa_torch._core.checks import check_shape
from cbsa_torch.ops.packing import group_rows, join_rows, read_cu_seqlens, take_rows


@torch.compiler.disable
def run_packed(
    operator: Callable[..., Tensor],
    tokens: Tensor,
    representatives: Tensor,
    others: Mapping[str, Tensor | None],
    cu_seqlens: Tensor,
    cu_representatives: Tensor,
) -> Tensor:
    """Apply an operator to every sequence; compiled code would be made for the lengths of one batch.

    Args:
        operator: called with ``(B, H, n, P)`` tokens, ``(B, H, m, P)`` representatives and the others.
        tokens: ``(1, H, N, P)``, N in all.
        representatives: ``(1, H, M, P)``, M in all.
        others: ``(1, H, N, P)`` by name, or None.
        cu_seqlens, cu_representatives: ``(S + 1,)`` where sequences, and their representatives, begin and end.

    Returns:
        ``(1, H, N, P)``.
    """
    ends, marks = (
        read_cu_seqlens("cu_seqlens", cu_seqlens),
        read_cu_seqlens("cu_representatives", cu_representatives),
    )
    if len(ends) != len(marks):
        raise ValueError(
            f"cu_representatives must be of the {len(ends) - 1} sequences of cu_seqlens, got {len(marks) - 1}"
        )
    tables = {"tokens": tokens, "representatives": representatives, **others}
    rows: dict[str, Tensor | None] = {}
    for name, table in tables.items():
        last, cu = (marks[-1], "cu_representatives") if name == "representatives" else (ends[-1], "cu_seqlens")
        if table is not None:
            check_shape(name, table, (1, None, None, None), f"(1, H, rows, P) beside {cu}")
            if table.shape[2] != last:
                raise ValueError(f"{cu} must end at the rows of {name} ({table.shape[2]}), got {last}")
        rows[name] = None if table is None else table[0].transpose(0, 1)  # (rows, H, P)
    parts, places = [], []
    for group in group_rows(ends, marks, device=tokens.device):
        if not group.lengths[1]:
            raise ValueError("cu_representatives must give every sequence with tokens a representative")
        given = {}
        for name, table in rows.items():
            at, n = (
                (group.rows[1], group.lengths[1])
                if name == "representatives"
                else (group.rows[0], group.lengths[0])
            )
            given[name] = None if table is None else take_rows(table, at).unflatten(0, (-1, n)).transpose(1, 2)
        parts.append(
            operator(given.pop("tokens"), given.pop("representatives"), **given).transpose(1, 2).flatten(0, 1)
        )
        places.append(group.rows[0])
    return join_rows(parts, places).transpose(0, 1)[None] if parts else torch.zeros_like(tokens)
