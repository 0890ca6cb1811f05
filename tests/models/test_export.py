"""Models exported or traced: at the size of the example they are right, at others they raise."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.export import Dim

from cbsa_torch.models import adapt_vit
from cbsa_torch.nn import CBSA, MSSA
from cbsa_torch.ops import pool_representatives
from tests.helpers.compare import assert_close

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
MESSAGE = "must not be dynamic when a model is exported"
x = torch.randn(2, 3, 32, 32)


def cbt():
    return timm.create_model("cbt_tiny_patch16_224", **SIZES, num_classes=3, num_representatives=4).eval()


def adapted():
    vit = timm.create_model("vit_tiny_patch16_224", **SIZES, num_classes=3, dynamic_img_size=True).eval()
    return adapt_vit(vit, num_representatives=4).model


def segmenter():
    sizes = {"encoder": "vit_tiny_patch16_224", "encoder_args": SIZES, "num_classes": 3, "depth": 1}
    return timm.create_model(
        "segmenter", **sizes, num_heads=2, head_dim=8, mixer_args={"num_representatives": 4}
    ).eval()


def layer():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 8, 8), CBSA(16, 2, num_representatives=(2, 3))).eval()


class Pooled(torch.nn.Module):
    def forward(self, images):
        height, width = images.shape[2:]
        tokens = images.flatten(2).transpose(1, 2)[:, None]
        return pool_representatives(tokens, (height, width), 4).values


def certified():
    sizes = SIZES | {"num_classes": 3, "num_representatives": 4, "step": "certified"}
    return timm.create_model("cbt_tiny_patch16_224", **sizes).eval()


MODELS = {
    "cbt": cbt,
    "certified": certified,
    "adapted": adapted,
    "segmenter": segmenter,
    "layer": layer,
    "pooling": Pooled,
}
DYNAMIC = {
    "both": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},
    "height": {2: Dim.DYNAMIC},
    "named": {2: Dim("height", min=16, max=64), 3: Dim("width", min=16, max=64)},
    "auto": {2: Dim.AUTO, 3: Dim.AUTO},
}


@pytest.mark.parametrize("dynamic", DYNAMIC)
@pytest.mark.parametrize("build", MODELS)
@torch.no_grad()
def test_a_dynamic_height_or_width_is_refused(build, dynamic):
    with pytest.raises(Exception, match=MESSAGE):
        torch.export.export(MODELS[build](), (x,), dynamic_shapes=(DYNAMIC[dynamic],))


@torch.no_grad()
def test_strict_export_refuses_it_too():
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"(?s)ValueError.*must not be dynamic"):
        torch.export.export(cbt(), (x,), dynamic_shapes=(DYNAMIC["both"],), strict=True)


@torch.no_grad()
def test_onnx_refuses_it():
    with pytest.raises(Exception, match=MESSAGE):
        torch.onnx.export(cbt(), (x,), dynamic_shapes=(DYNAMIC["both"],), dynamo=True, verbose=False)


@pytest.mark.parametrize("build", MODELS)
@torch.no_grad()
def test_a_dynamic_batch_is_exported(build):
    model = MODELS[build]()
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: Dim.DYNAMIC},)).module()
    more = torch.randn(5, 3, 32, 32)
    assert_close(exported(more), model(more), 1e-5)


@torch.no_grad()
def test_layers_without_a_grid_take_a_dynamic_number_of_tokens():
    model, tokens = MSSA(16, 2).eval(), torch.randn(2, 17, 16)
    exported = torch.export.export(model, (tokens,), dynamic_shapes=({1: Dim.DYNAMIC},)).module()
    more = torch.randn(2, 30, 16)
    assert_close(exported(more), model(more), 1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.parametrize("size", [(16, 64), (64, 64), (32, 40), (48, 32)])
@pytest.mark.parametrize("build", [name for name in MODELS if name != "pooling"])
@torch.no_grad()
def test_a_traced_model_refuses_other_sizes(build, size):
    """Also those with as many patches: 2 x 8 are no 4 x 4."""
    model = MODELS[build]()
    traced = torch.jit.trace(model, (x,))
    assert_close(traced(x), model(x), 1e-5)
    with pytest.raises(RuntimeError):
        traced(torch.randn(2, 3, *size))
