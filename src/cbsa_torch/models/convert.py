"""Official checkpoints to our models: key tables, and sizes read from the shapes.

Known are CBT, CRATE, ToST and hybrids of MSSA and CBSA with the convolutional stem, the original CRATE with its
linear patch embedding, and the decoders of :mod:`cbsa_torch.models.segmentation.official`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from cbsa_torch._core.checks import check_positive_int
from cbsa_torch.models.checkpoint import (
    CheckpointError,
    floating_dtype,
    load_strictly,
    read_tensors,
    save_checkpoint,
    unwrap,
)
from cbsa_torch.models.registry import model_name, sizes_of
from cbsa_torch.models.segmentation.official import is_segmentation, read_segmentation

# Our name to the official one; * is the rest of the name, {} the index of a layer.
_COMMON = {
    "pos_embed": "pos_embedding",
    "cls_token": "cls_token",
    "norm.*": "mlp_head.0.*",
    "head.*": "mlp_head.1.*",
    "blocks.{}.norm1.*": "transformer.layers.{}.0.norm.*",
    "blocks.{}.norm2.*": "transformer.layers.{}.1.norm.*",
    "blocks.{}.ista.weight": "transformer.layers.{}.1.fn.weight",
}
_STEMS = {
    "conv": {"stem.proj.*": "to_patch_embedding.proj.*", "blocks.{}.attn.proj.*": "{}.to_out.*"},
    "linear": {
        "stem.norm1.*": "to_patch_embedding.1.*",
        "stem.proj.*": "to_patch_embedding.2.*",
        "stem.norm2.*": "to_patch_embedding.3.*",
        "blocks.{}.attn.proj.*": "{}.to_out.0.*",
    },
}
_MIXERS = {
    "CBSA": {"step_tokens": "step_x", "step_representatives": "step_rep", "qkv.weight": "proj.weight"},
    "TSSA": {"temperature": "temp", "qkv.weight": "qkv.weight"},
    "MSSA": {"qkv.weight": "qkv.weight"},
}
"""By mixer: our name within ``blocks.{}.attn`` to the official one within ``transformer.layers.{}.0.fn``."""
_RECOGNISED_BY = {"CBSA": "step_x", "TSSA": "temp", "MSSA": "qkv.weight"}
"""A layer's mixer is the first whose parameter here it has."""
_FLATTENED = ("step_x", "step_rep", "temp")
"""Stored as (H, 1, 1) or (H, 1) by the official code."""


def load_official(source: str | Path | Mapping[str, Any], *, num_heads: int | None = None) -> nn.Module:
    """Convert a released checkpoint of the official CBSA code, of DEPICT-SA, or of the original CRATE.

    The kind of every layer (CBSA, MSSA, TSSA), depth, width, classes and image size are read from names and
    shapes; the models are square. CBSA layers pool in the official layout, with which they were trained.
    Segmentation checkpoints (CBT, DEPICT-SA) give a :class:`cbsa_torch.models.Segmenter`; a decoder's weights
    alone give a :class:`cbsa_torch.models.MaskTransformerDecoder`.

    Args:
        source: a ``.pth``, ``.pth.tar`` or ``.safetensors`` file, or a state dict. Files are read as
            tensors only: pickled code is never executed. ``module.`` prefixes are stripped.
        num_heads: of a CRATE of a width that was not published, or a DEPICT whose heads are not of dimension
            100; the shapes of MSSA do not tell it.

    Returns:
        The model in eval mode, in the dtype of the weights.

    Raises:
        FileNotFoundError: no such file. CheckpointError: an unsafe, broken or foreign checkpoint; missing
            and unexpected keys are named, as the official code names them; ``num_heads`` missing or wrong.
    """
    return _read(source, num_heads)[0]


def convert_official(source: str | Path, output: str | Path, *, num_heads: int | None = None) -> dict[str, Any]:
    """Write a released checkpoint as one of ours, for :func:`cbsa_torch.models.load_checkpoint`.

    Returns:
        What the file says about itself: the timm model name and its constructor arguments.
    """
    model, info = read_official(source, num_heads)
    save_checkpoint(output, model, info)
    return info


