"""Tokens spread over processes: who holds which, and the exchanges that operators on slices need.

The tokens of an item, prefix tokens first, are one sequence. Every process of a group (a rank) holds a
contiguous part of it, in the order of the ranks; parts may differ in length and be empty. What couples tokens
in a linear mixer is a sum over them of a size that does not grow with their number, and only such sums are
exchanged.

Gradients: what a rank gets out of an exchange depends on the tokens of all ranks, so the gradient of what it
put in is the sum over ranks of their gradients of what they got. A backward pass therefore differentiates the
sum of the ranks' losses, and every rank has to run it. Gradients of parameters are to be added up over the
ranks where each rank's loss is its share, and averaged, as DistributedDataParallel does, where each computes
the whole loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from cbsa_torch._core.compiler import not_compiled
from cbsa_torch._core.types import GridSize


@dataclass(frozen=True)
class Ranks:
    """The processes that share the tokens of a model, as the model remembers them.

    Args:
        group: a process group. Copies of the model have the same.
    """

    group: dist.ProcessGroup

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self  # a process group cannot be copied

    def __reduce__(self) -> Any:
        raise TypeError("a model in context parallel cannot be pickled; save its state_dict")


@dataclass(frozen=True)
class ContextParallel:
    """Which tokens this process holds, and who holds the others.

    Args:
        group: the processes among which tokens are spread: a process group.
        lengths: how many tokens each rank of the group holds, prefix tokens included, which come first.
        grid_size: the grid of all tokens after the prefix, of all ranks together; None: none.

    Raises:
        ValueError: another number of lengths than ranks; no tokens at all, or less than the grid has.

    Examples:
        >>> import torch.distributed as dist
        >>> from cbsa_torch import CBSA
        >>> from cbsa_torch.parallel import ContextParallel
        >>> parallel = ContextParallel.of_slice(dist.group.WORLD, 100, grid_size=(10, 10))  # under torchrun
        >>> CBSA(64, 4)(torch.randn(1, 100, 64), parallel=parallel).shape  # of this rank's tokens
        torch.Size([1, 100, 64])
    """

    group: dist.ProcessGroup
    lengths: tuple[int, ...]
    grid_size: GridSize | None = None

    def __post_init__(self) -> None:
        size = self.group.size()
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in self.lengths)
        if len(self.lengths) != size or not whole or sum(self.lengths) < 1:
            raise ValueError(
                f"lengths must hold the tokens of each of the {size} ranks of the group, ints of at least 0 "
                f"and not all 0, got {self.lengths!r}"
            )

    @classmethod
    def of_slice(
        cls,
        group: DeviceMesh | dist.ProcessGroup,
        length: int,
        *,
        grid_size: GridSize | None = None,
        problem: str = "",
        **same: Any,
    ) -> ContextParallel:
        """Let the ranks of ``group`` tell each other how many tokens they hold; every rank is to call it.

        Args:
            group: a dimension of a mesh (``mesh["cp"]``) or a process group.
            length: tokens of this rank, prefix tokens included.
            grid_size: as of the class; the same on every rank.
            problem: what is wrong on this rank, if something is: every rank then raises.
            **same: what else must be the same on every rank, e.g. the batch size.

        Raises:
            ValueError: on every rank, where one has a problem or they differ.
        """
        group = group_of(group)
        found = agree(group, length, problem, grid_size=grid_size, **same)
        return cls(group, tuple(found), grid_size)

    @property
    def rank(self) -> int:
        """The place of this process in the group."""
        return self.group.rank()

    @property
    def num_tokens(self) -> int:
        """Tokens of all ranks, prefix tokens included."""
        return sum(self.lengths)

    @property
    def start(self) -> int:
        """Tokens of the ranks before this one."""
        return sum(self.lengths[: self.rank])

    @property
    def length(self) -> int:
        """Tokens of this rank."""
        return self.lengths[self.rank]

    def check(self, name: str, length: int) -> int:
        """Return ``length``, of this rank's tokens; raise unless it is that."""
        if length != self.length:
            raise ValueError(
                f"{name} must hold the {self.length} tokens of rank {self.rank} that parallel tells of, "
                f"got {length}"
            )
        return length


def group_of(ranks: Any) -> dist.ProcessGroup:
    """The process group of a dimension of a mesh, or the one that is given; raises for anything else."""
    if isinstance(ranks, DeviceMesh):
        if ranks.ndim != 1:
            raise ValueError(f"ranks must be one dimension of a mesh, such as mesh['cp'], got {ranks}")
        return ranks.get_group()
    if not isinstance(ranks, dist.ProcessGroup):
        raise TypeError(
            f"ranks must be a DeviceMesh or a process group that this process is in, got {type(ranks).__name__}"
        )
    return ranks


@not_compiled
def agree(group: dist.ProcessGroup | None, own: Any, problem: str = "", **same: Any) -> list[Any]:
    """Tell the other ranks something, and make sure that all can go on; every rank is to call it.

    Args:
        group: a process group; None: all processes.
        own: what to tell.
        problem: what keeps this rank from going on; empty if nothing does.
        **same: what must be the same on every rank.

    Returns:
        What each rank told, in order.

    Raises:
        ValueError: on every rank, where one has a problem or they differ.
    """
    told: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(told, (own, problem, same), group=group)
    problems = [f"rank {rank}: {text}" for rank, (_, text, _) in enumerate(told) if text]
    if problems:
        raise ValueError("; ".join(problems))
    for name in dict.fromkeys(name for _, _, facts in told for name in facts):
        values = [facts.get(name) for _, _, facts in told]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"{name} must be the same on every rank, got {values} on ranks 0 to {len(told) - 1}"
            )
    return [value for value, _, _ in told]


