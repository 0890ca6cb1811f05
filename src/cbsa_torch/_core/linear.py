"""What a linear layer computes, whatever was done to it.

Some fast paths need a layer's matrix: a tied output projection multiplies by its transpose, a folded one
gives it to the operator. Reading ``layer.weight`` is right only while calling the layer is ``F.linear`` with it
and no more: adapters (LoRA), quantised or offloaded weights, hooks and subclasses act when the layer is called.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker

from cbsa_torch._core.autodiff import is_transformed
from cbsa_torch._core.compiler import COMPILED

_TENSORS_OF_TORCH = ("FakeTensor", "FunctionalTensor", "DTensor")
"""Tensor classes that compute as their values do. Other subclasses, such as quantised ones, are not read."""
_WRAPPED = ("base_layer", "original_module", COMPILED)
"""Where wrappers keep the layer that they change: adapters and saved modules of peft, ``torch.compile``."""
_LARGEST_DEVIATION = 0.1
"""From an affine map, relative: far above rounding and 8-bit quantisation, far below a non-linearity."""


def call_changes(module: nn.Module) -> str:
    """What was done to a module that acts when it is called, for an error message; empty if nothing was."""
    if "forward" in vars(module):
        return "its forward was replaced"
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    )  # fmt: skip
    return "it has hooks" if any(hooks) else ""


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling ``layer`` is ``F.linear`` with its ``weight`` and ``bias``, so that they may be read.

    Parametrised weights (``torch.nn.utils.parametrize``) are computed when they are read, so reading is right.
    So it is with FSDP2, which has whole weights during the forward pass of a module around the layer.
    """
    return (
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        and not call_changes(layer)
        and not _has_acting_global_hook()
        and all(is_readable(layer._parameters.get(name)) for name in ("weight", "bias"))
    )


def apply_with_matrix(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``layer(x)`` and the layer's matrix, see :func:`matrix_of`. A parametrised weight is computed once."""
    if is_plain_linear(layer):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return F.linear(x, weight, layer.bias), weight  # type: ignore[arg-type]
    # The matrix first: what observes the layer and keeps its last call is left with that of the tokens.
    matrix = matrix_of(layer, x)
    return layer(x), matrix


def matrix_of(layer: nn.Module, like: Tensor) -> Tensor:
    """The matrix W, ``(out, in)``, of a layer that computes ``x W^T + b``; differentiable.

    The weight of a plain layer is read. Any other layer is called: W^T is what it makes of the identity less
    what it makes of zero, which costs ``in + 1`` more tokens. Dropout in an adapter drops channels of W then.

    Args:
        layer: a linear layer, or a wrapper of one.
        like: ``(..., in)``, of the dtype and device of the layer's inputs.

    Raises:
        TypeError: the layer is not linear by its type. ValueError: by a hook, a replaced ``forward`` or a
            subclass it is no affine map (not checked in compiled code, under ``torch.func`` or on meta).
    """
    if is_plain_linear(layer):
        return layer.weight  # type: ignore[return-value]
    if not _is_linear_by_type(layer):
        raise TypeError(
            "the matrix of a projection is needed (it is tied, or measured): it must be a linear layer or an "
            f"adapter around one, got {type(layer).__name__}"
        )
    size = like.shape[-1]
    probe = torch.eye(size + 1, size, dtype=like.dtype, device=like.device)
    if isinstance(layer, nn.Linear):  # hooks, or a forward of its own, may do anything: one more row to check
        probe = torch.cat([probe, torch.linspace(0, 1, size, dtype=like.dtype, device=like.device)[None]])
    if layer._backward_hooks or layer._backward_pre_hooks:  # they are called for inputs with a gradient
        probe.requires_grad_(torch.is_grad_enabled())
    out = layer(probe[None])[0]
    matrix = (out[:size] - out[size]).mT
    if isinstance(layer, nn.Linear):
        _check_affine(layer, matrix.detach(), probe.detach(), out.detach())
    return matrix


def why_not_drawn(module: nn.Module) -> str:
    """Why the parameters that a module itself holds cannot be drawn anew; empty if they can."""
    kind, held = type(module).__name__, list(module.parameters(recurse=False))
    if _is_linear_by_type(module) and not isinstance(module, nn.Linear):
        return f"{kind} is an adapter, or quantised"
    if isinstance(module, nn.Linear) and module._parameters.get("weight") is None:
        return "its weight is computed from something else (parametrised, pruned)"
    if is_offloaded(module):
        return "its weights are offloaded"
    if not all(is_readable(parameter) for parameter in held):
        return f"its parameters are not ordinary tensors: {type(held[0]).__name__}"
    return ""


def is_offloaded(module: nn.Module) -> bool:
    """Whether parameters in a module are elsewhere between its calls: on meta, and a ``forward`` loads them."""
    return any(
        "forward" in vars(part) and any(parameter.is_meta for parameter in part.parameters())
        for part in module.modules()
    )


def is_readable(tensor: Tensor | None) -> bool:
    """Whether a parameter is an ordinary tensor or None, not one that packs its values as quantised ones do."""
    kind = type(tensor)
    return tensor is None or kind in (Tensor, nn.Parameter) or kind.__name__ in _TENSORS_OF_TORCH


def _check_affine(layer: nn.Linear, matrix: Tensor, probe: Tensor, out: Tensor) -> None:
    if torch.compiler.is_compiling() or is_transformed() or type(out) is not Tensor or out.is_meta:
        return
    got, expected = out[-1], out[-2] + probe[-1].to(matrix.dtype) @ matrix.mT
    if (got - expected).abs().max() > _LARGEST_DEVIATION * torch.maximum(got.abs().max(), expected.abs().max()):
        why = call_changes(layer) or f"{type(layer).__name__} has a forward of its own"
        raise ValueError(
            "the matrix of a projection is needed (it is tied, or measured), and this one is no affine map "
            f"x W^T + b: {why}"
        )


def _is_linear_by_type(layer: nn.Module) -> bool:
    inner = next((layer._modules[name] for name in _WRAPPED if layer._modules.get(name) is not None), None)
    if inner is not None:
        return _is_linear_by_type(inner)
    # By name, for the quantised layers of several packages are no subclasses.
    return isinstance(layer, nn.Linear) or type(layer).__name__.endswith("Linear")


def _has_acting_global_hook() -> bool:
    """Whether a hook of all modules may act. Those of ``FlopCounterMode`` only note names."""
    if not torch_module._has_any_global_hook():
        return False
    registered = (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )
    hooks = [hook for table in registered for hook in table.values()]
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)
