"""Encoder and decoder together: any encoder, any image size, frozen or not, in a file and back."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from cbsa_torch.models import MaskTransformerDecoder, Segmenter, load_checkpoint, save_checkpoint, segmenter
from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.models.counting import count_model
from cbsa_torch.models.segmentation.features import strides
from tests.helpers.compare import assert_close

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
ENCODERS = [
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "cbt_tiny_patch16_224",
    "cbt_nano_patch4_64",
]


def small(encoder="vit_tiny_patch16_224", **kwargs):
    kwargs = {"num_classes": 5, "depth": 2, "num_heads": 2, "head_dim": 8, "encoder_args": SMALL, **kwargs}
    return segmenter(encoder=encoder, **kwargs)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("size", [(300, 500), (9, 40)], ids=str)
def test_images_are_padded_prefix_tokens_dropped_and_masks_cropped(encoder, size):
    if "nano" in encoder:
        size = (size[0] // 4 + 1, size[1] // 4)  # as many patches
    model = small(encoder).eval()
    x, patch = torch.randn(1, 3, *size), model.strides[0]
    padded = F.pad(x, (0, -size[1] % patch, 0, -size[0] % patch))
    grid = (padded.shape[2] // patch, padded.shape[3] // patch)
    with torch.no_grad():
        tokens = model.encoder.forward_features(padded)
        prefix = tokens.shape[1] - grid[0] * grid[1]
        assert prefix == model.encoder.num_prefix_tokens >= 1
        features = tokens[:, prefix:].mT.reshape(1, 32, *grid)
        assert_close(model.forward_features(x), features, 1e-5)
        expected = model.decoder(features, padded.shape[2:])[..., : size[0], : size[1]]
        assert_close(model(x), expected, 1e-5)


def test_a_vit_of_timm_sees_two_columns_of_patches_at_least():
    model, x = small().eval(), torch.randn(1, 3, 40, 9)
    with torch.no_grad():
        assert torch.equal(model(x), model(F.pad(x, (0, 23, 0, 8)))[..., :40, :9])


POOLED = "vit_pwee_patch16_reg1_gap_256"
"""Its classifier has a norm of its own, which features do not need."""


@pytest.mark.parametrize("encoder", [*ENCODERS, POOLED])
def test_gradients_reach_everything(encoder):
    model = small(encoder)
    masks = model(torch.randn(2, 3, 50, 70))
    F.cross_entropy(masks, torch.randint(5, (2, 50, 70))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert 0 < parameter.grad.norm() < math.inf, name


NATIVE = [(50, 70), (9, 40), (17, 33), (9, 40), (64, 48)]


@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ("cbt_nano_patch4_64", {}),
        ("cbt_nano_patch4_64", {"mixer": "mssa", "dim": 24, "learned_step": True}),
        ("cbt_nano_patch4_64", {"mixer_args": {"step": "certified"}, "head_dim": 4}),
        ("cbt_nano_patch4_64", {"mixer": "agent", "freeze_encoder": True}),
        ("vit_tiny_patch16_224", {"mixer": "mhsa"}),
        ("vit_tiny_patch16_224", {"mixer": "tssa", "num_classes": 1}),
    ],
)
def test_each_image_of_a_list_is_as_it_would_be_alone(encoder, options):
    model = small(encoder, **options).double().eval()
    images = [torch.randn(3, *size, dtype=torch.float64, requires_grad=True) for size in NATIVE]
    packed, alone = model(images), [model(image[None])[0] for image in images]
    inputs = {} if model.freeze_encoder else {f"image {i}": image for i, image in enumerate(images)}
    inputs |= {name: p for name, p in model.named_parameters() if p.requires_grad}

    def gradients(outputs):
        weighted = [(y * torch.arange(float(y.numel())).view_as(y).cos()).sum() for y in outputs]
        return torch.autograd.grad(sum(weighted), inputs.values(), allow_unused=True)

    for image, ours, theirs in zip(images, packed, alone, strict=True):
        assert ours.shape[1:] == image.shape[1:]
        assert_close(ours.detach(), theirs.detach(), 1e-10)
    for name, ours, theirs in zip(inputs, gradients(packed), gradients(alone), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:  # timm resamples positions in float32
            assert_close(ours, theirs, 1e-7 if (encoder[:3], name) == ("vit", "encoder.pos_embed") else 1e-10)


def test_lists_are_one_packed_batch(monkeypatch):
    """Neither padded nor one by one: every layer of encoder and decoder runs once."""
    model, calls = small("cbt_nano_patch4_64").eval(), []
    for module in [*model.encoder.blocks, *model.decoder.layers]:
        module.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    model([torch.randn(3, 8, 12), torch.randn(3, 4, 4), torch.randn(3, 16, 4)])
    assert calls == [6 + 1 + 4 + 3] * 2 + [6 + 1 + 4 + 3 * 5] * 2


def test_features_without_intermediates():
    class Plain(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.patch_embed, self.num_features = inner, inner.patch_embed, inner.num_features

        def forward_features(self, x):
            return self.inner.forward_features(x)

    model = small("vit_small_patch14_reg4_dinov2").eval()
    plain = Segmenter(Plain(model.encoder), model.decoder).eval()
    x = torch.randn(1, 3, 30, 60)
    assert_close(plain(x), model(x), 1e-6)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_hierarchical_encoders(name):
    model = segmenter(encoder=name, num_classes=3, num_heads=2, head_dim=8).eval()
    assert model.strides == (32, 32)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 100, 70)).shape == (1, 3, 100, 70)


def test_patches_that_are_not_squares():
    encoder = timm.create_model(
        "vit_tiny_patch16_224", **SMALL, patch_size=(8, 16), num_classes=0, dynamic_img_size=True
    )
    assert strides(encoder) == (8, 16)
    model = Segmenter(encoder, MaskTransformerDecoder(2, 32, 1, 2, 8)).eval()
    assert model.forward_features(torch.randn(1, 3, 20, 20)).shape == (1, 32, 3, 2)
    assert model(torch.randn(1, 3, 20, 20)).shape == (1, 2, 20, 20)


def test_a_frozen_encoder_stays_as_it_is():
    model = small("cbt_tiny_patch16_224", freeze_encoder=True).train()
    assert not any(module.training for module in model.encoder.modules())
    assert all(module.training for module in model.decoder.modules())
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    x = torch.randn(2, 3, 64, 64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    features = model.forward_features(x)
    assert not features.requires_grad
    model(x).square().sum().backward()
    optimizer.step()
    assert all(p.grad is None for p in model.encoder.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())
    after = model.encoder.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)  # the statistics of batch norm, too
    trained = small("cbt_tiny_patch16_224").train()
    assert all(module.training for module in trained.modules())


@pytest.mark.parametrize(
    ("encoder", "mixer"),
    [*((encoder, "cbsa") for encoder in ENCODERS), (ENCODERS[0], "mssa"), (ENCODERS[0], "mhsa")],
)
def test_a_file_and_back(tmp_path, encoder, mixer):
    args = {"encoder": encoder, "encoder_args": SMALL, "img_size": 56, "freeze_encoder": True}
    args |= {"mixer": mixer, "num_classes": 3, "depth": 1, "num_heads": 2, "head_dim": 8, "dim": 24}
    args["mixer_args"] = {"tied": True} if mixer != "mhsa" else {}
    model = timm.create_model("segmenter", **args).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    save_checkpoint(tmp_path / "model.safetensors", model, {"model": "segmenter", "model_args": args})
    twin, info = load_checkpoint(tmp_path / "model.safetensors")
    assert isinstance(twin, Segmenter)
    assert twin.freeze_encoder
    assert info["model_args"] == args
    x = torch.randn(1, 3, 30, 70)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize(
    "args",
    [
        {"pretrained_encoder": True},
        {"encoder": "hf-hub:somebody/something"},
        {"encoder_args": {"pretrained": True}},
        {"encoder_args": {"checkpoint_path": "elsewhere.pth"}},
    ],
    ids=str,
)
def test_a_file_cannot_fetch(tmp_path, args):
    model = small()
    path = tmp_path / "model.safetensors"
    with pytest.raises((CheckpointError, ValueError), match=r"not allowed|cannot build"):
        save_checkpoint(path, model, {"model": "segmenter", "model_args": args})
        load_checkpoint(path)


def test_timm_knows_how_to_prepare_images():
    model = timm.create_model("segmenter", encoder="vit_tiny_patch16_224", num_classes=7)
    config = timm.data.resolve_model_data_config(model)
    assert config["mean"] == tuple(model.encoder.pretrained_cfg["mean"]) == (0.5, 0.5, 0.5)
    assert model.pretrained_cfg["num_classes"] == model.num_classes == 7
    assert timm.create_model("segmenter", encoder="cbt_pico_patch1_8").in_chans == 1
    assert small(in_chans=4)(torch.randn(1, 4, 32, 32)).shape == (1, 5, 32, 32)


def test_norm_eps_of_the_encoder():
    def epsilons(**kwargs):
        return {m.eps for m in small(**kwargs).encoder.modules() if isinstance(m, nn.LayerNorm)}

    assert epsilons() == {1e-6}
    assert epsilons(encoder_norm_eps=1e-5) == {1e-5}


def test_new_classes_and_another_size():
    model = small("cbt_tiny_patch16_224")
    model.reset_classifier(2)
    assert model.num_classes == 2
    model.set_input_size(img_size=(64, 96))
    assert model.encoder.pos_embed.shape[1] == 1 + 4 * 6
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 2, 64, 96)
    model.set_grad_checkpointing()
    assert model.encoder.grad_checkpointing
    with pytest.raises(ValueError, match="global_pool must be empty"):
        model.reset_classifier(2, "avg")


def test_weight_decay_spares_what_both_parts_name():
    model = small("cbt_tiny_patch16_224")
    spared = model.no_weight_decay()
    assert {"encoder.pos_embed", "decoder.class_embed", "decoder.layers.0.attn.step_tokens"} <= spared
    assert spared <= {name for name, _ in model.named_parameters()}


PUBLISHED = {
    ("vit_tiny_patch16_224", 512): 1.5,
    ("vit_small_patch16_224", 512): 2.3,
    ("vit_base_patch16_224", 512): 7.8,
    ("vit_large_patch16_224", 640): 22.3,
}


@pytest.mark.parametrize(("encoder", "side"), PUBLISHED)
def test_decoder_flops_as_published(encoder, side):
    model = segmenter(encoder=encoder, encoder_args={"depth": 1})
    counted = count_model(model, (3, side, side))
    layers = [layer for layer in counted.layers if layer.name.startswith("decoder.layers")]
    flops = sum(layer.counts.flops for layer in layers)
    assert round(flops / 1e9, 1) == PUBLISHED[encoder, side]


@pytest.mark.parametrize(("mixer", "per_head"), [("cbsa", "linear"), ("mssa", "square"), ("mhsa", "square")])
def test_every_mixer_is_counted(mixer, per_head):
    model = small(mixer=mixer)
    counted = count_model(model, (3, 96, 128))
    assert counted.total.counts.flops == counted.torch_flops
    n, m, heads = 6 * 8 + 5, 48, 2  # all 48 cells are representatives
    similarities = n * m + m * (m + 1) // 2 if per_head == "linear" else n * n
    rows = {layer.name: layer for layer in counted.layers}
    for i in range(2):
        assert rows[f"decoder.layers.{i}.attn"].counts.similarities == heads * similarities
    assert rows["decoder.similarity"].counts.flops == 2 * 48 * 5 * 32


def test_compiles_in_one_graph_and_exports():
    model = small("cbt_nano_patch4_64").eval()
    x = torch.randn(1, 3, 30, 42)
    expected = model(x)
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, 1e-5)
    assert_close(torch.export.export(model, (x,)).module()(x), expected, 1e-5)


def test_bad_parts_are_named():
    decoder = MaskTransformerDecoder(5, 32, 1, 2, 8)
    with pytest.raises(TypeError, match="encoder must offer forward_intermediates or forward_features"):
        Segmenter(nn.Linear(3, 3), decoder)
    with pytest.raises(
        ValueError, match="decoder must take the encoder's 192 channels, got one with encoder_dim=32"
    ):
        Segmenter(timm.create_model("vit_tiny_patch16_224"), decoder)
    with pytest.raises(ValueError, match="'vit_tiny_patch16_2240'; did you mean 'vit_tiny_patch16_224'"):
        segmenter(encoder="vit_tiny_patch16_2240")
    with pytest.raises(TypeError, match="segmenter has no option mixr"):
        segmenter(mixr="cbsa")
    with pytest.raises(TypeError, match="dropth"):
        segmenter(encoder_args={"dropth": 3})
    with pytest.raises(ValueError, match="'segmenter' has a decoder already"):
        segmenter(encoder="segmenter")
    with pytest.raises(TypeError, match="freeze_encoder must be True or False"):
        segmenter(freeze_encoder=1)


def test_wrong_images_are_named():
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, height, width\), got \(1, 1, 8, 8\)"):
        small()(torch.randn(1, 1, 8, 8))
    with pytest.raises(TypeError, match="images must have a floating-point dtype"):
        small()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    fixed = timm.create_model("vit_tiny_patch16_224", **SMALL)
    model = Segmenter(fixed, MaskTransformerDecoder(5, 32, 1, 2, 8))
    assert model(torch.randn(1, 3, 220, 224)).shape == (1, 5, 220, 224)
    with pytest.raises(
        ValueError, match=r"built for images of \(224, 224\), got \(240, 224\).*dynamic_img_size"
    ):
        model(torch.randn(1, 3, 230, 224))
    for wrong, kind, message in (
        ([], ValueError, "images must not be an empty list"),
        (
            [torch.zeros(3, 16, 16), torch.zeros(1, 8, 8)],
            ValueError,
            r"list of images must have shape \(3, height",
        ),
        ([torch.zeros(3, 16, 16), torch.zeros(1, 3, 8, 8)], ValueError, r"got \(1, 3, 8, 8\)"),
        ([torch.zeros(3, 16, 0)], ValueError, r"got \(3, 16, 0\)"),
        ([[1.0]], TypeError, "each of a list of images must be a torch.Tensor, got list"),
    ):
        for encoder in ("vit_tiny_patch16_224", "cbt_nano_patch4_64"):
            with pytest.raises(kind, match=message):
                small(encoder)(wrong)
