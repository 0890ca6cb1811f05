"""timm's policies: what it would misread is refused before a run begins, and the rest works over its whole range."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from PIL import Image
from timm.data.auto_augment import AugmentOp

from cbsa_torch.train.config import DataConfig
from cbsa_torch.train.data import InputSpec, make_loader
from cbsa_torch.train.data.augmentation import check_augmentation
from cbsa_torch.train.data.checked_images import PlainImages
from cbsa_torch.train.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must begin with one of rand, augmix"),
        ("randm9", "must begin with one of"),
        ("rnad-m9", "did you mean 'rand'?"),
        ("rand-mnine", "has a section 'mnine' that timm would misread"),
        ("rand-m9-", "has a section ''"),
        ("augmix-tweights", "has a section 'tweights'"),
        ("rand-x3", "AssertionError: Unknown RandAugment config section"),
        ("rand-tnothing", "has a section 'tnothing'"),
        ("rand-m9.5", "ValueError: invalid literal for int() with base 10: '9.5'"),
        ("augmix-w0", "has a section 'w0'"),
        ("rand-n0", "has a section 'n0'"),
        ("original-m9", "AssertionError: Unknown AutoAugment config section"),
    ],
)
def test_strange_policies_are_refused(text, message):
    with pytest.raises(ConfigError, match=f"^data.auto_augment .*{re.escape(message)}"):
        check_augmentation(text, "RGB")


def operations(transform):
    """All of timm's operations in a transform, which draws a few for each image."""
    found = []
    for part in transform.transforms:
        found += getattr(part, "ops", [])
        found += [operation for pair in getattr(part, "policy", []) for operation in pair]
    assert all(isinstance(operation, AugmentOp) for operation in found)
    return found


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(
    "policy",
    ["rand-m9-mstd0.5", "rand-m10-inc1", "rand-m0", "rand-m30-mmax30-n3-p1-inc1", "rand-m9-tweights", "rand-t3a-m5",
     "rand-t3aw-m10-mstd101", "augmix-m10-w4-d2-a0.5-b1-mstd2", "augmix", "original", "originalr-mstd5", "v0",
     "v0r-mstd9", "3a-mstd0.5"],
)  # fmt: skip
def test_policies_that_are_accepted_work_at_the_ends_of_their_range(policy, mode):
    random.seed(0), np.random.seed(0)  # timm draws from both
    shape = (40, 30) if mode == "L" else (40, 30, 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    channels = 1 if mode == "L" else 3
    spec = InputSpec((channels, 32, 32), (0.5,) * channels, (0.5,) * channels, "bicubic", 1.0)
    config = DataConfig(auto_augment=policy, workers=0, shift=0.1)
    loader = make_loader(PlainImages([(image, 0)] * 4), spec, config, 4, train=True)
    assert next(iter(loader))[0].shape == (4, channels, 32, 32)
    parts = loader.dataset.transform.transforms[1].transforms
    found = operations(loader.dataset.transform.transforms[1])
    assert found, parts
    for operation in found:
        operation.prob, operation.magnitude_std = 1.0, 0
        for magnitude in {0, 10, operation.magnitude_max or 10}:
            operation.magnitude = magnitude
            assert operation(image).size == image.size


def test_a_policy_is_accepted_whatever_is_drawn():
    for seed in range(50):  # timm's own posterising would refuse about a quarter of them
        random.seed(seed)
        np.random.seed(seed)
        check_augmentation("augmix-m10-w4-d2-a0.5-b1-mstd2", "RGB")
