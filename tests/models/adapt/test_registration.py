"""register_transformers: attention by name, and adapted models through save_pretrained and from_pretrained."""

import copy

import pytest
import torch
import transformers
from torch import nn

from cbsa_torch.models import adapt_vit, register_transformers
from tests.helpers.compare import assert_close

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
INTERPOLATE = {"interpolate_pos_encoding": True}
MODELS = {
    "ViT": INTERPOLATE,
    "DeiT": INTERPOLATE,
    "Dinov2": {},
    "Dinov2WithRegisters": {},
    "CLIPVision": INTERPOLATE,
    "SiglipVision": INTERPOLATE,
}
ADAPTED = {
    "cbsa": ("adapted_cbsa", {"num_representatives": 4, "contraction_step": 1.0}),
    "cbsa_agent": ("agent", {"num_representatives": 4}),
    "linear": ("linear", {}),
}
IMAGES = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
each_model = pytest.mark.parametrize("name", MODELS)
each_attention = pytest.mark.parametrize("attention", ADAPTED)


@pytest.fixture(autouse=True)
def registered():
    register_transformers(num_representatives=4)


def built(name, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **options})
    return getattr(transformers, f"{name}Model")(config).eval()


@torch.no_grad()
@each_attention
@each_model
def test_attention_by_name_equals_an_adapted_model_with_steps_of_one(name, attention):
    mixer, options = ADAPTED[attention]
    model, call = built(name, attn_implementation=attention), MODELS[name]
    assert model.config._attn_implementation == attention
    adapted = adapt_vit(model, mixer, **options).model
    for images in (IMAGES, IMAGES.mT.contiguous()):  # 4 x 8 patches, 8 x 4
        expected = adapted(images, **call)[0]
        torch.testing.assert_close(model(images, **call)[0], expected, rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(model)(images, **call)[0], expected, rtol=0, atol=0)


@torch.no_grad()
def test_grids_found_given_and_unknown():
    model = built("CLIPVision", attn_implementation="sdpa")
    del model._forward_pre_hooks[next(iter(model._forward_pre_hooks))]  # as if built before
    model.set_attn_implementation("cbsa")
    with pytest.raises(
        ValueError, match=r"nothing tells the grid of its 17 tokens.*grid_size=\(height, width\)"
    ):
        model(IMAGES[..., :32])
    given = model(IMAGES, grid_size=(4, 8), **INTERPOLATE)[0]
    found = built("CLIPVision", attn_implementation="cbsa")
    torch.testing.assert_close(found(IMAGES, **INTERPOLATE)[0], given, rtol=0, atol=0)
    assert not torch.equal(model(IMAGES, grid_size=(2, 16), **INTERPOLATE)[0], given)
    with pytest.raises(ValueError, match="grid_size"):
        model(IMAGES, grid_size=(7, 8), **INTERPOLATE)
    with pytest.raises(ValueError, match=r"grid_size \(2, 8\) has 16 cells \+ 1 prefix tokens, but x has 33"):
        found(IMAGES, grid_size=(2, 8), **INTERPOLATE)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_takes_the_same_grid():
    model = built("ViT", attn_implementation="cbsa_agent")
    images = [torch.randn(1, 3, *size) for size in ((32, 32), (16, 64), (64, 16))]
    single = [copy.deepcopy(model) for _ in images]
    for each, image in zip(single, images, strict=True):
        each(image, **INTERPOLATE)[0].square().sum().backward()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    sum(model(image, **INTERPOLATE)[0].square().sum() for image in images).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected = sum(each.get_parameter(name).grad for each in single)
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
@each_attention
def test_masks_are_honoured(attention):
    model, mask = built("ViT", attn_implementation=attention), torch.ones(1, 17, dtype=torch.int64)
    mask[:, 9:] = 0
    image = IMAGES[:1, ..., :32]
    other = image.clone()
    other[..., 16:, :] = 5.0
    first, second = (model(each, attention_mask=mask)[0][:, :9] for each in (image, other))
    torch.testing.assert_close(first, second)