def read_official(
    source: str | Path | Mapping[str, Any], num_heads: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of :func:`load_official`, and its timm name and arguments as our checkpoints have them."""
    model, info = _read(source, num_heads)
    if info is None:
        raise CheckpointError("this is a decoder without an encoder: load it with load_official")
    return model, info


def _read(
    source: str | Path | Mapping[str, Any], num_heads: int | None
) -> tuple[nn.Module, dict[str, Any] | None]:
    if isinstance(source, Mapping):
        name, official = "the state dict", unwrap(dict(source), "the state dict")
    else:
        name, official = str(source), read_tensors(source)
    if is_segmentation(official):
        return read_segmentation(official, name, num_heads)
    return _read_classifier(official, name, num_heads)


def _read_classifier(
    official: dict[str, Tensor], name: str, num_heads: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    stem = "linear" if "to_patch_embedding.2.weight" in official else "conv"
    mixers = _read_mixers(official, name)
    args = _read_sizes(official, name, stem, mixers, num_heads)
    family, family_args = _family(mixers, stem, name)
    sizes = sizes_of(family)
    size = next(
        (
            s
            for s in sizes
            if (sizes[s].args["embed_dim"], sizes[s].args["depth"]) == (args["embed_dim"], len(mixers))
        ),
        "tiny",
    )
    model_args = {**args, **family_args}
    ours_named = model_name(family, size)
    try:
        model = timm.create_model(ours_named, **model_args, dtype=floating_dtype(official))
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{name} is not an official checkpoint: {error}") from error
    names = {ours: _official_name(ours, stem, mixers) for ours in model.state_dict()}
    missing = [theirs for theirs in names.values() if theirs not in official]
    unexpected = sorted(official.keys() - set(names.values()))
    if missing or unexpected:
        raise CheckpointError(
            f"{name} does not fit {ours_named}: missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    converted = {
        ours: official[theirs].flatten() if theirs.endswith(_FLATTENED) else official[theirs]
        for ours, theirs in names.items()
    }
    load_strictly(model, converted, name)
    return model.eval(), {"model": ours_named, "model_args": model_args}


def _family(mixers: list[str], stem: str, name: str) -> tuple[str, dict[str, Any]]:
    """The registered family with these layers, and the arguments that make it so."""
    kinds = set(mixers)
    first = mixers.count("MSSA")
    if kinds == {"MSSA"}:
        return ("crate_original" if stem == "linear" else "crate"), {}
    args: dict[str, Any] = {"stem": "linear"} if stem == "linear" else {}
    if kinds == {"TSSA"}:
        return "tost", args
    args["layout"] = "official"
    if kinds == {"CBSA"}:
        return "cbt", args
    if mixers == ["MSSA"] * first + ["CBSA"] * (len(mixers) - first):
        return "crate_cbt", {**args, "num_first_layers": first}
    raise CheckpointError(f"{name} has layers {', '.join(mixers)}, in an order that none of our models has")


def _official_name(ours: str, stem: str, mixers: list[str]) -> str:
    for source, target in {**_COMMON, **_STEMS[stem]}.items():
        pattern = re.escape(source).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.+)")
        match = re.fullmatch(pattern, ours)
        if match:
            if target.startswith("{}"):
                target = f"transformer.layers.{{}}.0.fn{target[2:]}"
            for group in match.groups():  # in order of appearance: the index, then the rest
                target = target.replace("{}" if "{}" in target else "*", group, 1)
            return target
    _, index, _, rest = ours.split(".", 3)
    return f"transformer.layers.{index}.0.fn.{_MIXERS[mixers[int(index)]][rest]}"


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return (", ".join(keys[:8]) or "nothing") + more


def _read_mixers(official: dict[str, Tensor], name: str) -> list[str]:
    """The mixer of every layer, by the names of its parameters."""
    layers = {int(m[1]) for key in official if (m := re.match(r"transformer\.layers\.(\d{1,4})\.", key))}
    if layers != set(range(len(layers))):
        raise CheckpointError(f"{name} has layers {sorted(layers)[:8]} ..., not 0 to {len(layers) - 1}")
    mixers = []
    for i in range(len(layers)):
        prefix = f"transformer.layers.{i}.0.fn"
        kind = next((k for k, parameter in _RECOGNISED_BY.items() if f"{prefix}.{parameter}" in official), None)
        if kind is None:
            raise CheckpointError(
                f"{name} is not an official checkpoint: layer {i} has none of "
                + ", ".join(f"{prefix}.{parameter}" for parameter in _RECOGNISED_BY.values())
            )
        mixers.append(kind)
    return mixers


def _read_sizes(
    official: dict[str, Tensor], name: str, stem: str, mixers: list[str], num_heads: int | None
) -> dict[str, Any]:
    """Constructor arguments, from the shapes of tensors."""
    needed = {"pos_embedding": "(1, 1 + tokens, dim)", "mlp_head.1.weight": "(classes, dim)"}
    if stem == "conv":
        needed["to_patch_embedding.proj.0.0.weight"] = "(dim / 8, channels, 3, 3)"
    else:
        needed["to_patch_embedding.2.weight"] = "(dim, channels * patch * patch)"
    for i, mixer in enumerate(mixers):
        prefix = f"transformer.layers.{i}.0.fn"
        needed[f"{prefix}.{_MIXERS[mixer]['qkv.weight']}"] = "(heads * head_dim, dim)"
        for step in _FLATTENED:
            if step in _MIXERS[mixer].values():
                needed[f"{prefix}.{step}"] = "(heads, 1)" if step == "temp" else "(heads, 1, 1)"
    missing = [key for key in needed if key not in official]
    if missing or not mixers:
        raise CheckpointError(
            f"{name} is not an official checkpoint: missing {_some(missing or ['transformer.layers'])}; "
            f"it holds {_some(list(official))}"
        )
    wrong = [
        f"{key} {tuple(official[key].shape)} instead of {shape}"
        for key, shape in needed.items()
        if official[key].ndim != shape.count(",") + 1
        or 0 in official[key].shape
        or (shape.startswith("(heads, 1") and official[key][0].numel() != 1)
    ]
    if wrong:
        raise CheckpointError(f"{name} is not an official checkpoint: {_some(wrong)}")
    _, length, dim = official["pos_embedding"].shape
    side = math.isqrt(length - 1)
    if side * side != length - 1:
        raise CheckpointError(f"{name}: {length - 1} position embeddings are not a square grid")
    if stem == "conv":
        pattern = r"to_patch_embedding\.proj\.\d+\.0\.weight"
        convolutions = sum(bool(re.fullmatch(pattern, key)) for key in official)
        if convolutions < 2:
            raise CheckpointError(f"{name}: the official stems have 3 or 4 convolutions of stride 2, got one")
        patch_size = 2**convolutions
        in_chans = official["to_patch_embedding.proj.0.0.weight"].shape[1]
    else:
        patch_size, in_chans = _patch(official["to_patch_embedding.2.weight"].shape[1], name)
    heads = _read_heads(official, name, stem, mixers, num_heads)
    inner = official[f"transformer.layers.0.0.fn.{_MIXERS[mixers[0]]['qkv.weight']}"].shape[0]
    if inner % heads:
        raise CheckpointError(
            f"{name}: num_heads {heads} does not divide the {inner} channels of its projections"
        )
    return {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": official["mlp_head.1.weight"].shape[0],
        "embed_dim": dim,
        "depth": len(mixers),
        "num_heads": heads,
        "head_dim": inner // heads,
    }


def _patch(patch_dim: int, name: str) -> tuple[int, int]:
    """Patch size and channels (3 or 1) of a linear stem from the number of values in a patch."""
    for in_chans in (3, 1):
        side = math.isqrt(patch_dim // in_chans)
        if side * side * in_chans == patch_dim:
            return side, in_chans
    raise CheckpointError(f"{name}: {patch_dim} values per patch are not a square of 3 or 1 channels")


def _read_heads(official: dict[str, Tensor], name: str, stem: str, mixers: list[str], given: int | None) -> int:
    """Heads from the shapes of CBSA or TSSA layers; of MSSA alone, those of the published widths."""
    if given is not None:
        check_positive_int("num_heads", given)
    layers = [(i, mixer) for i, mixer in enumerate(mixers) if mixer != "MSSA"]
    if layers:
        i, mixer = layers[0]
        heads = official[f"transformer.layers.{i}.0.fn.{_RECOGNISED_BY[mixer]}"].shape[0]
        if given not in (None, heads):
            raise CheckpointError(f"{name} has {heads} heads, not num_heads={given}")
        return heads
    if given is not None:
        return given
    dim = official["pos_embedding"].shape[2]
    family = "crate_original" if stem == "linear" else "crate"
    published = {size.args["embed_dim"]: size.args["num_heads"] for size in sizes_of(family).values()}
    if dim not in published:
        raise CheckpointError(
            f"{name}: the heads of a CRATE of width {dim} cannot be told from its weights; give num_heads"
        )
    return published[dim]
