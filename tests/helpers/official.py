"""A model of ours as a checkpoint of the official code."""

import re

import timm
import torch

TO_OFFICIAL = {
    r"pos_embed": "pos_embedding",
    r"cls_token": "cls_token",
    r"stem\.(proj\..*)": r"to_patch_embedding.\1",
    r"norm\.(weight|bias)": r"mlp_head.0.\1",
    r"head\.(weight|bias)": r"mlp_head.1.\1",
    r"blocks\.(\d+)\.norm1\.(weight|bias)": r"transformer.layers.\1.0.norm.\2",
    r"blocks\.(\d+)\.norm2\.(weight|bias)": r"transformer.layers.\1.1.norm.\2",
    r"blocks\.(\d+)\.ista\.weight": r"transformer.layers.\1.1.fn.weight",
    r"blocks\.(\d+)\.attn\.step_tokens": r"transformer.layers.\1.0.fn.step_x",
    r"blocks\.(\d+)\.attn\.step_representatives": r"transformer.layers.\1.0.fn.step_rep",
    r"blocks\.(\d+)\.attn\.qkv\.weight": r"transformer.layers.\1.0.fn.proj.weight",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"transformer.layers.\1.0.fn.to_out.\2",
}


def official_model():
    torch.manual_seed(0)
    arguments = {"img_size": 64, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("cbt_tiny_patch16_224", **arguments, layout="official").eval()


def official_state(model):
    """The state dict of a model under the names and shapes of the official code."""
    state = {}
    for key, tensor in model.state_dict().items():
        (name,) = [m.expand(new) for old, new in TO_OFFICIAL.items() if (m := re.fullmatch(old, key))]
        state[name] = tensor.reshape(-1, 1, 1) if ".step_" in key else tensor
    return state
