"""What pages need from a run: its images, its model card, and that there is something to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbsa_torch.interpret import Pictures, capture
from cbsa_torch.models.counting import count_model
from cbsa_torch.train.data import open_split, open_splits
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.evaluate import Trained, classifier_config, open_trained
from cbsa_torch.train.predict import eval_transform, read_image
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.base import task_of
from cbsa_torch.train.tasks.segmentation.config import SegmentationTrainConfig
from cbsa_torch.train.tasks.segmentation.splits import open_segmentation, open_segmentation_split


def open_run(checkpoint: str | Path) -> Trained:
    """Open a run whose model has layers to look into."""
    trained = open_trained(checkpoint)
    try:
        with capture(trained.model):
            pass
    except ValueError as error:
        raise ConfigError(f"{checkpoint}: {error}; cbsa eval works") from error
    return trained


def evaluated_split(trained: Trained) -> str:
    """The split a page is about: test, or validation where there is none."""
    if isinstance(trained.config, SegmentationTrainConfig):
        return "val" if open_segmentation(trained.config.data, trained.spec.mode).test is None else "test"
    return "val" if open_splits(classifier_config(trained).data, trained.spec.mode).test is None else "test"


def sample_images(trained: Trained, split: str, count: int) -> tuple[Tensor, np.ndarray, list[int]]:
    """Inputs, pictures in [0, 1] and labels of readable images, evenly spread over a split.

    In an order of their own: folders come class by class, and the first few should be of all classes. What a
    segmenter is shown are squares from the centre, and there are no labels.
    """
    if isinstance(trained.config, SegmentationTrainConfig):
        scenes: Any = open_segmentation_split(
            trained.config.data, trained.spec.mode, split, trained.class_names
        )
        count = min(count, len(scenes))
        squares = [
            eval_transform(trained.spec)(scenes[i * len(scenes) // count][0])
            for i in torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        ]
        stacked = torch.stack(squares)
        return stacked, to_pictures(trained, stacked), []
    dataset: Any = open_split(classifier_config(trained).data, trained.spec.mode, split, trained.class_names)
    count = min(count, len(dataset))
    transform = eval_transform(trained.spec)
    inputs, labels = [], []
    for i in torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist():
        image, label = dataset[i * len(dataset) // count]
        if label >= 0:
            inputs.append(transform(image))
            labels.append(label)
    if not inputs:
        raise DataError(f"none of {count} images of the {split} split could be read")
    batch = torch.stack(inputs)
    return batch, to_pictures(trained, batch), labels


def read_pictures(trained: Trained, files: Sequence[str]) -> Pictures | None:
    """Image files as the model is fed them, titled with what it takes them for; None without files."""
    if not files:
        return None
    inputs = torch.cat([read_image(file, trained.spec) for file in files])
    predicted = [trained.class_names[i] for i in predict(trained, inputs)]
    titles = [f"{Path(file).name}: {name}" for file, name in zip(files, predicted, strict=True)]
    return Pictures(inputs, to_pictures(trained, inputs), titles)


@torch.inference_mode()
def predict(trained: Trained, inputs: Tensor) -> list[int]:
    """The most likely class of each image; of a segmenter, the one of most pixels."""
    found = trained.model(inputs).argmax(1)
    classes: list[int] = found.tolist() if found.ndim == 1 else found.flatten(1).mode(1).values.tolist()
    return classes


def to_pictures(trained: Trained, inputs: Tensor) -> np.ndarray:
    """Inputs without their normalisation: ``(B, height, width[, 3])`` in [0, 1]."""
    mean = torch.tensor(trained.spec.mean).view(1, -1, 1, 1)
    std = torch.tensor(trained.spec.std).view(1, -1, 1, 1)
    pictures = (inputs * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return pictures[..., 0] if pictures.shape[-1] == 1 else pictures


def titles(trained: Trained, inputs: Tensor, labels: Sequence[int]) -> list[str]:
    """What the model takes images for, and what they are where that differs."""
    names = trained.class_names
    if not labels:  # of a segmenter
        return [f"mostly {names[p]}" for p in predict(trained, inputs)]
    return [
        names[p] if p == t else f"{names[p]} (is {names[t]})"
        for p, t in zip(predict(trained, inputs), labels, strict=True)
    ]


def facts(trained: Trained, folder: RunFolder) -> dict[str, str]:
    """The model card."""
    optim, task = trained.config.optim, task_of(trained.config)
    score = trained.info[task.score]
    channels, height, width = trained.spec.input_size
    counts = count_model(trained.model, trained.spec.input_size)
    card = {
        "model": trained.info["model"],
        "parameters": f"{counts.total.parameters:,}",
        "GFLOPs": f"{counts.total.counts.flops / 1e9:.4g} for one image (two per multiply-add)",
        "input": f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}",
        "data": trained.config.data.name,
        "classes": str(len(trained.class_names)),
        "training": (
            f"{optim.epochs} epoch{'s' if optim.epochs > 1 else ''} of {optim.name}, lr {optim.lr:g}, "
            f"batch {optim.batch_size}, seed {trained.config.seed}"
        ),
        "weights": f"epoch {trained.info['epoch']}, validation {task.score_title} {100 * score:.2f} %",
    }
    environment = folder.read_environment()
    known = [
        f"{label}{environment[key][:length]}"
        for label, key, length in (
            ("cbsa_torch ", "cbsa_torch", None),
            ("torch ", "torch", None),
            ("", "device", None),
            ("", "date", 10),
        )
        if isinstance(environment.get(key), str)
    ]
    if known:
        card["trained with"] = ", ".join(known)
    return card
