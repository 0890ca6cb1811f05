"""The models registered with timm: every family in every size, FAMILY_SIZE.

A family is a token mixer (and what goes with it), a size is what the paper calls T, S, B or L, or one of ours
for small images. All are the one :class:`WhiteBoxTransformer`.

Examples:
    >>> import timm
    >>> import cbsa_torch.models  # registers them
    >>> len(timm.list_models("cbt_*")), timm.create_model("crate_pico_patch1_8").num_classes
    (8, 10)
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import nn

from cbsa_torch._core.checks import nearest
from cbsa_torch.models.resize import fit_positions
from cbsa_torch.models.shipped import SHIPPED, Shipped
from cbsa_torch.models.whitebox import Mixer, WhiteBoxTransformer
from cbsa_torch.nn import CBSA, MHSA, MSSA, TSSA, AgentAttention, LinearCBSA, TokenMixer

__all__: list[str] = []  # the entry points are reached by name, through timm


@dataclass(frozen=True)
class Family:
    """One token mixer in all layers, or two of them."""

    summary: str
    mixer: type[TokenMixer]
    first: type[TokenMixer] | None = None
    """The mixer of the first ``num_first_layers`` layers (default: half of them) of a hybrid."""
    defaults: dict[str, Any] = field(default_factory=dict)
    """Options of the mixer that differ from its own defaults."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model that differ from its own defaults."""
    paper: str = "2509.16875"
    """The arXiv number of what it implements."""


_SET_BY_MODEL = {
    *("head_dim", "num_prefix_tokens", "grid_size", "channels_first"),
    *("attn_head_dim", "dim_out", "gated", "device", "dtype"),
}
"""Arguments of mixers that a model sets itself or has no use for."""
_NEVER_TAKEN: dict[type[TokenMixer], set[str]] = {
    MHSA: {"tied", "orthogonal"},  # has three projections: for queries, for keys, for values
    MSSA: {"qk_norm"},  # these have one for all three
    TSSA: {"qk_norm"},
    LinearCBSA: {"qk_norm"},
}
"""Options of every mixer that one of them refuses whatever their value; the layers of a hybrid may differ."""


@functools.cache
def mixer_options(mixer: type[TokenMixer]) -> frozenset[str]:
    """Options of a mixer that its models take as arguments of their own: those in its signature."""
    # of all mixers, but qkv: a mixer that offers that choice names it itself
    shared = _keyword_only(TokenMixer) - {"qkv"} - _NEVER_TAKEN.get(mixer, set())
    if not mixer.compares_tokens:
        shared -= {"attn_drop"}
    return frozenset((_keyword_only(mixer) | shared) - _SET_BY_MODEL)


def _keyword_only(mixer: type[Any]) -> set[str]:
    parameters = inspect.signature(mixer).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


FAMILIES = {
    "cbt": Family("Contract-and-Broadcast Transformer: CBSA (Eq. 8)", CBSA),
    "linear_cbt": Family("linear attention along principal directions (Eq. 12)", LinearCBSA),
    "crate": Family("CRATE with this stem: MSSA (Eq. 9)", MSSA, paper="2306.01129"),
    "crate_cbt": Family("hybrid: MSSA in the first layers, then CBSA", CBSA, first=MSSA),
    "tost": Family("ToST with this stem: TSSA", TSSA, paper="2412.17810"),
    "agent": Family(
        "agent attention with one shared projection",
        AgentAttention,
        defaults={"qkv": "shared"},
        paper="2312.08874",
    ),
    "stem_vit": Family(
        "ViT with this stem: softmax attention and an MLP, the black-box baseline",
        MHSA,
        defaults={"qkv_bias": True},
        model_args={"mlp_ratio": 4.0},
        paper="2010.11929",
    ),
    "crate_original": Family(
        "CRATE with its own sizes and linear patch embedding",
        MSSA,
        model_args={"stem": "linear"},
        paper="2306.01129",
    ),
}


@dataclass(frozen=True)
class Size:
    """Width and depth, and the images a model is made for."""

    suffix: str
    input_size: tuple[int, int, int]
    num_classes: int
    args: dict[str, Any]
    mixer_defaults: dict[str, Any] = field(default_factory=dict)
    """Options of the mixer, for mixers that have them."""


def _imagenet(embed_dim: int, depth: int, num_heads: int) -> Size:
    args = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "patch_size": 16}
    return Size("patch16_224", (3, 224, 224), 1000, args)


def _small(side: int, in_chans: int, patch_size: int, embed_dim: int, depth: int) -> Size:
    args = {"embed_dim": embed_dim, "depth": depth, "num_heads": 4, "patch_size": patch_size}
    args |= {"img_size": side, "in_chans": in_chans}
    # A quarter of the 64 tokens of 8x8 or 32x32 pixels.
    return Size(f"patch{patch_size}_{side}", (in_chans, side, side), 10, args, {"num_representatives": 16})


