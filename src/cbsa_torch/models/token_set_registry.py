"""The models of sets of features that are registered with timm, ``token_set_FAMILY_SIZE``."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from typing import Any

from timm.models import generate_default_cfgs, register_model

from cbsa_torch.models.registry import FAMILIES, Family, build_entry, mixer_options
from cbsa_torch.models.token_set import TokenSetTransformer

_SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
"""Width and heads; all have four layers."""
_FAMILIES = {
    **{name: FAMILIES[name] for name in ("cbt", "agent", "linear_cbt", "tost", "crate")},
    "vit": FAMILIES["stem_vit"],
}
"""By the part of the name: mixer, its options, arguments of the model."""
_SUMMARIES = {
    "cbt": "sets of features: CBSA (Eq. 8) with steps in tokens per representative",
    "agent": "sets of features: agent attention with one shared projection",
    "linear_cbt": "sets of features: linear attention along principal directions (Eq. 12)",
    "tost": "sets of features: TSSA",
    "crate": "sets of features: MSSA (Eq. 9), every token with every other",
    "vit": "sets of features: softmax attention and an MLP, the black-box baseline",
}
_OWN = frozenset(inspect.signature(TokenSetTransformer).parameters) - {"mixer_args", "mixer"}

default_cfgs = generate_default_cfgs(
    {
        f"token_set_{family}_{size}.untrained": {
            "num_classes": 2,
            "input_size": None,
            "pool_size": None,
            "crop_pct": 1.0,
            "first_conv": None,
            "classifier": "head",
            "fixed_input_size": False,
            "license": "mit",
            "paper_ids": f"arXiv:{spec.paper}",
        }
        for family, spec in _FAMILIES.items()
        for size in _SIZES
    }
)


def token_set_names() -> dict[str, str]:
    """Every registered model of sets of features and what it is."""
    return {f"token_set_{family}_{size}": summary for family, summary in _SUMMARIES.items() for size in _SIZES}


def _create(
    name: str, family: Family, pretrained: bool, sizes: Mapping[str, Any], given: Mapping[str, Any]
) -> TokenSetTransformer:
    """A registered model: its own arguments, those of its mixer, and timm's."""
    options = mixer_options(family.mixer)
    own = {**sizes, **family.model_args, **{k: v for k, v in given.items() if k in _OWN}}
    mixer_args = {**family.defaults, **{k: v for k, v in given.items() if k in options - _OWN}}
    others = {k: v for k, v in given.items() if k not in options | _OWN}
    if "in_dim" not in own:
        raise TypeError(f"{name} needs in_dim, the width of the features")

    def build() -> TokenSetTransformer:
        return TokenSetTransformer(**own, mixer=family.mixer, **mixer_args)

    model: TokenSetTransformer = build_entry(name, build, pretrained, gives="one vector for each set", **others)
    model.pretrained_cfg["num_classes"] = model.num_classes  # type: ignore[index, operator]
    return model


def _register(family_name: str, size: str) -> None:
    name, family, (dim, num_heads) = f"token_set_{family_name}_{size}", _FAMILIES[family_name], _SIZES[size]
    sizes = {"dim": dim, "depth": 4, "num_heads": num_heads}

    def build(pretrained: bool = False, **kwargs: Any) -> TokenSetTransformer:
        return _create(name, family, pretrained, sizes, kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"{token_set_names()[name]}; size {size}."
    setattr(sys.modules[__name__], name, register_model(build))


for _family in _FAMILIES:
    for _size in _SIZES:
        _register(_family, _size)
