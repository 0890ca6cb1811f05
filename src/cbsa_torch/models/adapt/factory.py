"""An adapted model from names, as an entry point of timm: ``timm.create_model("adapted_vit", base=...)``.

Its arguments are values of JSON, so that a checkpoint can say how to rebuild the model.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import timm
from timm.models import generate_default_cfgs, register_model
from torch import nn

from cbsa_torch._core.checks import nearest
from cbsa_torch.models.adapt.find import Layers
from cbsa_torch.models.adapt.vit import MixerName, adapt_vit
from cbsa_torch.models.checkpoint import refuse_fetching
from cbsa_torch.models.registry import build_entry

__all__ = ["adapted_vit"]

ENTRY = "adapted_vit"
default_cfgs = generate_default_cfgs(
    {f"{ENTRY}.untrained": {"num_classes": 1000, "license": "mit", "paper_ids": "arXiv:2509.16875"}}
)
_FROM_BASE = (
    *("num_classes", "input_size", "pool_size", "crop_pct", "crop_mode", "mean", "std", "interpolation"),
    *("fixed_input_size", "first_conv", "classifier"),
)
"""What an adapted model shares with its base's configuration: all but where weights come from."""


@register_model
def adapted_vit(
    pretrained: bool = False,
    *,
    base: str = "vit_small_patch16_224",
    mixer: MixerName = "adapted_cbsa",
    layers: Layers = "all",
    mixer_args: Mapping[str, Any] | None = None,
    base_args: Mapping[str, Any] | None = None,
    pretrained_base: bool = False,
    num_classes: int | None = None,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    global_pool: str | None = None,
    **timm_args: Any,
) -> nn.Module:
    """Build a model of timm and adapt it: :func:`adapt_vit` by names.

    Args:
        pretrained: weights of the adapted model, from the Hub; for those it was adapted from see
            ``pretrained_base``.
        base: a ViT of timm.
        mixer, layers: of :func:`adapt_vit`.
        mixer_args: its other options, e.g. ``{"num_representatives": 36}``. Default: none.
        base_args: options of the base, e.g. ``{"dynamic_img_size": True}``. Default: none.
        pretrained_base: fetch the base's pretrained weights. No checkpoint may ask for it: leave it out of the
            ``model_args`` that you save.
        num_classes, in_chans, img_size, global_pool: of the base. Default: its own.
        **timm_args: of ``timm.models.build_model_with_cfg``.

    Returns:
        A model of the base's class.

    Raises:
        ValueError: a base that timm does not have or that cannot be adapted, options that fetch weights among
            ``base_args``. TypeError: options that the base or :func:`adapt_vit` do not have.

    Examples:
        >>> import timm
        >>> import cbsa_torch.models
        >>> options = {"base": "vit_tiny_patch16_224", "base_args": {"depth": 2}}
        >>> model = timm.create_model("adapted_vit", **options, num_classes=5)
        >>> model(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 5])
    """
    args = dict(base_args or {})
    refuse_fetching("base_args", args, "use pretrained_base=True, or load weights into the model")
    # Known names only: timm would fetch others, such as hf-hub:..., which a checkpoint must not make it do.
    if not isinstance(base, str) or not timm.is_model(base) or base.split(".", maxsplit=1)[0] == ENTRY:
        raise ValueError(f"base must be a ViT of timm, got {base!r}{nearest(base, timm.list_models())}")
    given = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size, "global_pool": global_pool}
    args |= {name: value for name, value in given.items() if value is not None}

    known: dict[str, Any] = {}

    def build() -> nn.Module:
        model = timm.create_model(base, pretrained=pretrained_base, **args)
        known.update(model.pretrained_cfg)
        return adapt_vit(model, mixer, layers=layers, inplace=True, **(mixer_args or {})).model

    if pretrained:  # what timm needs to load weights of other classes, channels or sizes
        of_base = timm.get_pretrained_cfg(base)
        names = {key: getattr(of_base, key, None) for key in ("classifier", "first_conv")}
        timm_args["pretrained_cfg_overlay"] = names | (timm_args.get("pretrained_cfg_overlay") or {})
        entry = sys.modules[timm.model_entrypoint(base).__module__]
        timm_args["pretrained_filter_fn"] = getattr(entry, "checkpoint_filter_fn", None)
        timm_args["channels"] = in_chans
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    model: nn.Module = build_entry(ENTRY, build, pretrained, feature_cfg=feature_cfg, **timm_args)
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})  # a wrapper for features has none
    cfg |= {key: known[key] for key in _FROM_BASE if key in known}
    return model
