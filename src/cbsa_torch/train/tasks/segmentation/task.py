"""The task of segmenting images: a class for every pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from cbsa_torch.train.build import build_model, draft_model
from cbsa_torch.train.config.base import RunConfig
from cbsa_torch.train.data import InputSpec, input_spec
from cbsa_torch.train.data.seeded import SeededSamples
from cbsa_torch.train.data.workers import ignore_signals_in_workers
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.tasks.base import Opened
from cbsa_torch.train.tasks.segmentation.config import (
    SegmentationTrainConfig,
    check_data_config,
    check_windows,
)
from cbsa_torch.train.tasks.segmentation.encoder import encoder_weights, load_encoder, with_encoder
from cbsa_torch.train.tasks.segmentation.measure import SegmentationEvaluation, Windows, measure, share
from cbsa_torch.train.tasks.segmentation.splits import open_segmentation
from cbsa_torch.train.tasks.segmentation.transforms import evaluation_transform, training_transform


class Segmentation:
    """One class for every pixel."""

    score = "val_miou"
    score_title = "mean IoU"

    def check(self, config: RunConfig) -> None:
        """Refuse settings of data, windows and model that cannot work."""
        own = _own(config)
        check_data_config(own.data)
        check_windows(own)
        if own.model.name != "segmenter":
            raise ConfigError(f"model.name must be 'segmenter' for segmentation, got {own.model.name!r}")
        if own.model.init_from is not None and own.model.encoder_from is not None:
            raise ConfigError("model.init_from and model.encoder_from exclude each other, got both")

    def open(self, config: RunConfig, skipped: Path, *, continued: bool) -> Opened:
        """The data sets, and the model with a mask for each of their classes."""
        own = _own(config)
        weights = None if continued else encoder_weights(own)
        own = with_encoder(own)
        draft = draft_model(own)
        splits = open_segmentation(own.data, input_spec(draft[0]).mode, skipped)
        if len(splits.class_names) < 2:
            raise DataError(
                f"{own.data.name} has one class, {splits.class_names}, and nothing to tell it from: what is "
                "around it (the background) needs a class of its own"
            )
        model, model_args = build_model(own, len(splits.class_names), draft)
        if weights is not None:
            load_encoder(model, weights, str(own.model.encoder_from))
        known = input_spec(model)
        spec = InputSpec(
            (known.input_size[0], own.data.crop_size, own.data.crop_size),
            known.mean,
            known.std,
            known.interpolation,
            1.0,
        )
        _check_size(model, spec.input_size)
        splits.train.transform = training_transform(own.data, spec.mean, spec.std)  # type: ignore[attr-defined]
        splits.val.transform = evaluation_transform(spec.mean, spec.std)  # type: ignore[attr-defined]
        return Opened(model, model_args, splits.class_names, spec, splits.train, splits.val)

    def training_loader(self, config: RunConfig, opened: Opened, batch_size: int) -> DataLoader[Any]:
        """Augmented crops in random order."""
        loader: DataLoader[Any] = DataLoader(
            SeededSamples(opened.train, config.seed),
            batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=config.data.workers,
        )
        ignore_signals_in_workers(loader)
        return loader

    def validation_loader(
        self, config: RunConfig, opened: Opened, batch_size: int, accelerator: Accelerator
    ) -> Any:
        """Whole images one by one, each for one process."""
        return share(opened.val, config.data.workers, accelerator)

    def evaluate(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        model: nn.Module,
        loader: Any,
        class_names: Sequence[str],
        advance: Callable[[], None],
        check: Callable[[], None],
    ) -> SegmentationEvaluation:
        """Mean IoU by windows of the training crop's size, or as configured."""
        own = _own(config)
        windows = Windows(own.window(), own.windows.stride, own.windows.batch)
        return measure(accelerator, model, loader, class_names, windows, advance, check)


@torch.no_grad()
def _check_size(model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Let a crop through, before a run touches anything: some encoders take images of one size only."""
    model.eval()
    try:
        model(torch.zeros(1, *input_size))
    except ValueError as error:
        raise ConfigError(f"data.crop_size {input_size[1]} does not fit the model: {error}") from error


def _own(config: RunConfig) -> SegmentationTrainConfig:
    return cast(SegmentationTrainConfig, config)
