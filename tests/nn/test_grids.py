"""Layers in timm's models know the grid of every image without being told."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from cbsa_torch import CBSA, MSSA, TSSA, AgentAttention, LinearCBSA
from cbsa_torch.nn import follow_grid
from tests.helpers.compare import assert_close

SQUARE, WIDE, TALL = (torch.randn(1, 3, *size) for size in ((64, 64), (32, 128), (128, 32)))  # 16 patches each
IMAGES = SQUARE, WIDE, TALL


def vit(mixer=CBSA, name="vit_tiny_patch16_224", **options):
    args = {"depth": 2, "num_classes": 3, "embed_dim": 24, "num_heads": 2, "img_size": 64}
    return timm.create_model(name, attn_layer=mixer, **{**args, **options}).eval()


def told(model, image):
    """The output of a copy whose layers were given the grid."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "grid_source"):
            module.grid_source = None
            grid = (image.shape[2] // 16, image.shape[3] // 16)
            module.set_input_size(grid, num_prefix_tokens=model.num_prefix_tokens)
    return model(image)


@pytest.mark.parametrize("mixer", [CBSA, AgentAttention])
@torch.no_grad()
def test_images_of_any_shape(mixer):
    model = vit(mixer, dynamic_img_size=True, reg_tokens=4)
    outputs = [model(image) for image in IMAGES]
    for image, output in zip(IMAGES, outputs, strict=True):
        assert torch.equal(output, told(model, image))
    assert not torch.allclose(outputs[1], outputs[2])


@pytest.mark.parametrize("mixer", [CBSA, AgentAttention, MSSA, TSSA, LinearCBSA])
def test_the_default_size_and_every_part_of_the_surface(mixer):
    model = timm.create_model("vit_small_patch16_224", attn_layer=mixer, depth=1, num_classes=3)
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 3)
    model = vit(mixer, dynamic_img_size=True, dynamic_img_pad=True, reg_tokens=2)
    features, (last,) = model.forward_intermediates(torch.randn(1, 3, 33, 90), indices=[1])
    assert features.shape == (1, 3 + 18, 24)
    assert last.shape == (1, 24, 3, 6)


def test_a_rectangle_with_a_square_number_of_patches_is_a_rectangle():
    model = vit(img_size=(32, 128))
    x = torch.randn(1, 17, 24)
    assert model.blocks[0].attn.token_grid(x) == ((2, 8), 1)  # before any image was seen
    assert model(WIDE).shape == (1, 3)
    assert model.blocks[0].attn.token_grid(x) == ((2, 8), 1)


@torch.no_grad()
def test_prefix_tokens_that_a_subclass_adds_later():
    model = vit(AgentAttention, "deit_tiny_distilled_patch16_224", img_size=(32, 128))
    assert torch.equal(model(WIDE), told(model, WIDE))


@torch.no_grad()
def test_hybrids_and_resized_models():
    model = vit(name="vit_tiny_r_s16_p8_224", img_size=96)
    assert model(torch.randn(1, 3, 96, 96)).shape == (1, 3)
    model = vit()
    model.set_input_size(img_size=(32, 128), patch_size=(16, 16))
    assert torch.equal(model(WIDE), told(model, WIDE))


