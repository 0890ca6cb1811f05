"""Small models and images for streams, and how a stream compares with memory."""

from functools import partial

import numpy as np
import torch
from torch import nn

from cbsa_torch import CBSA
from cbsa_torch.models import MaskTransformerDecoder, Segmenter, WhiteBoxTransformer
from cbsa_torch.nn import TSSA, AgentAttention, LinearCBSA

MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.2, 0.25)

MIXERS = {
    "pooled": CBSA,
    "learned": partial(CBSA, representatives="learned", num_representatives=7),
    "exact": partial(CBSA, contraction="exact", tied=True, orthogonal=True, eps=1.0),
    "certified": partial(CBSA, step="certified", num_representatives=9),
    "relative": partial(CBSA, step="relative", num_representatives=9),
    "certified_learned": partial(CBSA, step="certified", representatives="learned", num_representatives=5),
    "official": partial(CBSA, layout="official", num_representatives=(3, 4)),
    "separate": partial(CBSA, qkv="separate", qk_norm=True, norm_layer=nn.LayerNorm),
    "agent": AgentAttention,
    "linear": LinearCBSA,
    "linear_sum": partial(
        LinearCBSA, average=False, solver="eigh", eps=5.0, scale_norm=True, norm_layer=nn.LayerNorm
    ),
    "tost": TSSA,
    "channel": partial(TSSA, form="channel"),
}


def shaken(model, seed=0):
    """The model in evaluation mode, with biases, steps and statistics that are not those of the start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def classifier(mixer=CBSA, **options):
    torch.manual_seed(1)
    options = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "dtype": torch.float64, **options}
    return shaken(WhiteBoxTransformer(img_size=24, num_classes=5, mixer=mixer, **options))


def segmenter(mixer="cbsa", **options):
    torch.manual_seed(2)
    encoder = WhiteBoxTransformer(
        img_size=24, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0, dtype=torch.float64
    )
    decoder = MaskTransformerDecoder(
        6, 24, depth=2, num_heads=2, head_dim=8, mixer=mixer, encoder_dim=16, dtype=torch.float64, **options
    )
    model = shaken(Segmenter(encoder, decoder))
    with torch.no_grad():
        decoder.class_embed.normal_()
        # No class is the largest everywhere.
        decoder.mask_norm.bias -= model(as_batch(image(37, 50)))[0].flatten(1).median(-1).values
    return model


def image(height, width, channels=3):
    """``(height, width, channels)`` bytes, with structure at every scale."""
    rng = np.random.default_rng(height * width)
    fine = rng.integers(0, 128, (height, width, channels))
    coarse = rng.integers(0, 128, (-(-height // 9), -(-width // 9), channels))
    return (fine + np.kron(coarse, np.ones((9, 9, 1), int))[:height, :width]).astype(np.uint8)


def as_batch(pixels, dtype=torch.float64):
    """The image as the model is fed it in memory."""
    mean, std = (torch.tensor(values, dtype=dtype)[:, None, None] for values in (MEAN, STD))
    return ((torch.from_numpy(pixels).permute(2, 0, 1).to(dtype) / 255 - mean) / std)[None]
