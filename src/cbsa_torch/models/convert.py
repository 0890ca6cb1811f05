"""Official checkpoints to our models: one key table per family, sizes read from the shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from cbsa_torch.models.checkpoint import CheckpointError, load_strictly, read_tensors, save_checkpoint, unwrap
from cbsa_torch.models.whitebox import WhiteBoxTransformer

# Official key (as a regular expression) -> ours. Groups carry indices.
_STEM_AND_HEAD = {
    r"pos_embedding": "pos_embed",
    r"cls_token": "cls_token",
    r"to_patch_embedding\.(proj\..*)": r"stem.\1",
    r"mlp_head\.0\.(weight|bias)": r"norm.\1",
    r"mlp_head\.1\.(weight|bias)": r"head.\1",
    r"transformer\.layers\.(\d+)\.0\.norm\.(weight|bias)": r"blocks.\1.norm1.\2",
    r"transformer\.layers\.(\d+)\.1\.norm\.(weight|bias)": r"blocks.\1.norm2.\2",
    r"transformer\.layers\.(\d+)\.1\.fn\.weight": r"blocks.\1.ista.weight",
}
_CBSA = {
    r"transformer\.layers\.(\d+)\.0\.fn\.step_x": r"blocks.\1.attn.step_tokens",
    r"transformer\.layers\.(\d+)\.0\.fn\.step_rep": r"blocks.\1.attn.step_representatives",
    r"transformer\.layers\.(\d+)\.0\.fn\.proj\.weight": r"blocks.\1.attn.qkv.weight",
    r"transformer\.layers\.(\d+)\.0\.fn\.to_out\.(weight|bias)": r"blocks.\1.attn.proj.\2",
}


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
            and unexpected keys are named.

    """
    return _convert(source)[0]


def convert_official(source: str | Path, output: str | Path) -> dict[str, Any]:
    """Write a released checkpoint as one of ours, for :func:`cbsa_torch.models.load_checkpoint`.

    Returns:
        What the file says about itself: the timm model name and its constructor arguments.

    """
    model, info = _convert(source)
    save_checkpoint(output, model.float(), info)
    return info


def _convert(source: str | Path | Mapping[str, Any]) -> tuple[WhiteBoxTransformer, dict[str, Any]]:
    if isinstance(source, Mapping):
        name, official = "the state dict", unwrap(dict(source), "the state dict")
    else:
        name, official = str(source), read_tensors(source)
    converted, unknown = _rename(official, _STEM_AND_HEAD | _CBSA)
    sizes = _read_sizes(official, name, unknown)
    size = _NAMES.get((sizes["embed_dim"], sizes["depth"]), "tiny")
    model_name, model_args = f"cbt_{size}_patch16_224", {**sizes, "layout": "official"}
    model = timm.create_model(model_name, **model_args, dtype=official["pos_embedding"].dtype)
    load_strictly(model, {**converted, **unknown}, name)
    return model.eval(), {"model": model_name, "model_args": model_args}


def _rename(official: dict[str, Tensor], table: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Apply a key table; returns what it names and what it does not know."""
    converted, unknown = {}, {}
    for key, tensor in official.items():
        for pattern, replacement in table.items():
            match = re.fullmatch(pattern, key)
            if match:
                ours = match.expand(replacement)
                # official step sizes are (H, 1, 1)
                converted[ours] = tensor.flatten() if ".step_" in ours else tensor
                break
        else:
            unknown[key] = tensor
    return converted, unknown


def _read_sizes(official: dict[str, Tensor], name: str, unknown: dict[str, Tensor]) -> dict[str, Any]:
    needed = {
        "pos_embedding": "(1, 1 + tokens, dim)",
        "transformer.layers.0.0.fn.step_x": "(heads, 1, 1)",
        "transformer.layers.0.0.fn.proj.weight": "(heads * head_dim, dim)",
        "to_patch_embedding.proj.0.0.weight": "(dim / 8, channels, 3, 3)",
        "mlp_head.1.weight": "(classes, dim)",
    }
    missing = [key for key in needed if key not in official]
    if missing:
        stray = f"; unexpected: {', '.join(list(unknown)[:5])}" if unknown else ""
        raise CheckpointError(f"{name} is not an official CBT checkpoint: missing {', '.join(missing)}{stray}")
    wrong = [f"{key} {shape}" for key, shape in needed.items() if official[key].ndim != shape.count(",") + 1]
    if wrong:
        raise CheckpointError(f"{name} is not an official CBT checkpoint: expected {'; '.join(wrong)}")
    _, length, dim = official["pos_embedding"].shape
    depth = 1 + max(int(m[1]) for key in official if (m := re.match(r"transformer\.layers\.(\d+)\.", key)))
    convolutions = sum(bool(re.fullmatch(r"to_patch_embedding\.proj\.\d+\.0\.weight", k)) for k in official)
    patch_size = 2**convolutions
    side = math.isqrt(length - 1)
    if side * side != length - 1:
        raise CheckpointError(f"{name}: {length - 1} position embeddings are not a square grid")
    heads = official["transformer.layers.0.0.fn.step_x"].shape[0]
    dtype = official["pos_embedding"].dtype
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise CheckpointError(f"{name}: pos_embedding must be floating point, got {dtype}")
    return {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "in_chans": official["to_patch_embedding.proj.0.0.weight"].shape[1],
        "num_classes": official["mlp_head.1.weight"].shape[0],
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "head_dim": official["transformer.layers.0.0.fn.proj.weight"].shape[0] // heads,
    }
