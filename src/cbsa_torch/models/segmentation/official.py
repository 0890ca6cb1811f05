"""Released segmentation checkpoints: the decoders of CBT and DEPICT-SA, alone or on the ViT they came with."""

from __future__ import annotations

import math
import re
from typing import Any

import timm
from torch import Tensor, nn

from cbsa_torch._core.checks import check_positive_int
from cbsa_torch.models.checkpoint import CheckpointError, floating_dtype, load_strictly
from cbsa_torch.models.segmentation.decoder import HEAD_DIM, MaskTransformerDecoder

_LAYER = r"net\.layers\.(\d{1,4})\.(.+)"
_WITHIN_LAYER = {
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "fn.step_x": "attn.step_tokens",
    "fn.step_rep": "attn.step_representatives",
    "fn.proj.weight": "attn.qkv.weight",
    "fn.to_out.weight": "attn.proj.weight",
    "fn.to_out.bias": "attn.proj.bias",
    "fn.proj": "attn.qkv.weight",
    "fn.step_size": "step",
}
"""The official name within a layer to ours; the last two are DEPICT's."""
_OUTSIDE = {"cls_emb": "class_embed", "decoder_norm.": "norm.", "mask_norm.": "mask_norm."}
_HEADS = ("encoder.head.", "encoder.head_dist.", "encoder.pre_logits.")
"""The classifier that the encoder was trained with; the official code keeps it and does not use it."""
ENCODER_NORM_EPS = 1e-5
"""PyTorch's default, which the official encoder has; timm's ViT has 1e-6."""
ENCODER_HEAD_DIM = 64
"""Of every ViT that Segmenter's recipe uses."""


def is_segmentation(official: dict[str, Tensor]) -> bool:
    """Whether these are the weights of a mask transformer, or of a segmenter with one."""
    return "cls_emb" in official or "decoder.cls_emb" in official


def read_segmentation(
    official: dict[str, Tensor], name: str, num_heads: int | None = None
) -> tuple[nn.Module, dict[str, Any] | None]:
    """Build the model of an official state dict.

    Args:
        official: names and tensors of the official code, with or without the encoder.
        name: of the source, for messages.
        num_heads: of a DEPICT decoder whose heads are not of dimension 100.

    Returns:
        A :class:`Segmenter` and its timm name and arguments; or, of a decoder alone, a
        :class:`MaskTransformerDecoder` and None. In eval mode, in the dtype of the weights.

    Raises:
        CheckpointError: another decoder, or tensors that do not fit; names are the official code's.
    """
    alone = "cls_emb" in official
    prefix = "" if alone else "decoder."
    encoder = {key: value for key, value in official.items() if key.startswith("encoder.")}
    decoder = {key[len(prefix) :]: official[key] for key in official if key not in encoder or alone}
    if any(not key.startswith(prefix) for key in official if key not in encoder):
        raise CheckpointError(f"{name} holds more than encoder.* and decoder.*")
    args = _decoder_args(decoder, name, num_heads)
    info: dict[str, Any] | None = None
    model: nn.Module
    try:
        if alone:
            mixer_args = args.pop("mixer_args", {})
            model = MaskTransformerDecoder(**args, dim=decoder["cls_emb"].shape[2], **mixer_args)
        else:
            info = {"model": "segmenter", "model_args": {**args, **_encoder_args(encoder, name)}}
            model = timm.create_model("segmenter", **info["model_args"])
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{name} is not an official checkpoint: {error}") from error
    model.to(floating_dtype(official))
    converted = {f"{prefix}{_our_name(key, name)}": _flat(key, value) for key, value in decoder.items()}
    converted |= {key: value for key, value in encoder.items() if not key.startswith(_HEADS)}
    load_strictly(model, converted, name)
    return model.eval(), info


def _our_name(key: str, name: str) -> str:
    layer = re.fullmatch(_LAYER, key)
    if layer and layer[2] in _WITHIN_LAYER:
        return f"layers.{layer[1]}.{_WITHIN_LAYER[layer[2]]}"
    for theirs, ours in _OUTSIDE.items():
        if key == theirs or (theirs.endswith(".") and key.startswith(theirs)):
            return ours + key[len(theirs) :]
    raise CheckpointError(f"{name} is not an official checkpoint: unexpected {key} in the decoder")