def total(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks, of all processes where ``group`` is None; its gradient is the sum over ranks, too."""
    summed: Tensor = _Total.apply(x, group)
    return summed


def of_first(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What the first rank has, on every rank; without gradients."""
    return total(x.detach() if group.rank() == 0 else torch.zeros_like(x), group)


def largest(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The largest over ranks of every element, without gradients."""
    return _all_reduce(x.detach(), group, dist.ReduceOp.MIN)


def gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``(R, *)`` of all R ranks; the gradient of a rank's own part is the sum over ranks of theirs."""
    parts: Tensor = _Gathered.apply(x, group)
    return parts


class Others(NamedTuple):
    """What a rank learns of the others beside a merged softmax; without gradients."""

    any_real: Tensor
    """``(B, 1, 1, 1)`` bool: whether any rank has a real token."""
    shares: Tensor
    """``(R, B, H, M, 1)`` of every rank in the softmax."""
    sums: Tensor
    """``(R, B, H, M, K)`` what each gave along."""


def merged(
    lse: Tensor, picked: Tensor, parallel: ContextParallel, sums: Tensor | None = None
) -> tuple[Tensor, Tensor, Others]:
    """A softmax over the tokens of all ranks from those of each: one exchange forward, one backward.

    Args:
        lse: ``(B, H, M)`` logarithm of the sum of the exponentials of this rank's logits; -inf for a rank
            without tokens, the lowest number for one without real tokens.
        picked: ``(B, H, M, P)`` what its own softmax picks of its values.
        parallel: who takes part.
        sums: ``(B, H, M, K)`` to be told to the others, too; without gradients.

    Returns:
        The share of this rank in the softmax, ``(B, H, M, 1)``, and what the softmax over all picks,
        ``(B, H, M, P)``, the same on every rank; and what else the others tell.
    """
    share, whole, *others = _Merged.apply(lse, picked, sums, parallel.group)
    return share, whole, Others(*others)


def _all_reduce(x: Tensor, group: dist.ProcessGroup | None, of_negative: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum over ranks, or with ``ReduceOp.MIN`` the largest, of every element; ``x`` stays as it is.

    The exchange is in place, and compiled code (inductor, seen in torch 2.14) writes the parts of a
    concatenation where that is: parts that are needed afterwards would be overwritten. A copy would be
    optimised away, the negative is not; and it loses nothing.
    """
    negative = x.neg().contiguous()
    dist.all_reduce(negative, of_negative, group=group)
    return negative.neg()


def _all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = x.new_empty(group.size(), *x.shape)
    dist.all_gather(list(parts), x.contiguous(), group=group)
    return parts


class _Total(torch.autograd.Function):
    """``torch.distributed.nn.functional.all_reduce`` is the same, but deprecated (torch 2.14)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(gradient, ctx.group), None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Total.apply(gradient, ctx.group)[ctx.group.rank()], None


class _Merged(torch.autograd.Function):
    """With shares w_r = exp(lse_r - lse): R = sum_r w_r R_r, and rank r uses w_r.

    Backward, a rank gives dR and w_r dw_r to a sum over ranks; the rest needs what it has. Of dw_r alone, which
    no other rank has, d lse_s is w_s dw_s - w_s sum_r w_r dw_r.
    """

    @staticmethod
    def forward(
        ctx: Any, lse: Tensor, picked: Tensor, sums: Tensor | None, group: dist.ProcessGroup
    ) -> tuple[Tensor, ...]:
        p = picked.shape[-1]
        parts = _all_gather(torch.cat([picked, lse[..., None], *([] if sums is None else [sums])], -1), group)
        lses, told = parts[..., p : p + 1], parts[..., p + 1 :]
        # they are not all -inf: some rank has tokens, real or not
        shares = torch.softmax(lses, 0)  # (R, B, H, M, 1)
        whole = (shares * parts[..., :p]).sum(0)
        share = shares[group.rank()].clone()
        any_real = ~(lses.amax(0)[:, :1, :1] <= torch.finfo(lse.dtype).min / 2)  # NaN is of real tokens
        ctx.mark_non_differentiable(any_real, shares, told)
        ctx.save_for_backward(share, picked, whole)
        ctx.group = group
        return share, whole, any_real, shares, told

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_share: Tensor, d_whole: Tensor, *_: Any) -> tuple[Tensor, Tensor, None, None]:
        share, picked, whole = ctx.saved_tensors
        weighted = share * d_share
        sums = _all_reduce(torch.cat([d_whole, weighted], -1), ctx.group)
        d_whole, over_ranks = sums[..., :-1], sums[..., -1:]
        d_lse = weighted - share * over_ranks + share * (d_whole * (picked - whole)).sum(-1, keepdim=True)
        return d_lse[..., 0], share * d_whole, None, None
