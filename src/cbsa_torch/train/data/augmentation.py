"""timm's automatic augmentation, tried before a run begins, and kept from an error that comes up seldom."""

from __future__ import annotations

import itertools
import re
from typing import Any

from PIL import Image
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    posterize,
    rand_augment_transform,
)
from torchvision.transforms import Compose

from cbsa_torch._core.checks import nearest
from cbsa_torch._core.random import keep_random_states
from cbsa_torch.train.errors import ConfigError

POLICIES = {
    "rand": rand_augment_transform,
    "augmix": augment_and_mix_transform,
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), auto_augment_transform),
}
"""timm's policies, and what builds a transform from their description."""
_SETS = ("tweights", "t3a", "t3aw")
"""Sets of operations that "rand" may choose from, besides its own."""


def check_augmentation(text: str | None, mode: str) -> None:
    """Build the transform that timm describes by a policy and sections, such as "rand-m9-n3", and try it once.

    Args:
        text: ``data.auto_augment``. None: no augmentation.
        mode: colour mode of the images, "L" or "RGB".

    Raises:
        ConfigError: timm cannot use it, or would misread a section in silence.
    """
    if text is None:
        return
    policy, *sections = text.split("-")
    if policy not in POLICIES:
        raise ConfigError(
            f"data.auto_augment must begin with one of {', '.join(POLICIES)}, got "
            f"{text!r}{nearest(policy, POLICIES)}"
        )
    for section in sections:
        # timm passes over what has no number, and makes no operations (n0) or black images (w0) of zero
        is_read = re.fullmatch(r"(?![nw]0)[a-z]+[0-9.]+", section) or (policy == "rand" and section in _SETS)
        if not is_read:
            raise ConfigError(
                f"data.auto_augment {text!r} has a section {section!r} that timm would misread; a section is a "
                "name and a number, such as m9"
            )
    options = {"translate_const": 10, "img_mean": (128,) * len(mode)}
    try:
        transform = Compose([POLICIES[policy](text, options)])
        keep_one_bit(transform)  # as the loader does
        with keep_random_states():
            transform(Image.new(mode, (32, 32)))
    except Exception as error:  # timm raises AssertionError, KeyError, ValueError and others
        raise ConfigError(
            f"data.auto_augment {text!r} cannot be used: {type(error).__name__}: {error}"
        ) from error


def keep_one_bit(transform: Any) -> None:
    """Let timm's posterising leave at least one bit, in a composition of transforms.

    At the ends of its range it asks for none, which Pillow refuses (12.3): a run with "rand-m9-mstd0.5-inc1"
    would stop after some hundred images.
    """
    for part in getattr(transform, "transforms", ()):
        operations = getattr(part, "ops", None) or itertools.chain(*getattr(part, "policy", ()))
        for operation in operations:
            if getattr(operation, "aug_fn", None) is posterize:
                operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    posterized: Image.Image = posterize(image, max(bits, 1), **options)
    return posterized
