"""Contract-and-Broadcast Transformers: the paper's sizes, and small ones for small images."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from cbsa_torch._core.checks import nearest
from cbsa_torch.models.whitebox import Mixer, WhiteBoxTransformer
from cbsa_torch.nn import CBSA

__all__: list[str] = []  # the entry points are reached by name, through timm


def _cfg(input_size: tuple[int, int, int] = (3, 224, 224), **kwargs: Any) -> dict[str, Any]:
    grey = input_size[0] == 1
    return {
        "num_classes": 1000,
        "input_size": input_size,
        "pool_size": None,
        "crop_pct": 0.875 if input_size[1] >= 224 else 1.0,
        "interpolation": "bicubic",
        "mean": (0.5,) if grey else IMAGENET_DEFAULT_MEAN,
        "std": (0.5,) if grey else IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj.0.0",
        "classifier": "head",
        "fixed_input_size": False,
        "license": "mit",
        "paper_ids": "arXiv:2509.16875",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "cbt_tiny_patch16_224.untrained": _cfg(),
        "cbt_small_patch16_224.untrained": _cfg(),
        "cbt_base_patch16_224.untrained": _cfg(),
        "cbt_large_patch16_224.untrained": _cfg(),
        "cbt_pico_patch1_8.untrained": _cfg((1, 8, 8), num_classes=10),
        "cbt_nano_patch4_28.untrained": _cfg((1, 28, 28), num_classes=10),
        "cbt_nano_patch4_32.untrained": _cfg((3, 32, 32), num_classes=10),
        "cbt_nano_patch4_64.untrained": _cfg((3, 64, 64), num_classes=10),
    }
)


_MIXER_OPTIONS = ("representatives", "contraction", "eps", "tied", "layout")
"""Options of CBSA, beside num_representatives, that a model takes."""


def _create_cbt(
    variant: str,
    pretrained: bool = False,
    *,
    num_representatives: int = 64,
    mixer: Mixer | Sequence[Mixer] | None = None,
    **kwargs: Any,
) -> WhiteBoxTransformer:
    """Build a CBT; the options of CBSA in ``_MIXER_OPTIONS`` go to the default mixer."""
    _check_names(kwargs)
    options = {name: kwargs.pop(name) for name in _MIXER_OPTIONS if name in kwargs}
    if mixer is None:
        mixer = functools.partial(CBSA, num_representatives=num_representatives, **options)
    elif options:
        raise ValueError(
            f"{', '.join(options)} cannot be given beside mixer; put them into a functools.partial"
        )
    return build_model_with_cfg(
        WhiteBoxTransformer,
        variant,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        mixer=mixer,
        **kwargs,
    )


def _check_names(kwargs: dict[str, Any]) -> None:
    """Suggest the nearest name for a misspelt option; what is none of ours is timm's to judge."""
    ours = {*inspect.signature(WhiteBoxTransformer).parameters, "num_representatives", *_MIXER_OPTIONS}
    timms = {*inspect.signature(build_model_with_cfg).parameters, "cache_dir", "features_only", "out_indices"}
    for name in kwargs.keys() - ours - timms:
        suggestion = nearest(name, ours)
        if suggestion:
            raise TypeError(f"unexpected option {name!r}{suggestion}")


@register_model
def cbt_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> WhiteBoxTransformer:
    """CBT-T: 1.8 M parameters."""
    model_args = {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3}
    return _create_cbt("cbt_tiny_patch16_224", pretrained, **{**model_args, **kwargs})


@register_model
def cbt_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> WhiteBoxTransformer:
    """CBT-S: 6.7 M parameters."""
    model_args = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    return _create_cbt("cbt_small_patch16_224", pretrained, **{**model_args, **kwargs})


@register_model
def cbt_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> WhiteBoxTransformer:
    """CBT-B: 25.7 M parameters."""
    model_args = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
    return _create_cbt("cbt_base_patch16_224", pretrained, **{**model_args, **kwargs})


@register_model
def cbt_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> WhiteBoxTransformer:
    """CBT-L: 83.1 M parameters."""
    model_args = {"patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}
    return _create_cbt("cbt_large_patch16_224", pretrained, **{**model_args, **kwargs})


@register_model
def cbt_pico_patch1_8(pretrained: bool = False, **kwargs: Any) -> WhiteBoxTransformer:
    """For 8x8 grey images: every pixel is a token (64), 16 representatives."""
    model_args = {"img_size": 8, "patch_size": 1, "in_chans": 1, "num_classes": 10}
    model_args |= {"embed_dim": 96, "depth": 4, "num_heads": 4, "num_representatives": 16}
    return _create_cbt("cbt_pico_patch1_8", pretrained, **{**model_args, **kwargs})


def _nano(
    variant: str, pretrained: bool, img_size: int, in_chans: int, args: dict[str, Any]
) -> WhiteBoxTransformer:
    model_args = {"img_size": img_size, "patch_size": 4, "in_chans": in_chans, "num_classes": 10}
    model_args |= {"embed_dim": 128, "depth": 6, "num_heads": 4, "num_representatives": 16}
    return _create_cbt(variant, pretrained, **{**model_args, **args})


@register_model
def cbt_nano_patch4_28(pretrained: bool = False, **kwargs: Any) -> WhiteBoxTransformer:
    """For 28x28 grey images: 49 tokens, 16 representatives."""
    return _nano("cbt_nano_patch4_28", pretrained, 28, 1, kwargs)


@register_model
def cbt_nano_patch4_32(pretrained: bool = False, **kwargs: Any) -> WhiteBoxTransformer:
    """For 32x32 colour images: 64 tokens, 16 representatives."""
    return _nano("cbt_nano_patch4_32", pretrained, 32, 3, kwargs)


@register_model
def cbt_nano_patch4_64(pretrained: bool = False, **kwargs: Any) -> WhiteBoxTransformer:
    """For 64x64 colour images: 256 tokens, 16 representatives."""
    return _nano("cbt_nano_patch4_64", pretrained, 64, 3, kwargs)
