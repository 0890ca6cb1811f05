"""Adapted models by name, and from checkpoints."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from cbsa_torch import adapt_vit
from cbsa_torch.models import from_pretrained, load_checkpoint, save_checkpoint
from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.nn import AdaptedCBSA
from cbsa_torch.train.hub import save_for_hub
from tests.helpers.compare import assert_close

BASE = "vit_tiny_patch16_224"
ARGS = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3, "img_size": 64}
IMAGE = torch.randn(1, 3, 64, 64)


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("adapted_cbsa", {"num_representatives": 4, "contraction_step": 0.5}),
        ("adapted_cbsa", {"broadcast": "shared", "contraction": "none"}),
        ("agent", {}),
        ("linear", {}),
        ("tssa", {}),
    ],
)
def test_a_model_adapted_by_hand_comes_back_from_its_file(tmp_path, mixer, options):
    model, report = adapt_vit(timm.create_model(BASE, **ARGS), mixer, layers=[-1], **options)
    args = json.loads(json.dumps(report.model_args(BASE, **ARGS)))
    save_checkpoint(tmp_path / "model.safetensors", model, {"model": "adapted_vit", "model_args": args})
    again, _ = load_checkpoint(tmp_path / "model.safetensors")
    assert torch.equal(again(IMAGE), model.eval()(IMAGE))
    assert [type(block.attn) for block in again.blocks] == [type(block.attn) for block in model.blocks]


def test_the_hub_format(tmp_path):
    model, report = adapt_vit(timm.create_model(BASE, **ARGS))
    info = {"model": "adapted_vit", "model_args": report.model_args(BASE, **ARGS)}
    save_for_hub(tmp_path, model, info, "card")
    assert torch.equal(from_pretrained(tmp_path)(IMAGE), model.eval()(IMAGE))
    config = json.loads((tmp_path / "config.json").read_text())
    again = timm.create_model(config["architecture"], **config["model_args"])
    assert type(again.blocks[1].attn) is AdaptedCBSA


def test_by_name():
    options = {"layers": "latter_half", "base_args": {"depth": 2, "dynamic_img_size": True}}
    model = timm.create_model("adapted_vit", base="vit_small_patch16_dinov3", mixer="adapted_cbsa", **options)
    assert model.pretrained_cfg["input_size"] == (3, 256, 256)
    assert model.pretrained_cfg["num_classes"] == 0
    model = timm.create_model(
        "adapted_vit", base=BASE, num_classes=5, in_chans=1, img_size=32, base_args={"depth": 1}
    )
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 5)
    assert model.pretrained_cfg["first_conv"] == "patch_embed.proj"
    features = timm.create_model("adapted_vit", base=BASE, features_only=True, base_args={"depth": 3})
    assert [tuple(f.shape) for f in features(torch.randn(1, 3, 224, 224))] == [(1, 192, 14, 14)] * 3


@torch.no_grad()
def test_pretrained_weights_of_other_classes_channels_and_sizes(tmp_path):
    """As timm's own ViTs: a new head, summed channels, resampled positions; and the adapted steps as they are."""
    base_args = {"depth": 2, "embed_dim": 32, "num_heads": 2}
    options = {"base": BASE, "base_args": base_args, "img_size": 64, "num_classes": 3}
    model = timm.create_model("adapted_vit", **options).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    overlay = {"file": str(tmp_path / "model.safetensors"), "num_classes": 3}

    def loaded(**changes):
        given = {**options, **changes}
        return timm.create_model("adapted_vit", pretrained=True, pretrained_cfg_overlay=overlay, **given).eval()

    assert torch.equal(loaded()(IMAGE), model(IMAGE))
    features = model.forward_features(IMAGE)
    for classes in (0, 7):
        assert torch.equal(loaded(num_classes=classes).forward_features(IMAGE), features)
    grey = IMAGE[:, :1]
    assert_close(loaded(in_chans=1)(grey), model(grey.expand(-1, 3, -1, -1)), 1e-5)
    large = loaded(img_size=96)
    model.set_input_size(img_size=96)
    assert_close(large(torch.ones(1, 3, 96, 96)), model(torch.ones(1, 3, 96, 96)), 1e-5)


def test_a_new_head_and_another_size():
    model = adapt_vit(timm.create_model(BASE, **ARGS)).model.eval()
    model.reset_classifier(7)
    model.set_input_size(img_size=(32, 128))
    grids = []
    model.blocks[0].attn.register_forward_pre_hook(lambda layer, args: grids.append(layer.token_grid(*args)))
    assert model(torch.randn(1, 3, 32, 128)).shape == (1, 7)
    assert grids == [((2, 8), 1)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base": "vit_tinny_patch16_224"}, ValueError, "base must be a ViT of timm, .*did you mean"),
        ({"base": "adapted_vit"}, ValueError, "base must be a ViT of timm"),
        ({"base": "hf-hub:someone/vit"}, ValueError, "base must be a ViT of timm"),
        ({"base_args": {"pretrained": True}}, ValueError, "base_args must not hold pretrained"),
        ({"base": "resnet18"}, ValueError, "model has no attention layers"),
        ({"mixer_args": {"num_heads": 3}}, TypeError, "num_heads"),
        ({"nonsense": 1}, TypeError, "adapted_vit has no option nonsense"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("adapted_vit", **options)


def test_a_checkpoint_cannot_fetch_weights(tmp_path):
    model = adapt_vit(timm.create_model(BASE, **ARGS)).model
    info = {"model": "adapted_vit", "model_args": {"base": BASE, "pretrained_base": True}}
    with pytest.raises(CheckpointError, match="model_args that are not allowed"):
        save_checkpoint(tmp_path / "model.safetensors", model, info)
