"""Transforms of image and mask: they stay together, and no label is made up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from cbsa_torch.train.tasks.segmentation import (
    IGNORE,
    SegmentationDataConfig,
    evaluation_transform,
    training_transform,
)
from cbsa_torch.train.tasks.segmentation.transforms import largest_share, photometric_distortion

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def training(**changes):
    return training_transform(SegmentationDataConfig(**changes), MEAN, STD)


def sample(height, width, seed=0, labels=(0, 3, 9, 200, IGNORE)):
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels), generator.choice(labels, (height, width))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 99))
def test_no_label_is_made_up(height, width, seed):
    image, mask = sample(height, width, seed)
    torch.manual_seed(seed)
    got, labels = training(crop_size=32, base_size=24)(image, mask)
    assert got.shape == (3, 32, 32)
    assert got.dtype == torch.float32
    assert labels.shape == (32, 32)
    assert labels.dtype == torch.int64
    assert type(got) is type(labels) is torch.Tensor
    assert set(labels.unique().tolist()) <= {*np.unique(mask).tolist(), IGNORE}


def test_image_and_mask_stay_together():
    """The image shows the mask as grey levels; whatever is cut, scaled and mirrored, it still does."""
    mask = np.kron(np.random.default_rng(0).integers(0, 5, (6, 8)), np.ones((20, 20), dtype=np.int64))
    image = Image.fromarray((50 * mask).astype(np.uint8)).convert("RGB")
    transform = training(crop_size=64, base_size=120, photometric=False)
    agreement = []
    for seed in range(20):
        torch.manual_seed(seed)
        got, labels = transform(image, mask)
        levels = (got * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
        known = labels != IGNORE
        agreement.append(((levels - 50 * labels).abs()[:, known] < 1).float().mean().item())
    assert min(agreement) > 0.75  # the rest are edges, where the image is interpolated


def test_padding_has_the_mean_colour_and_is_ignored():
    image, mask = sample(10, 30, labels=(0, 1))
    got, labels = training(crop_size=48, base_size=10, scale=(1.0, 1.0), photometric=False, hflip=0.0)(
        image, mask
    )
    padding = labels == IGNORE
    assert (~padding).sum() == 300
    assert got[:, padding].abs().max() < 0.5 / 255 / min(STD) + 1e-6


def test_scales_and_places_vary():
    image, mask = sample(64, 64, labels=(0, 1))
    transform = training(crop_size=64, scale=(0.5, 2.0))
    shares = []
    for seed in range(60):
        torch.manual_seed(seed)
        shares.append((transform(image, mask)[1] != IGNORE).double().mean().item())
    assert min(shares) < 0.35  # scale 0.5 fills a quarter
    assert shares.count(1.0) > 20


def test_evaluation_keeps_the_whole_image():
    image, mask = sample(30, 50)
    got, labels = evaluation_transform(MEAN, STD)(image, mask)
    expected = (np.asarray(image) / 255 - MEAN) / STD
    np.testing.assert_allclose(got.permute(1, 2, 0), expected, atol=1e-5)
    assert labels.tolist() == mask.tolist()


def test_grey_images_are_treated_like_colour_images_of_equal_channels():
    image, mask = sample(30, 50)
    grey = image.convert("L")
    options = {"crop_size": 16, "photometric": False}
    for seed in range(10):
        shown = []
        for mode, channels in (("L", 1), ("RGB", 3)):
            transform = training_transform(
                SegmentationDataConfig(**options), (0.5,) * channels, (0.5,) * channels
            )
            torch.manual_seed(seed)
            shown.append(transform(grey.convert(mode), mask))
        assert shown[0][0].shape == (1, 16, 16)
        assert torch.equal(shown[0][0].expand(3, -1, -1), shown[1][0])
        assert torch.equal(shown[0][1], shown[1][1])
    distorted = training_transform(SegmentationDataConfig(crop_size=16), (0.5,), (0.5,))(grey, mask)[0]
    assert distorted.shape == (1, 16, 16)
    whole = evaluation_transform((0.5,), (0.5,))(grey, mask)[0]
    np.testing.assert_allclose(whole[0], np.asarray(grey) / 127.5 - 1, atol=1e-5)


def test_crops_avoid_a_single_class():
    """Nine tenths of the image are one class; crops with enough of the other are preferred."""
    mask = np.zeros((40, 400), dtype=np.int64)
    mask[:, 360:] = 1
    image = Image.new("RGB", (400, 40))
    shares = {}
    for limit in (None, 0.75):
        transform = training(
            crop_size=40, scale=(1.0, 1.0), max_class_share=limit, photometric=False, hflip=0.0
        )
        torch.manual_seed(0)
        mixed = [largest_share(transform(image, mask)[1]) <= 0.75 for _ in range(100)]
        shares[limit] = sum(mixed)
    assert shares[None] < 20
    assert shares[0.75] > 30  # 1 - (1 - p)^10 with p about 0.06


def test_the_share_of_a_padded_crop_is_that_of_its_labels():
    assert largest_share(torch.full((2, 2), IGNORE)) == 1.0
    assert largest_share(torch.tensor([0, 0, 0, 1, IGNORE])) == 0.75


def test_photometric_distortion_changes_the_image_only_and_swaps_no_channels():
    red = tv_tensors.Image(torch.tensor([200, 40, 40], dtype=torch.uint8)[:, None, None].expand(3, 8, 8))
    mask = tv_tensors.Mask(torch.arange(64).reshape(8, 8))
    changed = 0
    torch.manual_seed(0)
    for _ in range(300):
        image, labels = photometric_distortion()(red, mask)
        assert torch.equal(labels, mask)
        channels = image.double().mean((1, 2))
        assert channels.argmax() == 0
        changed += not torch.equal(image, red)
    assert 260 < changed < 297  # all four are left out in one of 16
    assert not any(isinstance(m, v2.RandomChannelPermutation) for m in photometric_distortion().modules())


@pytest.mark.parametrize(("hflip", "axes"), [(1.0, (-1,)), (0.0, ())])
def test_flips_flip_both(hflip, axes):
    image, mask = sample(16, 16)
    got, labels = training(crop_size=16, scale=(1.0, 1.0), photometric=False, hflip=hflip)(image, mask)
    whole, expected = evaluation_transform(MEAN, STD)(image, mask)
    assert torch.equal(labels, expected.flip(axes))
    assert torch.equal(got, whole.flip(axes))
