"""The task of recovering an adapted classifier: classification with a model of two origins."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn

from cbsa_torch.train.config.base import RunConfig
from cbsa_torch.train.data import input_spec, open_splits
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.tasks.adaptation.config import AdaptTrainConfig, check_adaptation
from cbsa_torch.train.tasks.adaptation.distill import Distillation
from cbsa_torch.train.tasks.adaptation.original import Adapted, Original, adapt_original, open_original
from cbsa_torch.train.tasks.base import Loss, Opened
from cbsa_torch.train.tasks.classification import Classification


class Adaptation(Classification):
    """One class for every image, by a ViT whose attention is replaced."""

    def check(self, config: RunConfig) -> None:
        """Refuse settings of data, model and distillation that cannot work."""
        super().check(config)
        check_adaptation(_own(config))

    def open(self, config: RunConfig, skipped: Path, *, continued: bool) -> Opened:
        """The data, the adapted model, and the loss with its teacher."""
        own = _own(config)
        original = open_original("model.original", str(own.model.original), own.model.image_size)
        splits = open_splits(own.data, input_spec(original.model).mode, skipped)
        adapted = adapt_original(original, own.model)
        new_head = _head_for(splits.class_names, original, adapted)
        loss = _distillation(own, original, adapted, splits.class_names)
        _freeze(own.tune, adapted, head=new_head or own.tune_head)
        scale = 1.0 if own.new_lr is None else own.new_lr / own.optim.lr
        return Opened(
            adapted.model,
            adapted.args,
            splits.class_names,
            input_spec(adapted.model, own.model.image_size),
            splits.train,
            splits.val,
            loss,
            {} if scale == 1 else dict.fromkeys(adapted.new, scale),
            str(adapted.report),
        )


def _own(config: RunConfig) -> AdaptTrainConfig:
    return cast(AdaptTrainConfig, config)


def _head_for(class_names: list[str], original: Original, adapted: Adapted) -> bool:
    """Give the adapted model a new head, unless the original's is for these classes; whether that was done."""
    if knows(original, class_names):
        return False
    model: Any = adapted.model
    model.reset_classifier(len(class_names))
    adapted.args["num_classes"] = len(class_names)
    return True


def knows(original: Original, class_names: list[str]) -> bool:
    """Whether it was trained on these classes, as far as it says."""
    count = getattr(original.model, "num_classes", None)
    return count == len(class_names) and original.class_names in (None, class_names)


def _distillation(
    config: AdaptTrainConfig, original: Original, adapted: Adapted, class_names: list[str]
) -> Loss | None:
    """The loss with a teacher; None if none is wanted."""
    distill = config.distill
    if not distill.wanted:
        return None
    teacher, key = original, "model.original"
    if distill.teacher is not None:
        key = "distill.teacher"
        teacher = open_original(key, distill.teacher, config.model.image_size)
    if distill.logits and not knows(teacher, class_names):
        raise ConfigError(
            f"distill.logits needs a teacher of the same classes: {key} was trained on others than the data "
            "have; distill.features works"
        )
    try:
        loss = Distillation(
            adapted.model, teacher.model, distill, config.optim.label_smoothing, config.engine.precision
        )
        loss.check(adapted.model, input_spec(adapted.model, config.model.image_size).input_size)
    except (AttributeError, ValueError) as error:
        raise ConfigError(f"distill.teacher must be built as the original is: {error}") from None
    return loss


def _freeze(tune: str, adapted: Adapted, *, head: bool) -> None:
    """Leave only what is to be trained with gradients."""
    if tune == "all":
        return
    model: Any = adapted.model
    model.requires_grad_(False)
    if tune == "attention":
        for layer in adapted.layers:
            model.get_submodule(layer).requires_grad_(True)
    else:
        for name in adapted.new:
            model.get_parameter(name).requires_grad_(True)
    if head:
        classifiers = model.get_classifier()  # two of a distilled DeiT
        for classifier in classifiers if isinstance(classifiers, tuple) else (classifiers,):
            cast(nn.Module, classifier).requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            f"tune {tune!r} leaves nothing to train: {adapted.report.mixer!r} adds no parameters here; "
            'use "attention" or "all"'
        )
