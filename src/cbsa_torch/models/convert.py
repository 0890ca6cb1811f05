"""Official checkpoints to our models: key tables, and sizes read from the shapes.

Known are CBT, CRATE, ToST and hybrids of MSSA and CBSA with the convolutional stem, the original CRATE with its
linear patch embedding, and the decoders of :mod:`cbsa_torch.models.segmentation.official`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from cbsa_torch.models.checkpoint import CheckpointError, read_tensors, save_checkpoint, unwrap
from cbsa_torch.models.official import (
    PER_HEAD,
    build_and_load,
    check_shapes,
    choose_heads,
    count_layers,
    grid_side,
)
from cbsa_torch.models.registry import model_name, sizes_of
from cbsa_torch.models.segmentation.official import is_segmentation, read_segmentation

# Our name to the official one.
_COMMON = {
    r"pos_embed": r"pos_embedding",
    r"cls_token": r"cls_token",
    r"norm\.(.+)": r"mlp_head.0.\1",
    r"head\.(.+)": r"mlp_head.1.\1",
    r"blocks\.(\d+)\.norm1\.(.+)": r"transformer.layers.\1.0.norm.\2",
    r"blocks\.(\d+)\.norm2\.(.+)": r"transformer.layers.\1.1.norm.\2",
    r"blocks\.(\d+)\.ista\.weight": r"transformer.layers.\1.1.fn.weight",
}
_STEMS = {
    "conv": {
        r"stem\.proj\.(.+)": r"to_patch_embedding.proj.\1",
        r"blocks\.(\d+)\.attn\.proj\.(.+)": r"transformer.layers.\1.0.fn.to_out.\2",
    },
    "linear": {
        r"stem\.norm1\.(.+)": r"to_patch_embedding.1.\1",
        r"stem\.proj\.(.+)": r"to_patch_embedding.2.\1",
        r"stem\.norm2\.(.+)": r"to_patch_embedding.3.\1",
        r"blocks\.(\d+)\.attn\.proj\.(.+)": r"transformer.layers.\1.0.fn.to_out.0.\2",
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
            100; the shapes of MSSA do not tell it. Default: what names and shapes tell.

    Returns:
        The model in eval mode, in the dtype of the weights.

    Raises:
        FileNotFoundError: no such file. CheckpointError: an unsafe, broken or foreign checkpoint; missing
            and unexpected keys are named, as the official code names them; ``num_heads`` missing or wrong.

    Examples:
        >>> from cbsa_torch.models import load_official
        >>> model = load_official("released.pth")
        >>> model.num_classes, model(torch.randn(1, 3, 64, 64)).shape
        (5, torch.Size([1, 5]))
    """
    return _read(*_tensors_of(source), num_heads)[0]


def convert_official(source: str | Path, output: str | Path, *, num_heads: int | None = None) -> dict[str, Any]:
    """Write a released checkpoint as one of ours, for :func:`cbsa_torch.models.load_checkpoint`.

    Returns:
        What the file says about itself: the timm model name and its constructor arguments.
    """
    model, info = read_official(read_tensors(source), str(source), num_heads)
    save_checkpoint(output, model, info)
    return info


