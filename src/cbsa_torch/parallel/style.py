"""Prepare a model for context parallel."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from cbsa_torch.ops.parallel import Ranks, agree, group_of

M = TypeVar("M", bound=nn.Module)


def context_parallel(model: M, ranks: DeviceMesh | dist.ProcessGroup | None) -> M:
    """Let the ranks of a group share the tokens of every input of ``model``; in place.

    To be called on every process, before the model is wrapped (DDP, FSDP2, compile). Every rank of a group is
    then called with the same inputs, and gets the same logits: whole ones, of which it takes the part that the
    model's plan (``_cp_plan``) says, or :class:`ImageBand` and :class:`SetSlice`. Every rank has to call
    backward. Each computes the whole loss, and gradients of parameters are to be averaged over the ranks, as
    DDP and FSDP2 over all processes do. (They are to be summed where losses are shares, such as those of
    features.)

    Args:
        model: what has a plan ``_cp_plan`` and a method ``set_context_parallel(ranks)``, such as
            :class:`cbsa_torch.models.WhiteBoxTransformer` and :class:`cbsa_torch.models.TokenSetTransformer`.
        ranks: a dimension of a mesh (``mesh["cp"]``) or a process group; None: the model has all tokens again.

    Raises:
        ValueError: on every process, where a layer needs all tokens at once, or processes name groups that
            differ.
        TypeError: another model.

    Examples:
        >>> import timm
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from cbsa_torch.parallel import context_parallel
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))  # under torchrun: of all processes
        >>> model = context_parallel(timm.create_model("cbt_nano_patch4_32").eval(), mesh["cp"])
        >>> model(torch.randn(1, 3, 64, 64)).shape  # the same on every rank
        torch.Size([1, 10])
    """
    if ranks is None:
        _set(model, None)
        return model
    own, members = None, list[int]()
    try:
        group = group_of(ranks)
        members = dist.get_process_group_ranks(group)
        _set(model, group)
    except (TypeError, ValueError) as error:
        own = error  # which the others, who wait, are told first
    try:
        _check_groups(agree(None, members, "" if own is None else f"{type(own).__name__}: {own}"))
    except ValueError:
        if own is not None:
            raise own from None
        _set(model, None)
        raise
    return model


def _set(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    if not hasattr(model, "_cp_plan") or not hasattr(model, "set_context_parallel"):
        raise TypeError(
            "model must have a _cp_plan and a method set_context_parallel, as WhiteBoxTransformer and "
            f"TokenSetTransformer have; got {type(model).__name__}"
        )
    model.set_context_parallel(None if group is None else Ranks(group))  # type: ignore[operator]


def _check_groups(groups: list[list[int]]) -> None:
    """Raise unless the processes of every group name that group."""
    for rank, members in enumerate(groups):
        differing = {other: groups[other] for other in members if groups[other] != members}
        if differing:
            raise ValueError(
                f"ranks must be the same group on all its processes: {members} on process {rank}, "
                f"but {differing}"
            )


class ContextParallelStyle(ParallelStyle):
    """:func:`context_parallel` as a style of ``torch.distributed.tensor.parallel.parallelize_module``.

    ``parallelize_module(model, mesh["cp"], ContextParallelStyle())``

    Examples:
        >>> import timm
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> from cbsa_torch.parallel import ContextParallelStyle
        >>> mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("cp",))
        >>> model = timm.create_model("cbt_nano_patch4_32")
        >>> model = parallelize_module(model, mesh["cp"], ContextParallelStyle())
        >>> model(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 10])
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return context_parallel(module, device_mesh)
