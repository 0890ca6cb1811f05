"""Resizing: of maps, with antialiasing, and of models to other images."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch._core.checks import check_sides
from cbsa_torch._core.fx import fx_leaf
from cbsa_torch._core.precision import compute_dtype
from cbsa_torch._core.tracing import is_open

_A = -0.5
"""The parameter of the cubic filter that PyTorch takes for antialiased resizing."""


def resize(maps: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """``(B, C, h, w)`` to ``(B, C, *size)``, antialiased; ``mode`` is ``"bilinear"`` or ``"bicubic"``."""
    # Half precision has no such kernel on the CPU.
    exact = maps.contiguous().to(compute_dtype(maps.dtype))
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        any_size = is_open(size[0], size[1])  # by itself, for TorchScript reads what stands beside is_scripting
        if any_size:
            return _resize_any_size(exact, size, mode).to(maps.dtype)
    if size[1] == 1:  # torch 2.14 repeats the first row on the CPU; a height of 1 it gets right
        upright = F.interpolate(exact.mT.contiguous(), (1, size[0]), mode=mode, antialias=True)
        return upright.mT.to(maps.dtype)
    return F.interpolate(exact, size, mode=mode, antialias=True).to(maps.dtype)


def _resize_any_size(maps: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """:func:`resize` to a size that an export leaves open, by a product with a matrix for each axis.

    Other programs would run the operator itself otherwise, and OpenVINO 2026.4 ignores its antialiasing.
    """
    rows, columns = (_resampling(old, new, mode, maps) for old, new in zip(maps.shape[2:], size, strict=True))
    return rows @ maps @ columns.mT


def _resampling(old: int, new: int, mode: str, like: Tensor) -> Tensor:
    """PyTorch's antialiased resampling of one axis as a matrix ``(new, old)``."""
    factory_kwargs: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    scale = old / torch.full((), new, **factory_kwargs)
    centre = scale * (torch.arange(new, **factory_kwargs) + 0.5)
    distance = (torch.arange(old, **factory_kwargs) + 0.5 - centre[:, None]).abs() / scale.clamp(min=1)
    if mode == "bilinear":
        weights = (1 - distance).clamp(min=0)
    else:
        near = ((_A + 2) * distance - (_A + 3)) * distance.square() + 1
        far = (((distance - 5) * distance + 8) * distance - 4) * _A
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


@fx_leaf
def resample_positions(pos_embed: Tensor, grid_size: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Position embeddings ``(1, prefix + h * w, C)`` of a grid ``(h, w)`` for another grid, bicubically."""
    if not torch.jit.is_scripting():  # type: ignore[attr-defined]
        any_size = is_open(wanted[0], wanted[1])
        if any_size:
            return _resampled_positions(pos_embed, grid_size, wanted)
    if grid_size[0] == wanted[0] and grid_size[1] == wanted[1]:
        return pos_embed
    return _resampled_positions(pos_embed, grid_size, wanted)


def _resampled_positions(pos_embed: Tensor, grid_size: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    first = pos_embed.shape[1] - grid_size[0] * grid_size[1]
    patches = pos_embed[:, first:].mT.reshape(1, -1, grid_size[0], grid_size[1])
    patches = resize(patches, wanted, "bicubic").flatten(2).mT
    return torch.cat([pos_embed[:, :first], patches], dim=1)


def fit_positions(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    """Resample the position embedding of pretrained weights for the grid of the model that timm loads.

    The weights are of images of the size that their configuration names; if their length is another, they are
    left as they are, for loading to refuse.
    """
    given = state_dict.get("pos_embed")
    if given is None or given.shape == model.pos_embed.shape:
        return state_dict
    size = getattr(model, "pretrained_model_args", {}).get("img_size") or model.pretrained_cfg["input_size"][1:]
    grid_size = model.stem.grid_size(check_sides("img_size", size))
    if given.shape[1] != model.num_prefix_tokens + grid_size[0] * grid_size[1]:
        return state_dict
    return {**state_dict, "pos_embed": resample_positions(given, grid_size, model.grid_size)}


def record_image_size(model: nn.Module, size: int | tuple[int, int]) -> None:
    """Note a new size where timm looks for it when it saves a model; older versions of timm do not look."""
    with suppress(ImportError):
        from timm.models._input import update_model_input_size

        update_model_input_size(model, size)


def set_image_size(model: nn.Module, size: int | tuple[int, int]) -> str:
    """Make a model one for images of another size, for good; says what was done.

    Raises:
        ValueError: the model cannot.
    """
    change: Any = getattr(model, "set_input_size", None)
    if change is None:
        raise ValueError(f"{type(model).__name__} cannot be given another image size")
    before = _position_counts(model)
    change(img_size=size)
    changed = [
        (before[name], count) for name, count in _position_counts(model).items() if count != before[name]
    ]
    height, width = (size, size) if isinstance(size, int) else size
    how = "".join(f", positions resampled from {old} to {new} tokens" for old, new in changed)
    return f"images of {height} x {width} pixels{how}"


def _position_counts(model: nn.Module) -> dict[str, int]:
    """Tokens of each position embedding."""
    known = {name: p for name, p in model.named_parameters() if name.endswith("pos_embed") and p.ndim == 3}
    return {name: p.shape[1] for name, p in known.items()}
