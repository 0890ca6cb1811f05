"""Official checkpoints to our models: one key table per family, sizes read from the shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from cbsa_torch.models.checkpoint import (
    CheckpointError,
    floating_dtype,
    load_strictly,
    read_tensors,
    save_checkpoint,
    unwrap,
)
from cbsa_torch.models.whitebox import WhiteBoxTransformer

# (official key, our key); {} is a layer index, * the rest of the name.
_COMMON = (
    ("pos_embedding", "pos_embed"),
    ("cls_token", "cls_token"),
    ("to_patch_embedding.proj.*", "stem.proj.*"),
    ("mlp_head.0.*", "norm.*"),
    ("mlp_head.1.*", "head.*"),
    ("transformer.layers.{}.0.norm.*", "blocks.{}.norm1.*"),
    ("transformer.layers.{}.1.norm.*", "blocks.{}.norm2.*"),
    ("transformer.layers.{}.1.fn.weight", "blocks.{}.ista.weight"),
)
_CBSA = (
    ("transformer.layers.{}.0.fn.step_x", "blocks.{}.attn.step_tokens"),
    ("transformer.layers.{}.0.fn.step_rep", "blocks.{}.attn.step_representatives"),
    ("transformer.layers.{}.0.fn.proj.weight", "blocks.{}.attn.qkv.weight"),
    ("transformer.layers.{}.0.fn.to_out.*", "blocks.{}.attn.proj.*"),
)
_NAMES = {(192, 12): "tiny", (384, 12): "small", (768, 12): "base", (1024, 24): "large"}


def load_official(source: str | Path | Mapping[str, Any]) -> WhiteBoxTransformer:
    """Convert a released CBT checkpoint of the official code.

    Depth, width, heads, classes and image size are read from the shapes (the official models are square).
    The pooling follows the official layout, with which these weights were trained.

    Args:
        source: a ``.pth``, ``.pth.tar`` or ``.safetensors`` file, or a state dict. Files are read as
            tensors only: pickled code is never executed. ``module.`` prefixes are stripped.

    Returns:
        The model in eval mode, in the dtype of the weights.

    Raises:
        FileNotFoundError: no such file. CheckpointError: an unsafe, broken or foreign checkpoint; missing
            and unexpected keys are named, as the official code names them.
    """
    return _convert(source)[0]


def convert_official(source: str | Path, output: str | Path) -> dict[str, Any]:
    """Write a released checkpoint as one of ours, for :func:`cbsa_torch.models.load_checkpoint`.

    Returns:
        What the file says about itself: the timm model name and its constructor arguments.
    """
    model, info = _convert(source)
    save_checkpoint(output, model, info)
    return info


def _convert(source: str | Path | Mapping[str, Any]) -> tuple[WhiteBoxTransformer, dict[str, Any]]:
    if isinstance(source, Mapping):
        name, official = "the state dict", unwrap(dict(source), "the state dict")
    else:
        name, official = str(source), read_tensors(source)
    sizes = _read_sizes(official, name)
    size = _NAMES.get((sizes["embed_dim"], sizes["depth"]), "tiny")
    model_name, model_args = f"cbt_{size}_patch16_224", {**sizes, "layout": "official"}
    try:
        model = timm.create_model(model_name, **model_args, dtype=floating_dtype(official))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{name} is not an official CBT checkpoint: {error}") from error
    pairs = [(_translate(ours, _COMMON + _CBSA, back=True), ours) for ours in model.state_dict()]
    missing = [theirs for theirs, _ in pairs if theirs not in official]
    unexpected = sorted(official.keys() - {theirs for theirs, _ in pairs})
    if missing or unexpected:
        raise CheckpointError(
            f"{name} does not fit {model_name}: missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    # official step sizes are (H, 1, 1)
    converted = {o: official[t].flatten() if ".step_" in o else official[t] for t, o in pairs}
    load_strictly(model, converted, name)
    return model.eval(), {"model": model_name, "model_args": model_args}


def _translate(key: str, table: tuple[tuple[str, str], ...], *, back: bool = False) -> str:
    """Rename a key by the table (``back``: from ours to the official name)."""
    for pair in table:
        source, target = reversed(pair) if back else pair
        pattern = re.escape(source).replace(r"\{\}", r"(\d+)").replace(r"\*", "(.+)")
        match = re.fullmatch(pattern, key)
        if match:
            for group in match.groups():  # in order of appearance: the index, then the rest
                target = target.replace("{}" if "{}" in target else "*", group, 1)
            return target
    raise KeyError(key)


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return (", ".join(keys[:8]) or "nothing") + more


def _read_sizes(official: dict[str, Tensor], name: str) -> dict[str, Any]:
    """Constructor arguments from the shapes of the tensors that determine them."""
    needed = {
        "pos_embedding": "(1, 1 + tokens, dim)",
        "transformer.layers.0.0.fn.step_x": "(heads, 1, 1)",
        "transformer.layers.0.0.fn.proj.weight": "(heads * head_dim, dim)",
        "to_patch_embedding.proj.0.0.weight": "(dim / 8, channels, 3, 3)",
        "mlp_head.1.weight": "(classes, dim)",
    }
    missing = [key for key in needed if key not in official]
    if missing:
        raise CheckpointError(
            f"{name} is not an official CBT checkpoint: missing {_some(missing)}; "
            f"it holds {_some(list(official))}"
        )
    wrong = [
        f"{key} {tuple(official[key].shape)} instead of {shape}"
        for key, shape in needed.items()
        if official[key].ndim != shape.count(",") + 1 or 0 in official[key].shape
    ]
    if wrong:
        raise CheckpointError(f"{name} is not an official CBT checkpoint: {'; '.join(wrong)}")
    _, length, dim = official["pos_embedding"].shape
    layers = {int(m[1]) for key in official if (m := re.match(r"transformer\.layers\.(\d+)\.", key))}
    if layers != set(range(len(layers))):
        raise CheckpointError(f"{name} has layers {sorted(layers)[:8]} ..., not 0 to {len(layers) - 1}")
    convolutions = sum(bool(re.fullmatch(r"to_patch_embedding\.proj\.\d+\.0\.weight", k)) for k in official)
    side = math.isqrt(length - 1)
    if side * side != length - 1:
        raise CheckpointError(f"{name}: {length - 1} position embeddings are not a square grid")
    heads = official["transformer.layers.0.0.fn.step_x"].shape[0]
    return {
        "img_size": side * 2**convolutions,
        "patch_size": 2**convolutions,
        "in_chans": official["to_patch_embedding.proj.0.0.weight"].shape[1],
        "num_classes": official["mlp_head.1.weight"].shape[0],
        "embed_dim": dim,
        "depth": len(layers),
        "num_heads": heads,
        "head_dim": official["transformer.layers.0.0.fn.proj.weight"].shape[0] // heads,
    }
