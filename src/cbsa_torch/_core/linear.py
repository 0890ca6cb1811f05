"""What a linear layer computes, whatever was done to it.

Some fast paths need a layer's matrix: a tied output projection multiplies by its transpose, a folded one
gives it to the operator. Reading ``layer.weight`` is right only while calling the layer is ``F.linear`` with it
and no more: adapters (LoRA), quantised or offloaded weights, hooks and subclasses act when the layer is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.module_tracker import ModuleTracker

from cbsa_torch._core.autodiff import has_values
from cbsa_torch._core.compiler import COMPILED
from cbsa_torch._core.precision import compute_dtype

_TENSORS_OF_TORCH = ("FakeTensor", "FunctionalTensor", "DTensor")
"""Tensor classes that compute as their values do. Other subclasses, such as quantised ones, are not read."""
_WRAPPED = ("base_layer", "original_module", COMPILED)
"""Where wrappers keep the layer that they change: adapters and saved modules of peft, ``torch.compile``."""
_NEEDED = "the matrix of a projection is needed (it is tied, or measured)"
_REMEDY = "remove the hook, or use tied=False"
_LARGEST_DEVIATION = 0.25
"""Of a token from an affine map, relative: far above rounding and 8-bit quantisation, below a non-linearity."""


def call_changes(module: nn.Module) -> str:
    """What was done to a module that acts when it is called, for an error message; empty if nothing was."""
    if "forward" in module.__dict__:
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
        and not _global_hooks()
        and all(is_readable(layer._parameters.get(name)) for name in ("weight", "bias"))
    )


def apply_with_matrix(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``layer(x)`` and the matrix W, ``(out, in)``, of a layer that computes ``x W^T + b``; differentiable.

    The layer is called once, and hooks on it may look but not change its output: what a hook does is no matrix.
    The weight of an ``nn.Linear`` is read after the call (a hook may have set it, as that of
    ``torch.nn.utils.spectral_norm`` does), that of other layers is found as in :func:`matrix_of`. If the layer
    is not plain, its output is compared with ``x W^T + b``, unless dropout is active in it or there are no
    values to compare (compiled code, ``torch.func``, meta, DTensor).

    Raises:
        TypeError: the layer is not linear by its type. ValueError: a hook, a replaced ``forward`` or a class
            with a forward of its own computes something else; or hooks, other than those of PyTorch that only
            set the weight, where values cannot be compared.
    """
    if is_plain_linear(layer):
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return F.linear(x, weight, layer.bias), weight  # type: ignore[arg-type]
    hooks = _acting_hooks(layer)
    if any(type(getattr(hook, "__self__", None)).__name__.startswith("GradSampleModule") for hook in hooks):
        raise ValueError(
            "a tied projection uses its weight twice, and Opacus, which hooks the layer, would see one half of "
            "the gradient of each sample; use tied=False, or torch.func (vmap of grad)"
        )
    comparable = has_values(x) and not _drops(layer)
    if hooks and not (comparable or x.is_meta or _is_distributed(x) or all(map(_sets_weight_only, hooks))):
        raise ValueError(
            f"{_NEEDED}, and this one has hooks: in compiled code, under torch.func, with active dropout and "
            f"with tensors without values it cannot be checked that they do not change its output; {_REMEDY}"
        )
    if _is_hooked_linear(layer):
        out = layer(x)
        matrix, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
    else:
        matrix, bias = _probe(layer, x)
        out = layer(x)
    _check_affine(layer, hooks, x, out, matrix, bias)
    return out, matrix


def matrix_of(layer: nn.Module, like: Tensor) -> Tensor:
    """The matrix W, ``(out, in)``, of a layer that computes ``x W^T + b``, hooks aside; differentiable.

    The weight of an ``nn.Linear`` is read, also if it has hooks: what they do to its output is not part of it,
    and a weight that a hook sets is that of the last call. Any other layer's ``forward`` is called: W^T is what
    it makes of the identity less what it makes of zero. Dropout in an adapter drops channels of W then.

    Args:
        layer: a linear layer, or a wrapper of one.
        like: ``(..., in)``, of the dtype and device of the layer's inputs.

    Raises:
        TypeError: the layer is not linear by its type. ValueError: it is no affine map (not checked in compiled
            code, under ``torch.func``, on meta or with active dropout).
    """
    if is_plain_linear(layer) or _is_hooked_linear(layer):
        return layer.weight  # type: ignore[return-value]
    matrix, bias = _probe(layer, like)
    row = torch.linspace(-3, 3, like.shape[-1], dtype=like.dtype, device=like.device)[None, None]
    _check_affine(layer, [], row, _without_hooks(layer)(row), matrix, bias)
    return matrix


def why_not_drawn(module: nn.Module) -> str:
    """Why the parameters that a module itself holds cannot be drawn anew; empty if they can."""
    kind, held = type(module).__name__, list(module.parameters(recurse=False))
    if _is_linear_by_type(module) and not isinstance(module, nn.Linear):
        return f"{kind} is an adapter, or quantised"
    if isinstance(module, nn.Linear) and module._parameters.get("weight") is None:
        return "its weight is computed from something else (parametrised, pruned, fused)"
    if is_offloaded(module):
        return "its weights are offloaded"
    if not all(is_readable(parameter) for parameter in held):
        return f"its parameters are not ordinary tensors: {type(held[0]).__name__}"
    return ""


def is_offloaded(module: nn.Module) -> bool:
    """Whether parameters in a module are elsewhere between its calls: on meta, and a ``forward`` loads them."""
    return any(
        "forward" in part.__dict__ and any(parameter.is_meta for parameter in part.parameters())
        for part in module.modules()
    )