SIZES = {
    "tiny": _imagenet(192, 12, 3),
    "small": _imagenet(384, 12, 6),
    "base": _imagenet(768, 12, 12),
    "large": _imagenet(1024, 24, 16),
    "pico": _small(8, 1, 1, 96, 4),  # every pixel is a token
    "nano_28": _small(28, 1, 4, 128, 6),
    "nano_32": _small(32, 3, 4, 128, 6),
    "nano_64": _small(64, 3, 4, 128, 6),
}
CRATE_ORIGINAL_SIZES = {
    "tiny": _imagenet(384, 12, 6),
    "small": _imagenet(576, 12, 12),
    "base": _imagenet(768, 12, 12),
    "large": _imagenet(1024, 24, 16),
}


def sizes_of(family: str) -> dict[str, Size]:
    """The sizes a family is registered in."""
    return CRATE_ORIGINAL_SIZES if family == "crate_original" else SIZES


def model_name(family: str, size: str) -> str:
    """E.g. ``cbt_tiny_patch16_224``, ``cbt_nano_patch4_28``."""
    return f"{family}_{size.split('_', maxsplit=1)[0]}_{sizes_of(family)[size].suffix}"


def _cfg(family: Family, size: Size) -> dict[str, Any]:
    grey = size.input_size[0] == 1
    return {
        "num_classes": size.num_classes,
        "input_size": size.input_size,
        "pool_size": None,
        "crop_pct": 0.875 if size.input_size[1] >= 224 else 1.0,
        "interpolation": "bicubic",
        "mean": (0.5,) if grey else IMAGENET_DEFAULT_MEAN,
        "std": (0.5,) if grey else IMAGENET_DEFAULT_STD,
        # a linear stem has none that timm could adapt to other channels
        "first_conv": () if family.model_args.get("stem") == "linear" else "stem.proj.0.0",
        "classifier": "head",
        "fixed_input_size": False,
        "license": "mit",
        "paper_ids": f"arXiv:{family.paper}",
    }


_CFGS = {
    model_name(family, size): _cfg(FAMILIES[family], spec)
    for family in FAMILIES
    for size, spec in sizes_of(family).items()
}
default_cfgs = generate_default_cfgs(
    {name: _CFGS[weights.architecture] | weights.timm_config() for name, weights in SHIPPED.items()}
    # the star, last: a name without a tag is the architecture as it is, whichever tags have weights
    | {f"{name}.untrained*": cfg for name, cfg in _CFGS.items()}
)


def _create(
    variant: str,
    family: Family,
    pretrained: bool,
    mixer_defaults: dict[str, Any],
    *,
    mixer: Mixer | Sequence[Mixer] | None = None,
    num_first_layers: int | None = None,
    **model_args: Any,
) -> WhiteBoxTransformer:
    """Build a model; options of its mixer go to the mixer."""
    shipped = _shipped(variant, pretrained, model_args)
    if shipped is not None:
        if pretrained:
            _check_form(shipped, {"mixer": mixer, **model_args})
        model_args = {**({} if mixer is not None else shipped.form), **model_args}
    names = mixer_options(family.mixer) | (mixer_options(family.first) if family.first else set())
    _check_names(model_args, names)
    own = {name: model_args.pop(name) for name in names if name in model_args}
    if mixer is not None:
        given = [*own, *(["num_first_layers"] if num_first_layers is not None else [])]
        if given:
            raise ValueError(
                f"{', '.join(given)} cannot be given beside mixer; put them into a functools.partial"
            )
    else:
        depth = model_args["depth"]
        first = _number_of_first_layers(family, num_first_layers, depth)
        mixers = [family.first or family.mixer] * first + [family.mixer] * (depth - first)
        if own.get("representatives", "pool") not in ("pool", "learned"):
            mixer_defaults = {k: v for k, v in mixer_defaults.items() if k != "num_representatives"}
        mixer = [functools.partial(m, **_select(m, {**mixer_defaults, **own})) for m in mixers]
    return build_model_with_cfg(
        WhiteBoxTransformer,
        variant,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        pretrained_filter_fn=fit_positions,
        mixer=mixer,
        **model_args,
    )


