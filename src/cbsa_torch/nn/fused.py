"""Layers merged for inference: what ``fuse()`` of a layer returns, timm's convention.

``timm.utils.reparameterize_model(model)`` calls the ``fuse()`` of every layer that has one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cbsa_torch._core.linear import call_changes, is_readable


class Fused(nn.Module):
    """Base of layers that stand for several: always in evaluation mode, and only their own weights are loaded.

    The weights are buffers, so that no optimiser sees them, ``requires_grad_`` does not touch them and nothing
    draws them anew: trained alone they would no longer be what the merged layers can be.
    """

    def hold(self, **weights: Tensor | None) -> None:
        """Keep the weights, in evaluation mode."""
        self.training = False
        for name, weight in weights.items():
            self._parameters.pop(name, None)
            self.register_buffer(name, None if weight is None else weight.detach())

    def train(self, mode: bool = True) -> Fused:
        """Refuse training mode: ``RuntimeError``."""
        if mode:
            raise RuntimeError(
                f"{type(self).__name__} is fused for inference and cannot be trained: what it stands for is "
                "gone; train the model that it was made from"
            )
        return super().train(False)

    def fuse(self) -> Fused:
        """Itself."""
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = {prefix + name for name, _ in self.named_buffers()}
        other = sorted(name for name in state_dict if name.startswith(prefix) and name not in own)
        if other:  # also with strict=False, which would load a part of a layer
            errors: list[str] = args[-1]
            errors.append(
                f"{prefix.rstrip('.') or type(self).__name__} is fused and takes no weights of its parts (got "
                f"{other[0]}); load them before fusing"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class FusedLinear(Fused, nn.Linear):
    """A linear layer whose weight was computed once.

    Args:
        weight: ``(out, in)``. bias: ``(out,)`` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        self.hold(weight=weight, bias=bias)


class FusedConv2d(Fused, nn.Conv2d):
    """A convolution with what follows it merged into its weight and bias.

    Args:
        conv: the convolution that it stands for.
        weight, bias: of the shapes of ``conv``.
    """

    def __init__(self, conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            conv.dilation,  # type: ignore[arg-type]
            conv.groups,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        self.hold(weight=weight, bias=bias)


def check_fusable(layer: nn.Module, kind: type[nn.Module]) -> None:
    """Raise where merging ``layer``, one of a ``kind``, would lose what was done to it.

    Raises:
        ValueError: it has hooks, or its ``forward`` was replaced. TypeError: it is of another class whose
            ``forward`` is another, or its weights are quantised or such.
    """
    name = type(layer).__name__
    change = call_changes(layer)
    if change:
        raise ValueError(f"{name} cannot be fused: {change}, which would be lost; remove it")
    if type(layer).forward is not kind.forward:
        raise TypeError(f"{name} cannot be fused: it has another forward than {kind.__name__}")
    for parameter_name, parameter in layer.named_parameters():
        if not is_readable(parameter):
            raise TypeError(
                f"{name} cannot be fused: {parameter_name} must be an ordinary tensor, got "
                f"{type(parameter).__name__}; fuse before quantising"
            )
