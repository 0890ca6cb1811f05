"""timm's loader, and what a model is fed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from accelerate.data_loader import DataLoaderShard
from timm.data import create_loader, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import Compose, InterpolationMode, RandomAffine

from cbsa_torch.models import WhiteBoxTransformer
from cbsa_torch.nn import LinearStem
from cbsa_torch.train.config import DataConfig
from cbsa_torch.train.data.augmentation import check_augmentation, keep_one_bit
from cbsa_torch.train.data.native import (
    FitNativeSize,
    NativeSize,
    RandomNativeCrop,
    TokenBatches,
    at_native_size,
    collate_native,
    image_size,
)
from cbsa_torch.train.data.seeded import SeededSamples
from cbsa_torch.train.data.workers import ignore_signals_in_workers
from cbsa_torch.train.errors import ConfigError


class InputSpec(NamedTuple):
    """What a model is fed."""

    input_size: tuple[int, int, int]
    """(channels, height, width)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_pct: float
    patch_size: int | None = None
    """Side of a patch, of models that take lists of images of any size (``data.native``)."""
    whole_patches: bool = False
    """Whether these models take whole patches only."""

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
    patches: tuple[int | None, bool] = (None, False)
    if isinstance(model, WhiteBoxTransformer):
        patches = model.stem.patch_size, isinstance(model.stem, LinearStem)
    return InputSpec(
        (channels, height, width),
        tuple(mean),
        tuple(std),
        config["interpolation"],
        config["crop_pct"],
        *patches,
    )


def native_size(spec: InputSpec, config: DataConfig, *, train: bool) -> NativeSize:
    """How large images of any size are fed: in training, one must fit into a batch.

    Raises:
        ConfigError: it takes those of one size only.
    """
    if spec.patch_size is None:
        raise ConfigError(
            "data.native needs a model that takes images of several sizes at once, as those of `cbsa list` do"
        )
    limits = [config.max_image_tokens, config.max_tokens if train else None]
    most = min((limit for limit in limits if limit is not None), default=None)
    return NativeSize(spec.patch_size, spec.whole_patches, None if most is None else most - 1)


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


def native_transform(transform: Any, spec: InputSpec, config: DataConfig, *, train: bool) -> Compose:
    """A transform of timm without its resizing and cropping to one size; in training, crops of any size."""
    size = native_size(spec, config, train=train)
    first: list[Any] = [FitNativeSize(size, spec.interpolation)]
    if train:
        first.append(RandomNativeCrop(size, config.crop_scale, config.crop_ratio))
    return at_native_size(transform, first)


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
        batch_size: of one process; the most where data.native fills batches by tokens.
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
    if config.native:
        loader.dataset.transform = native_transform(loader.dataset.transform, spec, config, train=train)
        loader.collate_fn = collate_native
    ignore_signals_in_workers(loader)
    if train and (config.rotate or config.shift):
        # timm has no affine augmentation; it goes first, on the image as it was read
        affine = RandomAffine(
            config.rotate, (config.shift, config.shift), interpolation=InterpolationMode.BILINEAR
        )
        loader.dataset.transform = Compose([affine, loader.dataset.transform])
    return loader


def make_native_loader(
    dataset: Any, spec: InputSpec, config: DataConfig, batch_size: int, *, seed: int
) -> DataLoader[Any]:
    """Batches for training on images of their own sizes, with a budget of tokens: lists of images, and targets.

    They are those of this process: Accelerate leaves the loader as it is.

    Raises:
        ConfigError: a model that cannot take them, data that stream. DataError: fewer images than processes.
    """
    if isinstance(dataset, IterableDataset):
        raise ConfigError("data.native needs the sizes of all images, and cannot take data sets that stream")
    size = native_size(spec, config, train=True)
    tokens = [size.patches(*size.fit(*image_size(dataset, i))) + 1 for i in range(len(dataset))]
    state = PartialState()
    batches = TokenBatches(
        tokens,
        config.max_tokens,
        batch_size,
        seed=seed,
        processes=state.num_processes,
        process=state.process_index,
    )
    plain = make_loader(dataset, spec, config, 1, train=True, seed=seed)
    loader = DataLoaderShard(
        plain.dataset,
        batch_sampler=batches,
        collate_fn=collate_native,
        num_workers=config.workers,
        worker_init_fn=plain.worker_init_fn,
        multiprocessing_context=plain.multiprocessing_context,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )
    loader._is_accelerate_prepared = True
    return loader
