"""A model whose tokens are spread over ranks: what it does at its two ends, whatever its input."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cbsa_torch._core.compiler import not_compiled
from cbsa_torch.ops.parallel import ContextParallel, gathered, of_first, total


class ContextParallelInput(NamedTuple):
    """How whole inputs of a model are split; fields as of diffusers' class of this name.

    Examples:
        >>> from cbsa_torch.parallel import ContextParallelInput
        >>> split = ContextParallelInput(split_dim=1, expected_dims=3)
        >>> split.part("features", torch.zeros(1, 10, 4), slice(0, 5)).shape
        torch.Size([1, 5, 4])
    """

    split_dim: int
    """The axis along which ranks share it."""
    expected_dims: int
    """Its axes."""

    def part(self, name: str, x: Tensor, place: slice) -> Tensor:
        """What lies at ``place`` of the axis."""
        if x.ndim != self.expected_dims:
            raise ValueError(f"{name} must have {self.expected_dims} axes, got shape {tuple(x.shape)}")
        return x.narrow(self.split_dim, place.start, place.stop - place.start)


ContextParallelPlan = Mapping[str, Mapping[str, ContextParallelInput]]
"""By module (``""``: the model) and argument of its forward; arguments that it does not name are not split."""


class SetSlice(NamedTuple):
    """Some features of sets, in place of all: those of this rank, any number of them, also none.

    Ranks hold successive parts. Coordinates and masks beside them are those of all features, on every rank.

    Examples:
        >>> import torch.distributed as dist
        >>> from cbsa_torch.models import TokenSetTransformer
        >>> from cbsa_torch.parallel import SetSlice, context_parallel
        >>> model = TokenSetTransformer(32, dim=64, depth=1, num_heads=4)
        >>> model = context_parallel(model, dist.group.WORLD)  # under torchrun
        >>> model(SetSlice(torch.randn(1, 50, 32)), torch.rand(1, 50, 2)).shape
        torch.Size([1, 2])
    """

    features: Tensor
    """``(B, n, in_dim)``."""


def take_slice(
    given: Tensor | SetSlice,
    check: Callable[[Tensor], None],
    whole: Mapping[str, Tensor | None],
    plan: ContextParallelInput,
    group: dist.ProcessGroup,
    num_prefix_tokens: int,
    facts: Mapping[str, Any],
) -> tuple[Tensor, ContextParallel]:
    """The part of this rank of sets of features, after all ranks have agreed that they can go on.

    Args:
        given: whole sets, of which every rank takes about as many, or the part.
        check: raises ValueError or TypeError where features do not fit.
        whole: what every rank has of all features, with N on axis 1: the same on every rank.
        plan: of the features.
        group: the ranks.
        num_prefix_tokens: that the first rank has besides.
        facts: what else must be the same on every rank.

    Raises:
        ValueError: on every rank, where inputs do not fit or differ between ranks.
    """
    problem, length, told, own = "", 0, dict[str, Any](), given
    rank, size = group.rank(), group.size()
    try:
        rows = given.features if isinstance(given, SetSlice) else given
        check(rows)
        n = None if isinstance(given, SetSlice) else rows.shape[plan.split_dim]
        if n is not None:
            rows = plan.part("features", rows, slice(n * rank // size, n * (rank + 1) // size))
        own, length = rows, rows.shape[plan.split_dim]
        told = {"batch size": len(rows), "dtype": rows.dtype, **{k: _digest(v) for k, v in whole.items()}}
        told["number of features of whole sets"] = n
    except (ValueError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    length += num_prefix_tokens if rank == 0 else 0
    parallel = ContextParallel.of_slice(group, length, problem=problem, **told, **facts)
    count = parallel.num_tokens - num_prefix_tokens
    for name, value in whole.items():
        if value is not None and value.shape[1] != count:
            raise ValueError(f"{name} must be of the {count} features of all ranks, got {tuple(value.shape)}")
    assert isinstance(own, Tensor), "checked"
    return own, parallel


@not_compiled
def _digest(x: Tensor | None) -> str | None:
    """Of shape and values, by which ranks see that they have the same."""
    if x is None:
        return None
    numbers = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{tuple(x.shape)} of {x.dtype}, {hashlib.sha256(numbers.numpy().data).hexdigest()[:16]}"


def pool_over_ranks(x: Tensor, pool_type: str, num_prefix_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """One feature per image from the tokens ``(B, n, C)`` of all ranks, the same on every rank.

    Args:
        x: the tokens of this rank; prefix tokens are on the first.
        pool_type: "token", "avg", "max" or "avgmax", as in timm.
        num_prefix_tokens: of the model.
        group: the ranks.
    """
    first = num_prefix_tokens if group.rank() == 0 else 0
    if pool_type == "token":
        return total(x[:, : min(first, 1)].sum(1), group)
    grid = x[:, first:]
    average = highest = None
    if pool_type in ("avg", "avgmax"):
        sums = torch.cat([grid.sum(1), grid.new_full((len(grid), 1), grid.shape[1])], 1)
        sums = total(sums.to(torch.promote_types(x.dtype, torch.float32)), group)
        average = (sums[:, :-1] / sums[:, -1:].detach()).to(x.dtype)
    if pool_type in ("max", "avgmax"):
        lowest = grid.new_full((len(grid), 1, grid.shape[2]), -torch.inf)  # for a rank without tokens
        highest = gathered(torch.cat([grid, lowest], 1).amax(1), group).amax(0)
    if average is None or highest is None:
        found = highest if average is None else average
        assert found is not None, "one of the four"
        return found
    return 0.5 * (average + highest)


def drop_alike(dropout: nn.Module, x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Drop the same of ``x`` on every rank: what the first rank draws."""
    if not (dropout.training and getattr(dropout, "p", False)):
        undropped: Tensor = dropout(x)
        return undropped
    return x * of_first(dropout(torch.ones_like(x)), group)