def _flat(key: str, value: Tensor) -> Tensor:
    """Steps are stored as (H, 1, 1)."""
    return value.flatten() if key.endswith((".step_x", ".step_rep")) else value


def _decoder_args(decoder: dict[str, Tensor], name: str, num_heads: int | None) -> dict[str, Any]:
    """Constructor arguments from the shapes of the tensors that determine them."""
    if any(key.startswith(("snet.", "cnet.")) for key in decoder):
        raise CheckpointError(
            f"{name} is a DEPICT-CA: its decoder of self- and cross-attention is not supported, DEPICT-SA is"
        )
    if any(key.startswith("blocks.") for key in decoder):
        raise CheckpointError(f"{name} is a decoder of Segmenter itself, with a feed-forward: not supported")
    layers = {int(found[1]) for key in decoder if (found := re.fullmatch(_LAYER, key))}
    if not layers or layers != set(range(len(layers))):
        raise CheckpointError(f"{name} is not an official checkpoint: it has layers {sorted(layers)[:8]}")
    first = "net.layers.0.fn"
    depict = f"{first}.step_size" in decoder
    projection = f"{first}.proj" if depict else f"{first}.proj.weight"
    needed = {"cls_emb": 3, projection: 2} | ({} if depict else {f"{first}.step_x": 3})
    for key, ndim in needed.items():
        if key not in decoder or decoder[key].ndim != ndim or 0 in decoder[key].shape:
            got = tuple(decoder[key].shape) if key in decoder else "nothing"
            raise CheckpointError(f"{name} is not an official checkpoint: {key} with {ndim} axes, got {got}")
    inner = decoder[projection].shape[0]
    heads = _heads(decoder, name, inner, depict, num_heads)
    args: dict[str, Any] = {
        "num_classes": decoder["cls_emb"].shape[1],
        "depth": len(layers),
        "num_heads": heads,
        "head_dim": inner // heads,
        "mixer": "mssa" if depict else "cbsa",
    }
    # DEPICT projects out with the transpose of the way in, times a learned step.
    return args | ({"learned_step": True, "mixer_args": {"tied": True}} if depict else {})


def _heads(decoder: dict[str, Tensor], name: str, inner: int, depict: bool, given: int | None) -> int:
    if given is not None:
        check_positive_int("num_heads", given)
    told = inner // HEAD_DIM if depict else decoder["net.layers.0.fn.step_x"].shape[0]
    if not depict and given not in (None, told):
        raise CheckpointError(f"{name} has {told} heads, not num_heads={given}")
    heads = told if given is None else given
    if not heads or inner % heads:
        raise CheckpointError(
            f"{name}: {inner} channels of its projections are not {heads} heads; give num_heads"
        )
    return heads


def _encoder_args(encoder: dict[str, Tensor], name: str) -> dict[str, Any]:
    """A timm ViT, and the arguments that make it this one."""
    blocks = {int(found[1]) for key in encoder if (found := re.match(r"encoder\.blocks\.(\d{1,4})\.", key))}
    needed = {
        "encoder.pos_embed": 3,
        "encoder.patch_embed.proj.weight": 4,
        "encoder.blocks.0.mlp.fc1.weight": 2,
    }
    for key, ndim in needed.items():
        if key not in encoder or encoder[key].ndim != ndim or 0 in encoder[key].shape:
            raise CheckpointError(f"{name} is not an official checkpoint: its encoder has no {key} of a ViT")
    dim, in_chans, patch, _ = encoder["encoder.patch_embed.proj.weight"].shape
    distilled = "encoder.dist_token" in encoder
    cells = encoder["encoder.pos_embed"].shape[1] - 1 - distilled
    side = math.isqrt(max(cells, 0))
    if side * side != cells or not cells:
        raise CheckpointError(f"{name}: {cells} position embeddings are not a square grid")
    if dim % ENCODER_HEAD_DIM:
        raise CheckpointError(f"{name}: the width {dim} of its encoder is not whole heads of 64")
    return {
        "encoder": "deit_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224",
        "encoder_args": {
            "embed_dim": dim,
            "depth": len(blocks),
            "num_heads": dim // ENCODER_HEAD_DIM,
            "patch_size": patch,
            "mlp_ratio": encoder["encoder.blocks.0.mlp.fc1.weight"].shape[0] / dim,
        },
        "encoder_norm_eps": ENCODER_NORM_EPS,
        "img_size": side * patch,
        "in_chans": in_chans,
    }
