"""Released segmentation checkpoints: the decoders of CBT and DEPICT-SA, alone or on the ViT they came with."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
from torch import Tensor, nn

from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.models.official import build_and_load, check_shapes, choose_heads, count_layers, grid_side
from cbsa_torch.models.segmentation.decoder import HEAD_DIM, MaskTransformerDecoder

# Our name to the official one, in the decoder.
_COMMON = {
    r"class_embed": r"cls_emb",
    r"norm\.(.+)": r"decoder_norm.\1",
    r"mask_norm\.(.+)": r"mask_norm.\1",
    r"layers\.(\d+)\.norm\.(.+)": r"net.layers.\1.norm.\2",
}
_CBT = {
    r"layers\.(\d+)\.attn\.step_tokens": r"net.layers.\1.fn.step_x",
    r"layers\.(\d+)\.attn\.step_representatives": r"net.layers.\1.fn.step_rep",
    r"layers\.(\d+)\.attn\.qkv\.weight": r"net.layers.\1.fn.proj.weight",
    r"layers\.(\d+)\.attn\.proj\.(.+)": r"net.layers.\1.fn.to_out.\2",
}
_DEPICT = {
    r"layers\.(\d+)\.attn\.qkv\.weight": r"net.layers.\1.fn.proj",
    r"layers\.(\d+)\.step": r"net.layers.\1.fn.step_size",
}
_HEADS = ("encoder.head.", "encoder.head_dist.", "encoder.pre_logits.")
"""The classifier that the encoder was trained with; the official code keeps it and does not use it."""
ENCODER_NORM_EPS = 1e-5
"""PyTorch's default, which the official encoder has; timm's ViT has 1e-6."""
ENCODER_HEAD_DIM = 64
"""Width of a head in every ViT that Segmenter's recipe uses."""


def is_segmentation(official: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a mask transformer, or of a segmenter with one."""
    return "cls_emb" in official or "decoder.cls_emb" in official


def read_segmentation(
    official: dict[str, Tensor], source: str, num_heads: int | None = None
) -> tuple[nn.Module, dict[str, Any] | None]:
    """Build the model of an official state dict.

    Args:
        official: names and tensors of the official code, with or without the encoder.
        source: of the weights, for messages.
        num_heads: of a DEPICT decoder whose heads are not of dimension 100.

    Returns:
        A :class:`Segmenter` and its timm name and arguments; or, of a decoder alone, a
        :class:`MaskTransformerDecoder` and None. In eval mode, in the dtype of the weights.

    Raises:
        CheckpointError: another decoder, or tensors that do not fit; names are the official code's.
    """
    alone = "cls_emb" in official
    if not alone and any(not key.startswith(("encoder.", "decoder.")) for key in official):
        raise CheckpointError(f"{source} holds more than encoder.* and decoder.*")
    prefix = "" if alone else "decoder."
    decoder = {key.removeprefix(prefix): t for key, t in official.items() if key.startswith(prefix)}
    depict = "net.layers.0.fn.step_size" in decoder
    args = _decoder_args(decoder, source, depict, num_heads)
    table = _COMMON | (_DEPICT if depict else _CBT)
    if alone:
        mixer_args = args.pop("mixer_args", {})
        make = partial(MaskTransformerDecoder, **args, dim=decoder["cls_emb"].shape[2], **mixer_args)
        return build_and_load(make, official, table, source), None
    args |= _encoder_args(official, source)
    table = {rf"decoder\.{ours}": f"decoder.{theirs}" for ours, theirs in table.items()}
    table[r"encoder\.(.+)"] = r"encoder.\1"
    used = {key: tensor for key, tensor in official.items() if not key.startswith(_HEADS)}
    model = build_and_load(partial(timm.create_model, "segmenter", **args), used, table, source)
    return model, {"model": "segmenter", "model_args": args}


def _decoder_args(
    decoder: dict[str, Tensor], source: str, depict: bool, num_heads: int | None
) -> dict[str, Any]:
    """Constructor arguments from the shapes of the tensors that determine them."""
    if any(key.startswith(("snet.", "cnet.")) for key in decoder):
        raise CheckpointError(
            f"{source} is a DEPICT-CA: its decoder of self- and cross-attention is not supported, DEPICT-SA is"
        )
    if any(key.startswith("blocks.") for key in decoder):
        raise CheckpointError(f"{source} is a decoder of Segmenter itself, with a feed-forward: not supported")
    depth = count_layers(decoder, "net.layers.", source)
    within = [f"net.layers.{i}.fn" for i in range(depth)]
    projection = "proj" if depict else "proj.weight"
    needed = {"cls_emb": "(1, classes, dim)", f"{within[0]}.{projection}": "(heads * head_dim, dim)"}
    if not depict:
        needed |= {f"{layer}.{step}": "(heads, 1, 1)" for layer in within for step in ("step_x", "step_rep")}
    check_shapes(decoder, needed, source)
    inner = decoder[f"{within[0]}.{projection}"].shape[0]
    told = None if depict else decoder[f"{within[0]}.step_x"].shape[0]
    heads = choose_heads(source, inner, told=told, given=num_heads, usual=inner // HEAD_DIM)
    args: dict[str, Any] = {
        "num_classes": decoder["cls_emb"].shape[1],
        "depth": depth,
        "num_heads": heads,
        "head_dim": inner // heads,
        "mixer": "mssa" if depict else "cbsa",
    }
    # DEPICT projects out with the transpose of the way in, times a learned step.
    return args | ({"learned_step": True, "mixer_args": {"tied": True}} if depict else {})


def _encoder_args(official: dict[str, Tensor], source: str) -> dict[str, Any]:
    """A timm ViT, and the arguments that make it this one."""
    positions, patches = "encoder.pos_embed", "encoder.patch_embed.proj.weight"
    hidden = "encoder.blocks.0.mlp.fc1.weight"
    shapes = {positions: "(1, tokens, dim)", patches: "(dim, channels, patch, patch)", hidden: "(hidden, dim)"}
    check_shapes(official, shapes, source)
    dim, in_chans, patch, _ = official[patches].shape
    distilled = "encoder.dist_token" in official
    side = grid_side(official[positions].shape[1] - 1 - distilled, source)
    if dim % ENCODER_HEAD_DIM:
        raise CheckpointError(f"{source}: the width {dim} of its encoder is not whole heads of 64")
    return {
        "encoder": "deit_tiny_distilled_patch16_224" if distilled else "vit_tiny_patch16_224",
        "encoder_args": {
            "embed_dim": dim,
            "depth": count_layers(official, "encoder.blocks.", source),
            "num_heads": dim // ENCODER_HEAD_DIM,
            "patch_size": patch,
            "mlp_ratio": official[hidden].shape[0] / dim,
        },
        "encoder_norm_eps": ENCODER_NORM_EPS,
        "img_size": side * patch,
        "in_chans": in_chans,
    }
