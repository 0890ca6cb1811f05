"""The report of a run: joins what training knows with what interpretation measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cbsa_torch import CBSA
from cbsa_torch.interpret import report
from cbsa_torch.train.data import open_split, open_splits
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.evaluate import Trained, evaluate_checkpoint, open_trained
from cbsa_torch.train.predict import eval_transform
from cbsa_torch.train.run_folder import RunFolder


def report_run(checkpoint: str | Path, *, images: int = 256, shown: int = 6) -> tuple[float, Path]:
    """Evaluate a run's kept weights on its test split (or, without one, on validation) and write its page.

    Args:
        checkpoint: a run folder.
        images: how many images measure the coding rates.
        shown: how many of them get attention maps.

    Returns:
        The accuracy and the path of ``report.html``.
    """
    trained = open_trained(checkpoint)
    if not any(isinstance(module, CBSA) for module in trained.model.modules()):
        raise ConfigError(f"{trained.info['model']} has no CBSA layer to report on; cbsa eval works")
    folder = RunFolder(trained.path.parent)
    splits = open_splits(trained.config.data, trained.spec.mode)
    split = "val" if splits.test is None else "test"
    evaluation = evaluate_checkpoint(trained.path, split=split)
    inputs, pictures, labels = sample_images(trained, split, images)
    with torch.inference_mode():
        predicted = trained.model(inputs[:shown]).argmax(-1).tolist()
    titles = [
        trained.class_names[p] if p == t else f"{trained.class_names[p]} (is {trained.class_names[t]})"
        for p, t in zip(predicted, labels, strict=False)
    ]
    files = report(
        trained.model,
        inputs,
        pictures,
        folder.path,
        title=f"{trained.info['model']} on {trained.config.data.name}",
        facts=_facts(trained, folder),
        history=folder.read_metrics(),
        evaluation={**evaluation._asdict(), "split": split, "class_names": trained.class_names},
        image_titles=titles,
        shown=shown,
    )
    return evaluation.top1, files.page


def sample_images(trained: Trained, split: str, count: int) -> tuple[Tensor, np.ndarray, list[int]]:
    """Inputs, pictures in [0, 1] and labels of readable images, evenly spread over a split."""
    dataset: Any = open_split(trained.config.data, trained.spec.mode, split, trained.class_names)
    count = min(count, len(dataset))
    transform = eval_transform(trained.spec)
    inputs, labels = [], []
    for i in range(count):
        image, label = dataset[i * len(dataset) // count]
        if label >= 0:
            inputs.append(transform(image))
            labels.append(label)
    if not inputs:
        raise DataError(f"none of {count} images of the {split} split could be read")
    batch = torch.stack(inputs)
    mean = torch.tensor(trained.spec.mean).view(1, -1, 1, 1)
    std = torch.tensor(trained.spec.std).view(1, -1, 1, 1)
    pictures = (batch * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return batch, pictures[..., 0] if pictures.shape[-1] == 1 else pictures, labels


def _facts(trained: Trained, folder: RunFolder) -> dict[str, str]:
    optim = trained.config.optim
    channels, height, width = trained.spec.input_size
    facts = {
        "model": trained.info["model"],
        "parameters": f"{sum(p.numel() for p in trained.model.parameters()):,}",
        "input": f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}",
        "data": trained.config.data.name,
        "classes": str(len(trained.class_names)),
        "training": (
            f"{optim.epochs} epochs of {optim.name}, lr {optim.lr:g}, batch {optim.batch_size}, "
            f"seed {trained.config.seed}"
        ),
        "weights": f"epoch {trained.info['epoch']}, validation accuracy {100 * trained.info['val_top1']:.2f} %",
    }
    if folder.environment.exists():
        environment = json.loads(folder.environment.read_text())
        facts["trained with"] = (
            f"cbsa_torch {environment['cbsa_torch']}, torch {environment['torch']}, {environment['device']}, "
            f"{environment['date'][:10]}"
        )
    return facts
