"""The smallest models of every kind that can be exported, and running what was written."""

from functools import partial

import timm
import torch

import cbsa_torch.models  # noqa: F401
from cbsa_torch import CBSABlock
from cbsa_torch.models import adapt_vit
from cbsa_torch.nn import CBSA, MHSA, MSSA, TSSA, AgentAttention, LinearAttention, LinearCBSA

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
GRID = {"num_representatives": (3, 2)}


def family(name, **options):
    return timm.create_model(f"{name}_tiny_patch16_224", **{**SIZES, "num_classes": 3, **options}).eval()


def adapted(base="vit_tiny_patch16_224", mixer="adapted_cbsa", embed_dim=16, **options):
    sizes = {**SIZES, "embed_dim": embed_dim, "num_classes": 3, "dynamic_img_size": True}
    return adapt_vit(timm.create_model(base, **sizes).eval(), mixer, **options).model


def segmenter(encoder="vit_tiny_patch16_224", mixer_args=None, encoder_args=None):
    sizes = {"encoder_args": SIZES | (encoder_args or {}), "num_classes": 3, "depth": 1, "num_heads": 2}
    return timm.create_model(
        "segmenter", encoder=encoder, head_dim=8, mixer_args=mixer_args or {}, **sizes
    ).eval()


def layer(mixer=CBSA, **options):
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 8, 8), mixer(16, 2, **options)).eval()


MODELS = {
    "cbt": partial(family, "cbt", **GRID),
    "cbt exact": partial(family, "cbt", contraction="exact", **GRID),
    "cbt certified": partial(family, "cbt", step="certified", **GRID),
    "linear_cbt": partial(family, "linear_cbt"),
    "crate": partial(family, "crate"),
    "crate_cbt": partial(family, "crate_cbt", depth=2, **GRID),
    "tost": partial(family, "tost"),
    "agent": partial(family, "agent", **GRID),
    "stem_vit": partial(family, "stem_vit"),
    "crate_original": partial(family, "crate_original"),
    "adapted": partial(adapted, **GRID),
    "adapted shared": partial(adapted, contraction="exact", broadcast="shared", contraction_step=0.5, **GRID),
    "adapted agent": partial(adapted, mixer="agent", **GRID),
    "adapted linear": partial(adapted, mixer="linear"),
    "adapted eva": partial(adapted, "eva02_tiny_patch14_224", embed_dim=32, **GRID),
    "segmenter": partial(segmenter, mixer_args=GRID),
    "segmenter cbt": partial(segmenter, "cbt_tiny_patch16_224", GRID, GRID),
    "layer": partial(layer, **GRID),
    "layer relative": partial(layer, step="relative", contraction="exact", **GRID),
    "layer agent": partial(layer, AgentAttention, **GRID),
    "layer block": partial(layer, CBSABlock, **GRID),
    **{f"layer {m.__name__}": partial(layer, m) for m in (LinearCBSA, LinearAttention, MSSA, MHSA, TSSA)},
}
"""Every family, adapted ViTs, segmenters and single layers, for images of 32 x 32."""


def stirred(model):
    """The model with other weights: those that begin at 0 or 1 hide what they multiply."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def open_program(file):
    """What runs a written program on a tensor."""
    if file.suffix == ".pt2":
        return torch.export.load(file).module()
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    return lambda images: torch.from_numpy(session.run(["output"], {"images": images.numpy()})[0])