def is_official(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the names of the official code."""
    return is_segmentation(tensors) or any(
        key.startswith(("to_patch_embedding.", "transformer.layers.", "mlp_head.")) for key in tensors
    )


def read_official(
    official: dict[str, Tensor], source: str, num_heads: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of :func:`load_official`, and its timm name and arguments as our checkpoints have them."""
    model, info = _read(official, source, num_heads)
    if info is None:
        raise CheckpointError("this is a decoder without an encoder: load it with load_official")
    return model, info


def _tensors_of(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
    """A state dict, and what to call it in messages."""
    if isinstance(source, Mapping):
        return unwrap(dict(source), "the state dict"), "the state dict"
    return read_tensors(source), str(source)


def _read(
    official: dict[str, Tensor], source: str, num_heads: int | None
) -> tuple[nn.Module, dict[str, Any] | None]:
    if is_segmentation(official):
        return read_segmentation(official, source, num_heads)
    return _read_classifier(official, source, num_heads)


def _read_classifier(
    official: dict[str, Tensor], source: str, num_heads: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    stem = "linear" if "to_patch_embedding.2.weight" in official else "conv"
    mixers = _read_mixers(official, source)
    family, family_args = _family(mixers, stem, source)
    args = _read_sizes(official, source, stem, mixers, num_heads, family) | family_args
    sizes = sizes_of(family).items()
    alike = (name for name, size in sizes if all(size.args[key] == args[key] for key in ("embed_dim", "depth")))
    name = model_name(family, next(alike, "tiny"))
    table = _COMMON | _STEMS[stem]
    for i, mixer in enumerate(mixers):
        table |= {
            rf"blocks\.{i}\.attn\.{ours}": f"{_within(i)}.{theirs}" for ours, theirs in _MIXERS[mixer].items()
        }
    model = build_and_load(partial(timm.create_model, name, **args), official, table, source)
    return model, {"model": name, "model_args": args}


def _within(i: int) -> str:
    """Where the official code keeps the mixer of a layer."""
    return f"transformer.layers.{i}.0.fn"


def _read_mixers(official: dict[str, Tensor], source: str) -> list[str]:
    mixers = []
    for i in range(count_layers(official, "transformer.layers.", source)):
        told_by = {f"{_within(i)}.{parameter}": kind for kind, parameter in _RECOGNISED_BY.items()}
        kinds = [kind for key, kind in told_by.items() if key in official]
        if not kinds:
            raise CheckpointError(
                f"{source} is not an official checkpoint: layer {i} has none of {', '.join(told_by)}"
            )
        mixers.append(kinds[0])
    return mixers


def _family(mixers: list[str], stem: str, source: str) -> tuple[str, dict[str, Any]]:
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
    raise CheckpointError(f"{source} has layers {', '.join(mixers)}, in an order that none of our models has")


def _read_sizes(
    official: dict[str, Tensor], source: str, stem: str, mixers: list[str], num_heads: int | None, family: str
) -> dict[str, Any]:
    patches = "to_patch_embedding.2.weight" if stem == "linear" else "to_patch_embedding.proj.0.0.weight"
    needed = {"pos_embedding": "(1, tokens, dim)", "mlp_head.1.weight": "(classes, dim)"}
    needed[patches] = "(dim, channels * patch * patch)" if stem == "linear" else "(dim / 8, channels, 3, 3)"
    for i, mixer in enumerate(mixers):
        for theirs in _MIXERS[mixer].values():
            per_head = "(heads, 1)" if theirs == "temp" else "(heads, 1, 1)"
            needed[f"{_within(i)}.{theirs}"] = per_head if theirs in PER_HEAD else "(heads * head_dim, dim)"
    check_shapes(official, needed, source)
    if stem == "linear":
        patch_size, in_chans = _patch(official[patches].shape[1], source)
    else:
        pattern = r"to_patch_embedding\.proj\.\d+\.0\.weight"
        convolutions = sum(bool(re.fullmatch(pattern, key)) for key in official)
        if convolutions < 2:
            raise CheckpointError(f"{source}: the official stems have 3 or 4 convolutions of stride 2, got one")
        patch_size, in_chans = 2**convolutions, official[patches].shape[1]
    _, length, dim = official["pos_embedding"].shape
    inner = official[f"{_within(0)}.{_MIXERS[mixers[0]]['qkv.weight']}"].shape[0]
    telling = [f"{_within(i)}.{_RECOGNISED_BY[mixer]}" for i, mixer in enumerate(mixers) if mixer != "MSSA"]
    told = official[telling[0]].shape[0] if telling else None  # the shapes of MSSA do not tell
    published = {size.args["embed_dim"]: size.args["num_heads"] for size in sizes_of(family).values()}
    heads = choose_heads(source, inner, told=told, given=num_heads, usual=published.get(dim))
    return {
        "img_size": grid_side(length - 1, source) * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": official["mlp_head.1.weight"].shape[0],
        "embed_dim": dim,
        "depth": len(mixers),
        "num_heads": heads,
        "head_dim": inner // heads,
    }


def _patch(patch_dim: int, source: str) -> tuple[int, int]:
    """Patch size and channels (3 or 1) of a linear stem from the number of values in a patch."""
    for in_chans in (3, 1):
        side = math.isqrt(patch_dim // in_chans)
        if side * side * in_chans == patch_dim:
            return side, in_chans
    raise CheckpointError(f"{source}: {patch_dim} values per patch are not a square of 3 or 1 channels")