@torch.no_grad()
@each_attention
def test_compiled_and_exported(attention):
    torch.compiler.reset()
    for _ in range(2):  # what is known of one model is not in the graph of another
        model = built("ViT", attn_implementation=attention, num_hidden_layers=1)
        images = IMAGES[..., :32]
        assert_close(torch.compile(model, backend="eager")(images)[0], model(images)[0], 1e-5)
    assert_close(torch.export.export(model, (images,)).module()(images)[0], model(images)[0], 1e-5)


@torch.no_grad()
def test_names_that_have_no_effect_or_would_be_wrong_are_refused():
    model = transformers.TimmWrapperModel(
        transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224")
    ).eval()
    model.set_attn_implementation("cbsa")
    with pytest.raises(ValueError, match="'cbsa' has no effect on TimmWrapperModel: layers of timm"):
        model(IMAGES)
    config = transformers.TimmBackboneConfig(backbone="vit_tiny_patch16_224", features_only=True)
    backbone = transformers.TimmBackbone(config).eval()
    backbone.set_attn_implementation("linear")
    with pytest.raises(ValueError, match=r"no effect on TimmBackbone: .*adapt_vit\(model._backbone, inplace"):
        backbone(IMAGES)
    for name in ("MobileViT", "Swinv2"):  # which attend by themselves, whatever the name
        config = getattr(transformers, f"{name}Config")(attn_implementation="cbsa_agent")
        with pytest.raises(ValueError, match=f"'cbsa_agent' has no effect on {name}Model: its layers"):
            getattr(transformers, f"{name}Model")(config)
    sizes = {**SIZES, "image_size": 32}
    shuffling = transformers.ViTMAEModel(transformers.ViTMAEConfig(**sizes, mask_ratio=0.0)).eval()
    shuffling.set_attn_implementation("cbsa")
    with pytest.raises(ValueError, match="nothing tells the grid of its 17 tokens"):
        shuffling(IMAGES[..., :32])
    biased = transformers.BeitModel(transformers.BeitConfig(**sizes, use_relative_position_bias=True)).eval()
    for parameter in biased.parameters():
        parameter.add_(torch.randn_like(parameter))
    biased.set_attn_implementation("cbsa")
    with pytest.raises(ValueError, match="must be the same for every query"):
        biased(IMAGES[..., :32])
    with pytest.raises(ValueError, match='attn_implementation="cbsaa"` is not supported'):
        built("ViT", attn_implementation="cbsaa")


def test_refusals():
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    config = transformers.CLIPConfig(text_config=text, vision_config=SIZES, projection_dim=8)
    clip, ids = transformers.CLIPModel(config), torch.tensor([[1, 5, 2]])
    clip.set_attn_implementation("cbsa")
    with pytest.raises(ValueError, match=r'it is causal.*attn_implementation=\{"vision_config": \'cbsa\'\}'):
        clip(input_ids=ids, pixel_values=IMAGES[..., :32])
    clip.set_attn_implementation({"vision_config": "cbsa", "text_config": "sdpa"})
    clip(input_ids=ids, pixel_values=IMAGES[..., :32])
    vit = built("ViT", attention_probs_dropout_prob=0.1, attn_implementation="linear").train()
    with pytest.raises(ValueError, match=r"set its attention dropout \(0.1\) to 0"):
        vit(IMAGES[..., :32])
    attention = transformers.AttentionInterface()["linear"]
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="keys and values must be of the same tokens"):
        attention(nn.Identity(), q, q[:, :, :3], q[:, :, :3], None)
    with pytest.raises(ValueError, match="logits are scaled by 1, not by"):
        attention(nn.Identity(), q, q, q, None, scaling=1.0)
    with pytest.raises(ValueError, match="position_bias has no place here"):
        attention(nn.Identity(), q, q, q, None, position_bias=q)
    with pytest.raises(ValueError, match="must be the same for every query"):  # a bias by relative position
        attention(nn.Identity(), q, q, q, torch.randn(1, 2, 5, 5))
    with pytest.raises(ValueError, match="num_representatives must be"):
        register_transformers(num_representatives=0)


