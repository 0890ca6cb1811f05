"""A segmenter from names, as an entry point of timm: ``timm.create_model("segmenter", encoder=...)``.

Its arguments are values of JSON, so that a checkpoint can say how to rebuild the model.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from cbsa_torch._core.checks import nearest
from cbsa_torch._core.types import Residual
from cbsa_torch.models.checkpoint import refuse_fetching
from cbsa_torch.models.registry import build_entry, names
from cbsa_torch.models.segmentation.decoder import HEAD_DIM, MaskTransformerDecoder, Mixer
from cbsa_torch.models.segmentation.features import channels, check_encoder
from cbsa_torch.models.segmentation.model import Segmenter

__all__ = ["segmenter"]

default_cfgs = generate_default_cfgs(
    {
        "segmenter.untrained": {
            "num_classes": 150,
            "pool_size": None,
            "crop_pct": 1.0,
            "classifier": "decoder.mask_norm",
            "first_conv": None,
            "fixed_input_size": False,
            "license": "mit",
            "paper_ids": "arXiv:2509.16875",
        }
    }
)
_FROM_ENCODER = ("input_size", "mean", "std", "interpolation")
"""How images are prepared: fields of timm's configuration that are copied from the encoder's."""


@register_model
def segmenter(
    pretrained: bool = False,
    *,
    encoder: str = "vit_tiny_patch16_224",
    mixer: Mixer = "cbsa",
    num_classes: int = 150,
    dim: int | None = None,
    depth: int = 3,
    num_heads: int | None = None,
    head_dim: int | None = HEAD_DIM,
    learned_step: bool = False,
    residual: Residual | None = None,
    mixer_args: Mapping[str, Any] | None = None,
    encoder_args: Mapping[str, Any] | None = None,
    encoder_norm_eps: float | None = None,
    pretrained_encoder: bool = False,
    freeze_encoder: bool = False,
    in_chans: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **timm_args: Any,
) -> Segmenter:
    """Build a :class:`Segmenter` from an encoder of timm and a decoder with any token mixer.

    Args:
        pretrained: weights of the whole, from the Hub; for those of the encoder see ``pretrained_encoder``.
        encoder: a model of timm, ours included; with ``dynamic_img_size`` where it knows it.
        mixer: ``"cbsa"`` (CBT), ``"mssa"`` (DEPICT), ``"mhsa"`` (Segmenter), ``"tssa"``, ``"linear_cbsa"``,
            ``"agent"``.
        num_classes, depth, num_heads, head_dim, learned_step, residual: of :class:`MaskTransformerDecoder`; the
            defaults are the paper's.
        dim: of the decoder. Default: the encoder's.
        mixer_args: options of the mixer, e.g. ``{"tied": True}``. Default: none.
        encoder_args: options of the encoder, e.g. ``{"drop_path_rate": 0.1}``. Default: none.
        encoder_norm_eps: epsilon of the encoder's layer norms (1e-5 in the official code; timm's ViT: 1e-6).
            Default: its own.
        pretrained_encoder: fetch the encoder's pretrained weights. No checkpoint may ask for it: leave it out
            of the ``model_args`` that you save.
        freeze_encoder: see :class:`Segmenter`.
        in_chans, img_size: of the encoder. Default: its own.
        device, dtype: of the parameters.
        **timm_args: of ``timm.models.build_model_with_cfg``.

    Raises:
        ValueError: an encoder that timm does not have, options that fetch weights among ``encoder_args``.
        TypeError: an encoder without features; options that encoder, mixer or model do not have.

    Examples:
        >>> from cbsa_torch.models import segmenter
        >>> model = segmenter(encoder="cbt_nano_patch4_32", encoder_args={"depth": 2}, num_classes=5)
        >>> model(torch.randn(1, 3, 50, 40)).shape
        torch.Size([1, 5, 50, 40])
    """
    encoder_args = dict(encoder_args or {})
    refuse_fetching(
        "encoder_args", encoder_args, "use pretrained_encoder=True, or load weights into model.encoder"
    )
    taken = inspect.signature(MaskTransformerDecoder).parameters.keys() & (mixer_args or {})
    if taken:
        raise ValueError(f"mixer_args must hold options of the mixer, not {', '.join(sorted(taken))}")
    factory_kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
    given = {"in_chans": in_chans, "img_size": img_size, **factory_kwargs}
    encoder_args |= {name: value for name, value in given.items() if value is not None}

    def build() -> Segmenter:
        made = _encoder(encoder, pretrained_encoder, encoder_args, encoder_norm_eps)
        decoder = MaskTransformerDecoder(
            num_classes,
            channels(made) if dim is None else dim,
            depth,
            num_heads,
            head_dim,
            mixer=mixer,
            encoder_dim=channels(made),
            learned_step=learned_step,
            residual=residual,
            **factory_kwargs,
            **(mixer_args or {}),
        )
        return Segmenter(made, decoder, freeze_encoder=freeze_encoder)

    model: Segmenter = build_entry(
        "segmenter",
        build,
        pretrained,
        gives=f"masks; features are its encoder's, timm.create_model({encoder!r}, features_only=True)",
        **timm_args,
    )
    known = getattr(model.encoder, "pretrained_cfg", None) or {}
    cfg: Any = model.pretrained_cfg
    cfg |= {key: known[key] for key in _FROM_ENCODER if key in known}
    cfg["num_classes"] = num_classes
    return model


def _encoder(name: str, pretrained: bool, args: dict[str, Any], norm_eps: float | None) -> nn.Module:
    """The encoder without head, for images of any size if it can."""
    # Known names only: timm would fetch others, such as hf-hub:..., which a checkpoint must not make it do.
    if not isinstance(name, str) or not timm.is_model(name):
        suggestion = nearest(name, [*names(), *timm.list_models()])
        raise ValueError(f"encoder must be a model of timm, got {name!r}{suggestion}")
    if name.split(".", maxsplit=1)[0] == "segmenter":
        raise ValueError(f"encoder must be a model of features, and {name!r} has a decoder already")
    create = functools.partial(timm.create_model, name, pretrained=pretrained, num_classes=0)
    if name.split(".", maxsplit=1)[0] in names():
        encoder = create(**args)
    else:
        try:
            encoder = create(**{"dynamic_img_size": True, **args})
        except TypeError:  # not every model has the option; another mistake shows again
            encoder = create(**args)
    check_encoder(encoder)
    prune: Any = getattr(encoder, "prune_intermediate_layers", None)
    if prune is not None:
        prune(1)  # what only the head needs; all layers stay
    if norm_eps is not None:
        for module in encoder.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = norm_eps
    return encoder
