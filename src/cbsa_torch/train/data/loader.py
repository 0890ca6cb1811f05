"""timm's loader, and what a model is fed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import create_loader, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import Compose, InterpolationMode, RandomAffine

from cbsa_torch.train.config import DataConfig
from cbsa_torch.train.data.augmentation import check_augmentation, keep_one_bit
from cbsa_torch.train.data.seeded import SeededSamples
from cbsa_torch.train.data.workers import ignore_signals_in_workers


class InputSpec(NamedTuple):
    """What a model is fed."""

    input_size: tuple[int, int, int]
    """(channels, height, width)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float

    @property
    def mode(self) -> str:
        """Pillow's name for the colour mode."""
        return "L" if self.input_size[0] == 1 else "RGB"


def input_spec(model: nn.Module, image_size: int | None = None) -> InputSpec:
    """Read from a timm model what images it expects."""
    config = resolve_model_data_config(model)
    channels = _channels(model, config["input_size"][0])
    height, width = _size(model, config["input_size"]) if image_size is None else (image_size, image_size)
    mean, std = config["mean"], config["std"]
    if len(mean) != channels:
        mean, std = (float(np.mean(mean)),) * channels, (float(np.mean(std)),) * channels
    return InputSpec(
        (channels, height, width), tuple(mean), tuple(std), config["interpolation"], config["crop_pct"]
    )


def _size(model: nn.Module, default: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width that the model was built for: its configuration does not know of ``img_size``."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    return (size[0], size[1]) if isinstance(size, tuple) and len(size) == 2 else default[1:]


def _channels(model: nn.Module, default: int) -> int:
    """The image channels of a timm model; those of its first convolution, where it does not say."""
    channels = getattr(model, "in_chans", None)
    first_conv = getattr(model, "pretrained_cfg", {}).get("first_conv")
    if channels is None and isinstance(first_conv, str):
        channels = model.get_parameter(f"{first_conv}.weight").shape[1]
    return default if channels is None else channels


def make_loader(
    dataset: Dataset[Any],
    spec: InputSpec,
    config: DataConfig,
    batch_size: int,
    *,
    train: bool,
    seed: int = 0,
) -> DataLoader[Any]:
    """Timm's loader with its transforms.

    Args:
        dataset: of (Pillow image, label), with a ``transform`` that is set here.
        spec: what the model is fed.
        config: augmentation and workers.
        batch_size: of one process.
        train: random order and augmentation, seeded by (seed, epoch, index) for each sample (:mod:`.seeded`;
            not for data sets that stream); else in order, resized and cropped at the centre.
        seed: of the run.
    """
    augment: dict[str, Any] = {}
    if train:
        check_augmentation(config.auto_augment, spec.mode)
        augment = {
            "scale": config.crop_scale,
            "ratio": config.crop_ratio,
            "hflip": config.hflip,
            "color_jitter": config.color_jitter,
            "auto_augment": config.auto_augment,
        }
    if train and not isinstance(dataset, IterableDataset):
        dataset = SeededSamples(dataset, seed)
    loader = create_loader(
        dataset,
        input_size=spec.input_size,
        batch_size=batch_size,
        is_training=train,
        use_prefetcher=False,
        mean=spec.mean,
        std=spec.std,
        interpolation=spec.interpolation,
        crop_pct=spec.crop_pct,
        num_workers=config.workers,
        persistent_workers=False,  # workers learn the epoch when they start
        pin_memory=torch.cuda.is_available(),
        **augment,
    )
    keep_one_bit(loader.dataset.transform)
    ignore_signals_in_workers(loader)
    if train and (config.rotate or config.shift):
        # timm has no affine augmentation; it goes first, on the image as it was read
        affine = RandomAffine(
            config.rotate, (config.shift, config.shift), interpolation=InterpolationMode.BILINEAR
        )
        loader.dataset.transform = Compose([affine, loader.dataset.transform])
    return loader