# --- saved and loaded


@torch.no_grad()
@each_model
def test_adapted_models_survive_save_and_from_pretrained(name, tmp_path):
    model, call = built(name), MODELS[name]
    model = adapt_vit(model, "linear", layers=[0]).model  # in two steps
    model = adapt_vit(model, num_representatives=(2, 2), contraction="exact", layers=[1]).model
    for parameter in model.parameters():
        parameter.add_(0.01)
    expected = model(IMAGES, **call)[0]
    model.save_pretrained(tmp_path / "first")
    for loader in (type(model), transformers.AutoModel):
        again, info = loader.from_pretrained(tmp_path / "first", output_loading_info=True)
        assert not any(info.values())
        torch.testing.assert_close(again(IMAGES, **call)[0], expected, rtol=0, atol=0)
    again.save_pretrained(tmp_path / "second")
    again = transformers.AutoModel.from_pretrained(tmp_path / "second")
    torch.testing.assert_close(again(IMAGES, **call)[0], expected, rtol=0, atol=0)
    assert again.half().dtype == torch.float16
    assert not getattr(again, "is_quantized", False)


@torch.no_grad()
def test_backbones_which_keep_outputs_by_hooks(tmp_path):
    config = transformers.Dinov2Config(**SIZES, out_features=["stage1", "stage2"])
    model = transformers.Dinov2Backbone(config).eval()
    adapted = adapt_vit(model, num_representatives=4, contraction_step=1.0).model
    adapted.save_pretrained(tmp_path)
    again = transformers.Dinov2Backbone.from_pretrained(tmp_path)
    model.set_attn_implementation("cbsa")
    found = [each(IMAGES).feature_maps for each in (adapted, again, model)]
    for first, second, third in zip(*found, strict=True):
        assert first.shape == (2, 32, 4, 8)
        assert torch.equal(first, second)
        assert torch.equal(first, third)


def test_a_quantised_model_is_told_that_it_cannot_be_saved():
    model = built("ViT")
    model.config.quantization_config = {"quant_method": "torchao"}
    with pytest.warns(UserWarning, match="save_pretrained will not keep the new layers"):
        adapt_vit(model)


@torch.no_grad()
def test_a_tower_is_adapted_and_loaded_without_the_model_around_it(tmp_path):
    """Halves and indices are of its layers, not of those of the text tower."""
    text = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 9}
    config = transformers.CLIPConfig(text_config=text, vision_config={**SIZES, "num_hidden_layers": 4})
    model, options = transformers.CLIPModel(config).eval(), {"num_representatives": 4, "contraction_step": 1.0}
    model, report = adapt_vit(model, layers="latter_half", **options)
    tower = "vision_model.encoder.layers"
    assert [layer.name for layer in report.adapted] == [f"{tower}.2.self_attn", f"{tower}.3.self_attn"]
    model, report = adapt_vit(model, "linear", layers=[0])
    assert [layer.name for layer in report.adapted] == [f"{tower}.0.self_attn"]
    images = IMAGES[..., :32]
    expected = model.vision_model(images)[0]
    model.save_pretrained(tmp_path / "whole")
    whole = transformers.CLIPModel.from_pretrained(tmp_path / "whole")
    alone = transformers.CLIPVisionModel.from_pretrained(tmp_path / "whole")
    whole.vision_model.save_pretrained(tmp_path / "tower")
    again = transformers.AutoModel.from_pretrained(tmp_path / "tower")
    for each in (whole.vision_model, alone, again):
        torch.testing.assert_close(each(images)[0], expected, rtol=0, atol=0)
