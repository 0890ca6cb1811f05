"""What an adaptation did: layer by layer, what became what, with which weights, and what was refused."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One attention layer of the model.

    Examples:
        >>> import timm
        >>> from cbsa_torch.models import adapt_vit
        >>> model, report = adapt_vit(timm.create_model("vit_tiny_patch16_224", depth=2))
        >>> report.layers[0].before, report.layers[0].after, report.layers[0].new
        ('Attention', 'AdaptedCBSA', ('step_tokens = 1', 'step_contraction = 0'))
    """

    name: str
    """E.g. ``blocks.3.attn``."""
    before: str
    """Its class."""
    after: str | None = None
    """The class it became; None if it stayed as it was."""
    inherited: tuple[str, ...] = ()
    """Parameters that the new layer shares with the old one, by the same names."""
    new: tuple[str, ...] = ()
    """Parameters that it adds, with their values."""
    dropped: tuple[str, ...] = ()
    """What the old layer had and the new one has no use for."""
    reason: str = ""
    """Why it stayed as it was."""
    refused: bool = False
    """Whether it was asked for and cannot be adapted."""

    @property
    def adapted(self) -> bool:
        """Whether it was replaced."""
        return self.after is not None


@dataclasses.dataclass(frozen=True)
class AdaptReport:
    """What :func:`cbsa_torch.models.adapt_vit` did to a model. ``print`` shows a table.

    Examples:
        >>> import timm
        >>> from cbsa_torch.models import adapt_vit
        >>> model, report = adapt_vit(timm.create_model("vit_tiny_patch16_224", depth=2), "agent")
        >>> report.mixer, len(report.layers), report.refused
        ('agent', 2, ())
    """

    model: str
    """Class of the model."""
    mixer: str
    options: dict[str, Any]
    """Of the mixer, those that were given."""
    asked: str | tuple[int, ...]
    """The layers that were asked for."""
    layers: tuple[LayerReport, ...]
    """Every attention layer, in order."""

    @property
    def adapted(self) -> tuple[LayerReport, ...]:
        """The layers that were replaced."""
        return tuple(layer for layer in self.layers if layer.adapted)

    @property
    def refused(self) -> tuple[LayerReport, ...]:
        """The layers that were asked for and cannot be adapted."""
        return tuple(layer for layer in self.layers if layer.refused)

    def model_args(self, base: str, **base_args: Any) -> dict[str, Any]:
        """What rebuilds the model: ``timm.create_model("adapted_vit", **report.model_args("vit_...", ...))``.

        Args:
            base: timm's name of the model that was adapted.
            **base_args: the arguments it was created with, ``num_classes`` and the like; not ``pretrained``.

        Returns:
            JSON, to be saved by :func:`cbsa_torch.models.save_checkpoint` with ``"model": "adapted_vit"``.
        """
        common = ("num_classes", "in_chans", "img_size", "global_pool")
        args: dict[str, Any] = {"base": base, "mixer": self.mixer, "mixer_args": self.options}
        args["layers"] = self.asked if isinstance(self.asked, str) else list(self.asked)
        args |= {name: base_args.pop(name) for name in common if name in base_args}
        return {**args, "base_args": base_args}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        lines = [
            f"{self.model}: {len(self.adapted)} of {len(self.layers)} attention layers are now "
            f"{self.mixer!r}{options}"
        ]
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines += [f"  {layer.name:<{width}}  {_describe(layer)}" for layer in self.layers]
        return "\n".join(lines)


def _describe(layer: LayerReport) -> str:
    if not layer.adapted:
        return f"{layer.before} {'refused' if layer.refused else 'left'}: {layer.reason}"
    parts = [f"{layer.before} -> {layer.after}", f"inherits {', '.join(layer.inherited)}"]
    if layer.new:
        parts.append(f"new {', '.join(layer.new)}")
    if layer.dropped:
        parts.append(f"drops {', '.join(layer.dropped)}")
    return "; ".join(parts)
