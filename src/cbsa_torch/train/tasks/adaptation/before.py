"""Accuracy of an original, and of what becomes of it before anything is trained."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from cbsa_torch.train.data import input_spec, make_loader, open_split
from cbsa_torch.train.engine.accelerate import new_accelerator
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.tasks.adaptation.task import Adaptation, AdaptTrainConfig, adapt_original, open_original


class Before(NamedTuple):
    """Top-1 accuracy without training."""

    original: float
    adapted: float


def accuracy_before(config: AdaptTrainConfig, split: str, batch_size: int = 256) -> Before:
    """Of the original and of its adapted copy.

    Args:
        config: of the recovery.
        split: "train", "val" or "test" of its data.
        batch_size: images per forward pass.

    Raises:
        ConfigError: the original does not say which classes it tells apart, or the data have others.
    """
    original = open_original("model.original", str(config.model.original), config.model.image_size)
    if original.class_names is None:
        raise ConfigError(
            f"model.original {config.model.original} does not say which classes it knows: accuracy before "
            "training needs a model that was trained by this library"
        )
    accelerator = new_accelerator(mixed_precision="no")
    spec = input_spec(original.model, config.model.image_size)
    dataset = open_split(config.data, spec.mode, split, original.class_names)
    loader = accelerator.prepare(make_loader(dataset, spec, config.data, batch_size, train=False))

    def top1(model: nn.Module) -> float:
        model = model.to(accelerator.device)
        return Adaptation(config).evaluate(accelerator, model, loader, original.class_names or ()).top1

    return Before(top1(original.model), top1(adapt_original(original, config.model).model))