def build_entry(
    name: str,
    build: Callable[[], nn.Module],
    pretrained: bool,
    *,
    gives: str = "",
    channels: int | None = None,
    **timm_args: Any,
) -> Any:
    """``build_model_with_cfg`` of an entry point that has read its own arguments, and refuses all others.

    Args:
        name: of the entry point.
        build: makes the model.
        pretrained: whether timm loads its weights.
        gives: what the model gives in place of feature maps, which ``features_only`` would ask for.
        channels: those of the images, where pretrained weights are to be adapted to them.
        **timm_args: of ``build_model_with_cfg``; what that does not know is refused.
    """
    if gives and timm_args.get("features_only"):
        raise ValueError(f"features_only must be False: {name} gives {gives}")

    def make(**unknown: Any) -> nn.Module:
        if channels is not None:
            unknown.pop("in_chans", None)
        if unknown:
            raise TypeError(f"{name} has no option {', '.join(sorted(unknown))}")
        return build()

    _shipped(name, pretrained, timm_args)
    # timm passes these defaults of the configuration on; the entry point has read its own already
    defaults = ["num_classes", "global_pool", "in_chans"]
    if channels is not None:
        timm_args["in_chans"] = channels
        defaults.remove("in_chans")
    return build_model_with_cfg(make, name, pretrained, kwargs_filter=tuple(defaults), **timm_args)


def _shipped(name: str, pretrained: bool, timm_args: Mapping[str, Any]) -> Shipped | None:
    """The weights of the package that a model was asked for by its tag.

    Args:
        name: of the architecture.
        pretrained: whether there must be weights, these or others.
        timm_args: with ``pretrained_cfg``, by which timm says the tag.

    Raises:
        RuntimeError: there are none, as timm raises it.
    """
    given = [timm_args.get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay")]
    cfg = resolve_pretrained_cfg(name, *given)
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise RuntimeError(
            f"pretrained=True: there are no trained weights of {name}. With the package come those of "
            f"{', '.join(SHIPPED)}; cbsa_torch.models.from_pretrained opens others (the authors' checkpoints, "
            "runs of cbsa train, the Hugging Face Hub); pretrained=False makes an untrained model"
        )
    return SHIPPED.get(f"{name}.{cfg.tag}")


def _check_form(weights: Shipped, given: Mapping[str, Any]) -> None:
    """Refuse arguments with which weights would be loaded into another model than they were trained in."""
    if given["mixer"] is not None:
        raise ValueError(f"mixer must be left out beside the weights {weights.name}, which are of their own")
    for name, value in weights.form.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"{name} must be {value!r} or left out beside the weights {weights.name}, which were trained "
                f"with it; got {given[name]!r}"
            )


def _number_of_first_layers(family: Family, given: int | None, depth: int) -> int:
    if family.first is None:
        if given is not None:
            raise TypeError(
                "num_first_layers must be left out: it splits a hybrid, and all layers have one mixer here"
            )
        return 0
    number = depth // 2 if given is None else given
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= depth:
        raise ValueError(f"num_first_layers must be an int from 0 to depth={depth}, got {given!r}")
    return number


def _select(mixer: type[TokenMixer], options: dict[str, Any]) -> dict[str, Any]:
    """The options that are the mixer's; a module among them is copied, for every layer owns its parts."""
    own = {name: value for name, value in options.items() if name in mixer_options(mixer)}
    return {k: copy.deepcopy(v) if isinstance(v, nn.Module) else v for k, v in own.items()}


def _check_names(given: dict[str, Any], options: frozenset[str]) -> None:
    """Refuse options of other mixers and misspelt ones; names unlike all of ours are left to timm."""
    ours = {*inspect.signature(WhiteBoxTransformer).parameters, *options}
    timms = {*inspect.signature(build_model_with_cfg).parameters, "cache_dir", "features_only", "out_indices"}
    others = {name for family in FAMILIES.values() for name in mixer_options(family.mixer)} - ours
    for name in given.keys() - ours - timms:
        if name in others:
            raise TypeError(f"unexpected option {name!r}: the mixer of this model has none")
        suggestion = nearest(name, ours)
        if suggestion:
            raise TypeError(f"unexpected option {name!r}{suggestion}")


def _register(family_name: str, size_name: str) -> None:
    family, size = FAMILIES[family_name], sizes_of(family_name)[size_name]
    name = model_name(family_name, size_name)
    model_args = {**size.args, **family.model_args}
    mixer_defaults = {**size.mixer_defaults, **family.defaults}

    def build(pretrained: bool = False, **kwargs: Any) -> WhiteBoxTransformer:
        return _create(name, family, pretrained, mixer_defaults, **{**model_args, **kwargs})

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{family.summary}; size {size_name}."
    setattr(sys.modules[__name__], name, register_model(build))


def names() -> dict[str, str]:
    """Every registered model and what it is."""
    return {
        model_name(family, size): FAMILIES[family].summary for family in FAMILIES for size in sizes_of(family)
    }


for _family in FAMILIES:
    for _size in sizes_of(_family):
        _register(_family, _size)
