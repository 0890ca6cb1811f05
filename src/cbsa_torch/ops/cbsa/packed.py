"""The operator on rows of several sequences: those with as many tokens and representatives are one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cbsa_torch._core.checks import check_shape
from cbsa_torch.ops.packing import group_rows, join_rows, read_cu_seqlens, split_rows


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
    for name, table in tables.items():
        last, cu = (marks[-1], "cu_representatives") if name == "representatives" else (ends[-1], "cu_seqlens")
        if table is not None:
            check_shape(name, table, (1, None, None, None), f"(1, H, rows, P) beside {cu}")
            if table.shape[2] != last:
                raise ValueError(f"{cu} must end at the rows of {name} ({table.shape[2]}), got {last}")
    groups = group_rows(ends, marks, device=tokens.device)
    if any(not group.lengths[1] for group in groups):
        raise ValueError("cu_representatives must give every sequence with tokens a representative")
    if not groups:
        return torch.zeros_like(tokens)
    batches: dict[str, list[Tensor | None]] = {}
    for name, table in tables.items():
        which = 1 if name == "representatives" else 0
        if table is None:
            batches[name] = [None] * len(groups)
            continue
        parts = split_rows(table[0].transpose(0, 1), [group.rows[which] for group in groups])  # (rows, H, P)
        batches[name] = [
            part.unflatten(0, (-1, group.lengths[which])).transpose(1, 2)
            for part, group in zip(parts, groups, strict=True)
        ]
    outputs = []
    for number in range(len(groups)):
        given = {name: batch[number] for name, batch in batches.items()}
        mixed = operator(given.pop("tokens"), given.pop("representatives"), **given)
        outputs.append(mixed.transpose(1, 2).flatten(0, 1))
    return join_rows(outputs, [group.rows[0] for group in groups]).transpose(0, 1)[None]