def is_readable(tensor: Tensor | None) -> bool:
    """Whether a parameter is an ordinary tensor or None, not one that packs its values as quantised ones do."""
    kind = type(tensor)
    return tensor is None or kind in (Tensor, nn.Parameter) or kind.__name__ in _TENSORS_OF_TORCH


def _is_hooked_linear(layer: nn.Module) -> bool:
    """Whether hooks are all that may make a call of ``layer`` differ from ``F.linear`` with its weight."""
    held = [layer._parameters.get(name) for name in ("weight", "bias")]
    return (
        isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        and "forward" not in layer.__dict__
        and all(is_readable(parameter) for parameter in held)
        and not any(map(_is_distributed, held))  # a hook gathers the weight for the time of the call
    )


def _is_of_plain_numbers(layer: nn.Module) -> bool:
    """Whether a layer computes by weights that nothing packs, or rounds to a few bits."""
    held = list(layer.parameters())
    return bool(held) and all(is_readable(p) and p.is_floating_point() and p.itemsize > 1 for p in held)


def _is_distributed(tensor: Tensor | None) -> bool:
    return type(tensor).__name__ == "DTensor"


def _without_hooks(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The layer's ``forward``: hooks should not see inputs that we made up. Sharded weights need theirs."""
    return layer if any(map(_is_distributed, layer.parameters())) else layer.forward


def _probe(layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Matrix and bias: what the layer makes of the identity and of zero, ``in + 1`` more tokens."""
    if not _is_linear_by_type(layer):
        raise TypeError(
            f"{_NEEDED}: it must be a linear layer or an adapter around one, got {type(layer).__name__}"
        )
    size = like.shape[-1]
    probe = torch.eye(size + 1, size, dtype=like.dtype, device=like.device)
    out = _without_hooks(layer)(probe[None])[0]
    return (out[:size] - out[size]).mT, out[size]


def _drops(layer: nn.Module) -> bool:
    """Whether dropout is active in a layer: two calls of it differ."""
    return any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in layer.modules())


def _check_affine(
    layer: nn.Module,
    hooks: list[Callable[..., Any]],
    x: Tensor,
    out: Tensor,
    matrix: Tensor,
    bias: Tensor | None,
) -> None:
    """Raise unless ``out`` is ``x W^T + b``, token by token and relative, or could not be compared with it."""
    exact = _is_hooked_linear(layer)
    if exact and not hooks:  # hooks of the backward pass only
        return
    # A hook may change little: peft's choose a small adapter for each item of a batch (adapter_names).
    exact = exact or (bool(hooks) and _is_of_plain_numbers(layer))
    if _drops(layer) or (isinstance(out, Tensor) and not has_values(out)):
        return
    bias = None if bias is None else bias.detach().to(matrix.dtype)
    expected = F.linear(x.detach().to(matrix.dtype), matrix.detach(), bias)
    same = isinstance(out, Tensor) and out.shape == expected.shape
    if same:
        # A token of NaN, as masked ones may be, passes. Quantisation has one scale for small and large tokens.
        dtype = compute_dtype(out.dtype)
        got, want = out.detach().to(dtype), expected.to(dtype)
        size = torch.maximum(got.norm(dim=-1), want.norm(dim=-1))
        if exact:
            tolerance = max(1e-5, 2 * torch.finfo(out.dtype).eps)
        else:
            tolerance, size = _LARGEST_DEVIATION, size + 0.1 * size.nan_to_num(0, 0).max()
        same = not bool(((got - want).norm(dim=-1) > tolerance * size).any())
    if not same:
        if hooks:
            raise ValueError(
                f"{_NEEDED}, and a hook changes what this one returns, so that it is no matrix; {_REMEDY}"
            )
        why = call_changes(layer) or f"{type(layer).__name__} has a forward of its own"
        raise ValueError(f"{_NEEDED}, and this one is no affine map x W^T + b: {why}")


def _acting_hooks(layer: nn.Module) -> list[Callable[..., Any]]:
    """Hooks that may change the output of ``layer``, those of layers in it included."""
    tables = [table for m in layer.modules() for table in (m._forward_hooks, m._forward_pre_hooks)]
    return [hook for table in tables for hook in table.values()] + _global_hooks(backward=False)


def _sets_weight_only(hook: Callable[..., Any]) -> bool:
    """Whether a hook is PyTorch's own and sets the weight (spectral norm, pruning)."""
    return isinstance(hook, (SpectralNorm, WeightNorm, BasePruningMethod))


def _is_linear_by_type(layer: nn.Module) -> bool:
    inner = next((layer._modules[name] for name in _WRAPPED if layer._modules.get(name) is not None), None)
    if inner is not None:
        return _is_linear_by_type(inner)
    # By name, for the quantised layers of several packages are no subclasses.
    return isinstance(layer, nn.Linear) or type(layer).__name__.endswith("Linear")


def _global_hooks(*, backward: bool = True) -> list[Callable[..., Any]]:
    """Hooks of all modules that may act, ``backward`` ones included. ``FlopCounterMode``'s only note names."""
    if not torch_module._has_any_global_hook():
        return []
    tables = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
    if backward:
        tables += [torch_module._global_backward_hooks, torch_module._global_backward_pre_hooks]
    hooks = [hook for table in tables for hook in table.values()]
    return [hook for hook in hooks if not isinstance(getattr(hook, "__self__", None), ModuleTracker)]
