"""What ``cbsa report`` and ``cbsa compare`` need of a run: the model, images and titles, facts about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cbsa_torch.cli.options import OtherOptions, open_on
from cbsa_torch.interpret import Pictures, capture
from cbsa_torch.models.counting import count_model
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.base import Trained, eval_transform, read_image


def open_run(checkpoint: str | Path, other: OtherOptions | None = None) -> Trained:
    """As :func:`open_on`, of a model that has layers to look into."""
    trained = open_on(checkpoint, OtherOptions() if other is None else other)
    if not trained.task.takes_images:
        raise ConfigError(
            f"{checkpoint}: pages show images, and this model takes slides; cbsa eval and cbsa predict work, "
            "and cbsa_torch.interpret in Python"
        )
    try:
        with capture(trained.model):
            pass
    except ValueError as error:
        raise ConfigError(f"{checkpoint}: {error}; cbsa eval works") from error
    return trained


def read_inputs(trained: Trained, files: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Image files as the model is fed them, and titles with what it takes them for."""
    if not files:
        return torch.zeros(0, *trained.spec.input_size), []
    transform = eval_transform(trained.spec)
    inputs = torch.stack([transform(read_image(Path(file), trained.spec.mode)) for file in files])
    predicted = [trained.class_names[label] for label in predict(trained, inputs)]
    return inputs, [f"{Path(file).name}: {name}" for file, name in zip(files, predicted, strict=True)]


@torch.inference_mode()
def predict(trained: Trained, inputs: Tensor) -> list[int]:
    """The most likely class of each image; of a segmenter, the one of most pixels."""
    return trained.task.main_class(trained.model(inputs))


def pictures(trained: Trained, inputs: Tensor, titles: Sequence[str]) -> Pictures:
    """Inputs to be shown without their normalisation."""
    return Pictures.of(inputs, titles, mean=trained.spec.mean, std=trained.spec.std)


def titles(trained: Trained, inputs: Tensor, labels: Sequence[int]) -> list[str]:
    """What the model takes images for, and what they are where that differs."""
    names = trained.class_names
    if not trained.task.one_class_per_image:
        return [f"mostly {names[p]}" for p in predict(trained, inputs)]
    return [
        names[p] if p == t else f"{names[p]} (is {names[t]})"
        for p, t in zip(predict(trained, inputs), labels, strict=True)
    ]


def facts(trained: Trained, folder: RunFolder) -> dict[str, str]:
    """Names and values for the table of facts about a run."""
    optim, task = trained.config.optim, trained.task
    channels, height, width = trained.spec.input_size
    counts = count_model(trained.model, trained.spec.input_size)
    card = {
        "model": trained.info["model"],
        "parameters": f"{counts.total.parameters:,}",
        "GFLOPs": f"{counts.total.counts.flops / 1e9:.4g} for one image (two per multiply-add)",
        "input": f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}",
        "data": trained.config.data.name,
        "classes": str(len(trained.class_names)),
    }
    if "config" in trained.info:
        card["training"] = (
            f"{optim.epochs} epoch{'s' if optim.epochs > 1 else ''} of {optim.name}, lr {optim.lr:g}, "
            f"batch {optim.batch_size}, seed {trained.config.seed}"
        )
        percent = 100 * trained.info[task.score]
        card["weights"] = f"epoch {trained.info['epoch']}, validation {task.score_title} {percent:.2f} %"
    else:
        card["weights"] = trained.path.name
    environment = folder.read_environment()
    shown = {"cbsa_torch": "cbsa_torch {}", "torch": "torch {}", "device": "{}", "date": "{:.10}"}
    known = [text.format(environment[k]) for k, text in shown.items() if isinstance(environment.get(k), str)]
    if known:
        card["trained with"] = ", ".join(known)
    return card