@torch.no_grad()
def test_copies_have_grids_of_their_own():
    model = vit(dynamic_img_size=True)
    outputs = [model(image) for image in IMAGES]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.blocks[0].attn.grid_source is not model.blocks[0].attn.grid_source
        assert all(torch.equal(other(i), o) for i, o in zip(IMAGES, outputs, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_compiled_models(dynamic):
    model = vit(dynamic_img_size=True, depth=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=dynamic)
    for image in (SQUARE, WIDE, SQUARE):
        assert_close(compiled(image), model(image), 1e-5)


def test_exported_models():
    model = vit(img_size=(32, 128))
    assert_close(torch.export.export(model, (WIDE,)).module()(WIDE), model(WIDE), 1e-5)


def gradients(model, image):
    model.zero_grad()
    model(image).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(params=[False, True], ids=["plain", "reentrant"])
def _reentrant(request, monkeypatch):
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: request.param)


@pytest.mark.usefixtures("_reentrant")
def test_gradient_checkpointing_recomputes_the_same_grid():
    model = vit(dynamic_img_size=True)
    plain = [gradients(model, image) for image in IMAGES]
    model.set_grad_checkpointing(True)
    for image, expected in zip(IMAGES, plain, strict=True):
        for name, gradient in gradients(model, image).items():
            assert_close(gradient, expected[name], 1e-5)
    loss = model(WIDE).square().sum()
    model.set_grad_checkpointing(False)
    with torch.no_grad():
        model(SQUARE)  # between forward and backward, and no part of them
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, plain[1][name], 1e-5)


@pytest.mark.usefixtures("_reentrant")
def test_gradient_checkpointing_never_takes_another_grid():
    model = vit(dynamic_img_size=True)
    model.set_grad_checkpointing(True)
    both = model(WIDE).sum() + model(SQUARE).sum()
    with pytest.raises(RuntimeError, match=r"had the grids \(2, 8\), \(4, 4\) of 16 cells"):
        both.backward()
    other = model(WIDE).sum() + model(torch.randn(1, 3, 32, 32)).sum()  # another number of cells is no problem
    other.backward()


def test_dropped_patches_are_refused():
    model = vit(patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match=r"x has 9 tokens, 1 of them prefix tokens.*patch_drop_rate"):
        model(SQUARE)


@pytest.mark.parametrize("built", [64, 128])
@torch.no_grad()
def test_dropped_patches_are_no_other_grid(built):
    """A quarter of 8 x 8 patches are as many as those that the model was built for, or saw before."""
    model = vit(patch_drop_rate=0.75, dynamic_img_size=True, img_size=built)
    model(SQUARE)
    with pytest.raises(ValueError, match="drop no patches"):
        model.train()(torch.randn(1, 3, 128, 128))


@pytest.mark.parametrize("mixer", [CBSA, AgentAttention, MSSA, TSSA, LinearCBSA])
@torch.no_grad()
def test_masked_patches_change_nothing_else(mixer):
    model, other = vit(mixer), SQUARE.clone()
    other[..., 32:, :] = 5.0
    real = torch.ones(1, 1, 1, 17, dtype=torch.bool)
    real[..., 9:] = False
    first, second = model.forward_features(torch.cat([SQUARE, other]), attn_mask=real)  # one mask for both
    assert_close(first[:9], second[:9], 1e-5)
    assert not torch.allclose(first[9:], second[9:])


def test_layers_put_in_later_follow_when_told():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=2, img_size=(32, 128))
    model.blocks[1].attn = CBSA(24, 2)
    assert follow_grid(model) == 1
    x = torch.randn(1, 17, 24)
    assert model.blocks[1].attn.token_grid(x) == ((2, 8), 1)
    model.patch_embed = copy.deepcopy(model.patch_embed)
    assert model(WIDE).shape == (1, 1000)


def test_models_of_another_make():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 24, 16, 16)
            self.attn = CBSA(24, 2)

        def forward(self, image):
            return self.attn(self.patches(image).flatten(2).mT)

    tower = Tower()
    with pytest.raises(ValueError, match="model must have a patch_embed"):
        follow_grid(tower)
    assert follow_grid(tower, embedding=tower.patches) == 1
    tower(WIDE)
    assert tower.attn.token_grid(torch.randn(1, 16, 24)) == ((2, 8), 0)


def test_a_grid_that_was_given_goes_first():
    model = vit(dynamic_img_size=True)
    layer = model.blocks[0].attn
    layer.set_input_size((8, 2), num_prefix_tokens=1)
    model(SQUARE)
    assert layer.token_grid(torch.randn(1, 17, 24)) == ((8, 2), 1)
