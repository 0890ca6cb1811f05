"""Rows that hold several sequences one after the other: where these are, how to take some and join all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Rows = slice | Tensor
"""Rows one after the other, or their numbers ``(rows,)``."""


def read_cu_seqlens(name: str, cu_seqlens: Tensor) -> list[int]:
    """The beginnings of sequences and the end of the last one; raise unless they rise from 0."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must have dtype torch.int32 or torch.int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or not cu_seqlens.numel():
        raise ValueError(f"{name} must have shape (sequences + 1,), got {tuple(cu_seqlens.shape)}")
    ends: list[int] = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"{name} must start at 0, got {ends[0]}")
    for i, (start, stop) in enumerate(itertools.pairwise(ends)):
        if stop < start:
            raise ValueError(f"{name} must not decrease, got {start}, {stop} for sequence {i}")
    return ends


def rows_of(starts: Sequence[int], length: int, device: torch.device) -> Rows:
    """The rows of sequences of one length, a slice if they follow each other."""
    if all(b - a == length for a, b in itertools.pairwise(starts)):
        return slice(starts[0], starts[0] + len(starts) * length)
    first = torch.tensor(starts, device=device)
    return (first[:, None] + torch.arange(length, device=device)).flatten()


class Alike(NamedTuple):
    """Sequences that are of one length in each of several rows of sequences."""

    members: list[int]
    lengths: tuple[int, ...]
    rows: tuple[Rows, ...]


def group_rows(*ends: Sequence[int], device: torch.device, keys: Sequence[Any] | None = None) -> list[Alike]:
    """Sequences with one length in each row, and one key if given; not those empty in the first row."""
    alike: dict[Any, list[int]] = {}
    lengths = list(zip(*([b - a for a, b in itertools.pairwise(e)] for e in ends), strict=True))
    for i, n in enumerate(lengths):
        if n[0]:
            alike.setdefault((n, None if keys is None else keys[i]), []).append(i)
    return [
        Alike(
            members, n, tuple(rows_of([e[i] for i in members], m, device) for e, m in zip(ends, n, strict=True))
        )
        for (n, _), members in alike.items()
    ]


def split_rows(table: Tensor, rows: Sequence[Rows]) -> list[Tensor]:
    """Parts of a table, at once: slices taken one by one would each have a gradient as large as the table."""
    numbers = _numbers(rows, table.device)
    if not _in_order(rows) or sum(map(len, numbers)) != len(table):
        table = table.index_select(0, torch.cat(numbers))
    return list(table.split([len(part) for part in numbers]))


def join_rows(parts: Sequence[Tensor], rows: Sequence[Rows]) -> Tensor:
    """The table of which these are the parts, all of its rows."""
    if len(parts) == 1:  # a group that is alone is a slice of everything
        return parts[0]
    joined = torch.cat(list(parts))
    return (
        joined
        if _in_order(rows)
        else joined.index_select(0, torch.cat(_numbers(rows, joined.device)).argsort())
    )


def _in_order(rows: Sequence[Rows]) -> bool:
    """Whether all are slices, one after the other."""
    starts = [part.start for part in rows if isinstance(part, slice)]
    return len(starts) == len(rows) and starts == sorted(starts)


def _numbers(rows: Sequence[Rows], device: torch.device) -> list[Tensor]:
    return [
        torch.arange(part.start, part.stop, device=device) if isinstance(part, slice) else part.to(device)
        for part in rows
    ]
