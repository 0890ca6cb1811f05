"""Lists of images of any sizes through the white-box Transformer: each as it would be alone."""

import pytest
import timm
import torch

import cbsa_torch.models  # noqa: F401  (registers our models with timm)
from cbsa_torch.nn import ConvStem
from tests.helpers.compare import assert_close

SMALL = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
SIZES = [(16, 24), (9, 5), (16, 24), (4, 4), (31, 8)]
FAMILIES = {
    "cbt": {},
    "cbt certified": {"step": "certified"},
    "cbt exact": {"contraction": "exact"},
    "crate": {},
    "tost": {},
    "linear_cbt": {},
    "agent": {},
    "stem_vit": {},
}


def build(family, **options):
    torch.manual_seed(0)
    model = timm.create_model(f"{family.split()[0]}_nano_patch4_32", **SMALL, **FAMILIES[family], **options)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    return model.double().eval()


def pictures(sizes=SIZES):
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(3, *size, generator=generator, dtype=torch.float64, requires_grad=True) for size in sizes
    ]


def gradients(model, images, logits):
    weights = torch.arange(1.0, logits.numel() + 1).view_as(logits).double().cos()
    inputs = [*images, *model.parameters()]
    return torch.autograd.grad((logits * weights).sum(), inputs, allow_unused=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_image_of_a_list_is_as_it_would_be_alone(family):
    model, images = build(family), pictures()
    packed = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    assert_close(packed, alone, 1e-10)
    for ours, theirs in zip(gradients(model, images, packed), gradients(model, images, alone), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, theirs, 1e-10)


def test_features_and_maps_of_a_list_are_those_of_each_image():
    model, images = build("cbt"), pictures()
    for found, image in zip(model.forward_features(images), images, strict=True):
        assert_close(found, model.forward_features(image[None])[0], 1e-10)
    for options in ({}, {"output_fmt": "NLC", "norm": True}, {"indices": 1, "stop_early": True}):
        last, layers = model.forward_intermediates(images, return_prefix_tokens=True, **options)
        for i, image in enumerate(images):
            alone, theirs = model.forward_intermediates(image[None], return_prefix_tokens=True, **options)
            assert_close(last[i], alone[0], 1e-10)
            assert len(layers) == len(theirs)
            for (maps, prefix), (their_map, their_prefix) in zip(layers, theirs, strict=True):
                assert_close(maps[i], their_map[0], 1e-10)
                assert_close(prefix[i], their_prefix[0], 1e-10)
    told = model.forward_intermediates(images, output_dict=True, return_prefix_tokens=True)
    assert [len(told[key]) for key in ("image_intermediates", "image_intermediates_prefix")] == [2, 2]
    assert len(told["image_features"]) == len(images)


@pytest.mark.parametrize("pool", ["avg", "avgmax", ""])
def test_pooling_is_of_each_image(pool):
    model, images = build("cbt", global_pool=pool), pictures()
    for logits, image in zip(model(images), images, strict=True):
        assert_close(logits, model(image[None])[0], 1e-10)


def test_recomputed_layers_and_linear_stems_take_lists():
    model, images = build("cbt"), pictures()
    model.stem.eval(), model.train()
    expected = gradients(model, images, model(images))
    model.set_grad_checkpointing()
    for ours, theirs in zip(gradients(model, images, model(images)), expected, strict=True):
        assert_close(ours, theirs, 1e-12)
    linear = timm.create_model("cbt_nano_patch4_32", **SMALL, stem="linear").double().eval()
    images = pictures([(8, 4), (4, 4)])
    assert_close(linear(images), torch.cat([linear(image[None]) for image in images]), 1e-10)
    with pytest.raises(ValueError, match="multiples of patch_size 4 for a linear stem, got 9 x 5"):
        linear(pictures([(8, 4), (9, 5)]))


def test_batch_norms_in_training_see_the_pixels_of_all_images():
    torch.manual_seed(0)
    stem, other = (ConvStem(3, 8, 2).double() for _ in range(2))  # one convolution: no padding between maps
    other.load_state_dict(stem.state_dict())
    small, large = torch.randn(2, 3, 4, 6).double(), torch.randn(1, 3, 8, 10).double()
    maps = stem.forward_list([small, large])
    conv, norm = other.proj[0]
    pixels = torch.cat([conv(x).movedim(1, 0).flatten(1) for x in (small, large)], 1)  # (C, pixels)
    mean, variance = pixels.mean(1), pixels.var(1, correction=0)
    for x, found in zip((small, large), maps, strict=True):
        expected = (conv(x) - mean.view(-1, 1, 1)) / (variance + norm.eps).sqrt().view(-1, 1, 1)
        assert_close(found, expected, 1e-10)
    assert_close(stem.proj[0][1].running_mean, 0.1 * mean, 1e-10)
    alike = torch.randn(3, 3, 4, 4).double()
    assert_close(stem.forward_list([alike])[0], other(alike), 1e-10)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "must not be an empty list"),
        ([torch.zeros(1, 3, 8, 8)], r"tensor \(C, height, width\), got \(1, 3, 8, 8\)"),
        ([[1.0]], "got list"),
        ([torch.zeros(1, 8, 8).double()], r"images must have shape \(B, 3, height, width\)"),
    ],
)
def test_bad_lists_are_named(images, message):
    with pytest.raises(ValueError, match=message):
        build("cbt")(images)
