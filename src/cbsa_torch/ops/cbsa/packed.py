"""The operators on rows of several sequences: those that are alike are one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cbsa_torch._core.checks import check_floating, check_shape
from cbsa_torch._core.compiler import not_compiled
from cbsa_torch._core.types import CellPooling, Cells, Representatives
from cbsa_torch.ops.packing import Rows, group_rows, join_rows, read_cu_seqlens, split_rows


@not_compiled
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
    for name, table in {"tokens": tokens, **others}.items():
        if table is not None:
            _check_row(name, table, "cu_seqlens", ends[-1])
    _check_row("representatives", representatives, "cu_representatives", marks[-1])
    groups = group_rows(ends, marks, device=tokens.device)
    if any(not group.lengths[1] for group in groups):
        raise ValueError("cu_representatives must give every sequence with tokens a representative")
    if not groups:
        return torch.zeros_like(tokens)
    rows = [group.rows[0] for group in groups]
    guesses = _batches(representatives, [group.rows[1] for group in groups], [g.lengths[1] for g in groups])
    batches = {
        name: [None] * len(groups) if table is None else _batches(table, rows, [g.lengths[0] for g in groups])
        for name, table in {"tokens": tokens, **others}.items()
    }
    outputs = []
    for number, guess in enumerate(guesses):
        given = {name: batch[number] for name, batch in batches.items()}
        outputs.append(operator(given.pop("tokens"), guess, **given))
    return _join(outputs, rows)


@not_compiled
def run_packed_certified(
    operator: Callable[[Tensor, Representatives], Tensor],
    tokens: Tensor,
    representatives: Any,
    cu_seqlens: Tensor,
) -> Tensor:
    """The same where representatives say what they are made of, and so cannot be rows alone.

    Args:
        operator: called with ``(B, H, n, P)`` tokens and the representatives of B items.
        tokens: ``(1, H, N, P)``, N in all.
        representatives: a list, of each sequence those of a batch of one; not looked at for empty ones.
        cu_seqlens: ``(S + 1,)`` where sequences begin and end.

    Returns:
        ``(1, H, N, P)``.
    """
    ends = read_cu_seqlens("cu_seqlens", cu_seqlens)
    check_floating("tokens", tokens)
    _check_row("tokens", tokens, "cu_seqlens", ends[-1])
    # Representatives are a tuple themselves
    listed = isinstance(representatives, (list, tuple)) and not isinstance(representatives, Representatives)
    if not listed or len(representatives) != len(ends) - 1:
        got = f"{len(representatives)}" if listed else type(representatives).__name__
        raise ValueError(
            f"representatives must be a list with one ops.Representatives for each of {len(ends) - 1} "
            f"sequences beside cu_seqlens, got {got}"
        )
    groups = group_rows(ends, device=tokens.device, keys=[_kind(own) for own in representatives])
    if not groups:
        return torch.zeros_like(tokens)
    rows = [group.rows[0] for group in groups]
    outputs = []
    for group, batch in zip(groups, _batches(tokens, rows, [g.lengths[0] for g in groups]), strict=True):
        chosen = [representatives[i] for i in group.members]
        for i, own in zip(group.members, chosen, strict=True):
            if not isinstance(own, Representatives) or own.values.shape[0] != 1:
                given: Any = tuple(own.values.shape) if isinstance(own, Representatives) else type(own).__name__
                raise ValueError(
                    "representatives must be an ops.Representatives with values (1, H, M, P) for sequence "
                    f"{i}, got {given}"
                )
        outputs.append(operator(batch, _stack(chosen)))
    return _join(outputs, rows)


def _check_row(name: str, table: Tensor, cu: str, last: int) -> None:
    check_shape(name, table, (1, None, None, None), f"(1, H, rows, P) beside {cu}")
    if table.shape[2] != last:
        raise ValueError(f"{cu} must end at the rows of {name} ({table.shape[2]}), got {last}")


def _batches(table: Tensor, rows: Sequence[Rows], lengths: Sequence[int]) -> list[Tensor]:
    """The parts ``(B, H, n, P)`` of ``(1, H, N, P)``."""
    parts = split_rows(table[0].transpose(0, 1), rows)  # (rows, H, P)
    return [part.unflatten(0, (-1, n)).transpose(1, 2) for part, n in zip(parts, lengths, strict=True)]


def _join(outputs: Sequence[Tensor], rows: Sequence[Rows]) -> Tensor:
    """The row ``(1, H, N, P)`` of parts ``(B, H, n, P)``."""
    return join_rows([part.transpose(1, 2).flatten(0, 1) for part in outputs], rows).transpose(0, 1)[None]


def _kind(own: Any) -> Any:
    """What representatives of one batch must have in common."""
    if not isinstance(own, Representatives):
        return None
    weights: Any = own.token_weights
    if isinstance(weights, CellPooling):
        weights = CellPooling, weights.first, tuple(weights.cells.counts.shape)
    elif isinstance(weights, Tensor):
        weights = tuple(weights.shape[-2:])
    return tuple(own.values.shape), own.mask is None, own.attention is None, weights


def _stack(items: Sequence[Representatives]) -> Representatives:
    """Representatives of one kind, each of one item, as those of a batch."""
    first = items[0]

    def joined(parts: Sequence[Any]) -> Any:
        return None if parts[0] is None else torch.cat(list(parts))

    all_weights: list[Any] = [own.token_weights for own in items]
    weights: Any = first.token_weights  # a pooling of a grid is the same for all
    if isinstance(weights, CellPooling):
        cells = Cells(*(torch.cat(parts) for parts in zip(*(own.cells for own in all_weights), strict=True)))
        weights = CellPooling(cells, weights.first)
    elif isinstance(weights, Tensor):
        weights = torch.cat([own if own.ndim == 3 else own[None] for own in all_weights])
    return Representatives(
        torch.cat([own.values for own in items]),
        joined([own.mask for own in items]),
        joined([own.attention for own in items]),
        weights,
    )
