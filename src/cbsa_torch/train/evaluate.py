"""Trained models: open them, evaluate them on a split of their data or of other data, predict image files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

import cbsa_torch.models  # noqa: F401  (registers our models with timm)
from cbsa_torch._core.checks import some_of
from cbsa_torch._core.files import write_atomically
from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.models.hub import open_weights, weights_path
from cbsa_torch.models.shipped import SHIPPED, results_folder
from cbsa_torch.train.config import DataConfig, DataSource, ModelConfig, TrainConfig, usual_workers
from cbsa_torch.train.data import (
    OpenedSplit,
    class_names_of,
    describe_split,
    input_spec,
    read_skipped,
)
from cbsa_torch.train.engine.accelerate import new_accelerator
from cbsa_torch.train.engine.console import Reporter
from cbsa_torch.train.errors import DataError
from cbsa_torch.train.registry import read_config, task_of
from cbsa_torch.train.tasks.base import EvalResult, PredictOptions, Trained, WindowOptions


def open_trained(
    checkpoint: str | Path,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    data: DataConfig | None = None,
    split: str | None = None,
) -> Trained:
    """Load the weights file of a run folder (the epoch that ``optim.keep`` says), or any weights file.

    Args:
        checkpoint: a run folder, a file, or the name of weights that come with the package. Files that no run
            wrote (released checkpoints of the official code, plain state dicts) do not say their classes:
            those are the data's, in their order.
        model: name in timm of the model that a plain state dict is of. Default: what the file says.
        model_args: its constructor arguments, where they are not the defaults.
        data: the images and classes for a file that no run wrote; None for files of runs.
        split: the one of ``data`` that will be used: a folder needs no other. Default: test, else validation.

    Raises:
        FileNotFoundError: nothing is there. CheckpointError: weights of an unknown kind, or damaged, or without
            classes, and ``data`` are not given. DataError: data of another number of classes.

    Examples:
        >>> from cbsa_torch.train import open_trained
        >>> trained = open_trained("runs/photos")
        >>> trained.class_names, trained.model(torch.randn(1, 3, 32, 32)).shape
        (['blue', 'green', 'red'], torch.Size([1, 3]))
    """
    path = weights_path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(
            f"no checkpoint at {path}: `cbsa train` makes one; {', '.join(SHIPPED)} comes with the package"
        )
    opened, info = open_weights(path, model, model_args)
    if "config" not in info:
        if data is None:
            raise CheckpointError(
                f"{path} was not written by a training run, and does not say its classes: cbsa eval, "
                "predict and report take such a file with data that tell them (--root FOLDER)"
            )
        return _with_classes_of(data, split, opened, info, path)
    try:
        fed: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in info["input"].items()}
        # a published file does not say with how many workers it was trained
        config = {**info["config"], "data": {"workers": usual_workers(), **info["config"].get("data", {})}}
        task = task_of(read_config(config, f"{path}: config"))
        return Trained(opened, task.spec_type(**fed), list(info["class_names"]), task, info, path)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} was not written by a training run: no {error} in it") from error


def _with_classes_of(
    data: DataConfig, split: str | None, model: nn.Module, info: dict[str, Any], path: Path
) -> Trained:
    """A classifier whose classes are those of the data."""
    if info["model"] == "segmenter":
        raise CheckpointError(
            f"{path} holds a segmenter that no run wrote, so that nothing says its classes; give the folder of "
            "the run that trained it"
        )
    size = info["model_args"].get("img_size")
    spec = input_spec(model, size if isinstance(size, int) else None)
    names = class_names_of(data, spec.mode, split)
    outputs = getattr(model, "num_classes", 0)
    if outputs != len(names):
        head = f"a head for {outputs} classes" if outputs else "no head"
        raise DataError(f"{path} has {head}, and the data have {len(names)} classes: {some_of(names)}")
    height, width = spec.input_size[1:]
    notes = (
        f"{path}: its outputs are taken for the {outputs} classes of the data in their order: {some_of(names)}",
        f"{path}: images are fed as {height} x {width} pixels, mean {spec.mean}, std {spec.std}",
    )
    told = {"class_names": names, "input": spec._asdict(), "notes": [*info.get("notes", ()), *notes]}
    task = task_of(TrainConfig(model=ModelConfig(info["model"]), data=data))
    return Trained(model, spec, names, task, {**info, **told}, path)


def evaluate_split(
    trained: Trained,
    split: OpenedSplit,
    skipped: Path,
    *,
    batch_size: int | None = None,
    windows: WindowOptions | None = None,
    output: Path,
) -> EvalResult:
    """Evaluate on a split that is open, say what was read of it, and write what was measured to a JSON file.

    Args:
        split, skipped: as ``trained.task.open_split`` opened it.
        batch_size, windows, output: as for :func:`evaluate_checkpoint`.

    Raises:
        DataError: no image could be read, or more are unreadable than allowed.
    """
    task, name = trained.task, split.name
    accelerator = new_accelerator(mixed_precision="no")
    reporter = Reporter(accelerator.is_main_process)
    if accelerator.is_main_process:
        skipped.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    for line in describe_split(split, trained.class_names):
        reporter.say(line)
    loader = task.evaluation_loader(split.dataset, trained.spec, accelerator, batch_size)
    device = next(trained.model.parameters()).device
    model = trained.model.to(accelerator.device)
    try:
        with reporter.bar(f"evaluating {name}", loader, len(loader)) as batches:
            result = task.evaluate(
                accelerator, model, batches, trained.class_names, windows=windows, batch_size=batch_size
            )
    finally:
        trained.model.to(device)  # where it was: the caller may go on with it
    accelerator.wait_for_everyone()
    unread = read_skipped(skipped)
    if unread:
        reporter.say(f"{len(unread)} unreadable image(s) were left out, listed in {skipped}")
    if result.images == 0:
        raise DataError(f"no image of the {name} split could be read")
    if accelerator.is_main_process:
        record = {
            "checkpoint": trained.path.name,
            "split": name,
            **result.record(),
            "skipped_images": unread,
            "class_names": trained.class_names,
        }
        write_atomically(output, json.dumps(record, indent=2).encode())
    return result


def evaluate_checkpoint(
    checkpoint: str | Path | Trained,
    *,
    split: str = "test",
    data: DataSource | None = None,
    batch_size: int | None = None,
    windows: WindowOptions | None = None,
    output: str | Path | None = None,
) -> Any:
    """Evaluate a trained model and write ``eval_<split>.json`` beside its weights.

    Args:
        checkpoint: a run folder, a ``.safetensors`` file of one (whose model is then fused), or what
            :func:`open_trained` opened, whose model is run as it is.
        split: "train", "val" or "test".
        data: where the images are: a ``DataConfig``, for segmenters a ``SegmentationDataConfig``. Default: what
            the model was trained on.
        batch_size: images (of segmenters: windows) in a forward pass; the result does not depend on it.
            Default: 256, for segmenters as in validation.
        windows: how a segmenter sees whole images. Default: as in validation.
        output: the JSON file. Default: beside the weights (of those that come with the package in
            ``runs/NAME``); with several scales or flips its name ends in ``_multi_scale.json``.

    Returns:
        The task's :class:`~cbsa_torch.train.tasks.base.EvalResult`, e.g. with ``top1`` of a classifier.

    Raises:
        ConfigError, DataError, CheckpointError, FileNotFoundError: what was asked for cannot work.

    Examples:
        >>> from cbsa_torch.train import evaluate_checkpoint
        >>> measured = evaluate_checkpoint("runs/photos", split="test")
        test: 12 images (blue 4, green 4, red 4)
        train is photos/train
        val is photos/val
        test is photos/test
        >>> measured.images, 0 <= measured.top1 <= 1
        (12, True)
    """
    trained = checkpoint if isinstance(checkpoint, Trained) else open_trained(checkpoint).fused()
    if data is not None:
        trained = trained._replace(task=trained.task.with_data(data))
    windows = WindowOptions() if windows is None else windows
    trained.task.check_options(windows)
    name = f"eval_{split}{'_multi_scale' if windows.multi_scale else ''}.json"
    output = results_folder(trained.path) / name if output is None else Path(output)
    skipped = output.with_suffix(".skipped.txt")
    opened = trained.task.open_split(trained.spec.mode, trained.class_names, split, skipped)
    return evaluate_split(trained, opened, skipped, batch_size=batch_size, windows=windows, output=output)


def predict_images(
    checkpoint: str | Path | Trained,
    images: Sequence[str | Path],
    *,
    top: int | None = None,
    on_bad_image: Literal["stop", "skip"] = "stop",
    masks: str | Path | None = None,
    overwrite: bool = False,
    windows: WindowOptions | None = None,
) -> Sequence[Any]:
    """Classify or segment image files one by one.

    Args:
        checkpoint: a run folder, a ``.safetensors`` file of one (whose model is then fused), or what
            :func:`open_trained` opened, whose model is run as it is.
        images: files.
        top: how many classes of an image a classifier names. Default: 5.
        on_bad_image: "stop" raises DataError; "skip" reports the error in that image's prediction.
        masks: folder for a segmenter's ``NAME_mask.png`` (coloured, with a legend) and ``NAME_labels.png`` (the
            numbers of the classes); created if need be. The images' names without suffix must differ. Default:
            ``predicted_masks``.
        overwrite: replace mask files of these names, which may be somebody's work.
        windows: how a segmenter sees whole images. Default: as in validation.

    Returns:
        A prediction for each image: of a classifier ``classes`` and ``probabilities``, of a segmenter the
        ``shares`` of classes and the paths ``mask`` and ``labels``.

    Raises:
        ConfigError: options that cannot work or have no effect for the model, two images of one name, masks
            that are there already; nothing was written then. DataError: an image that cannot be read.

    Examples:
        >>> from cbsa_torch.train import predict_images
        >>> (prediction,) = predict_images("runs/photos", ["photos/test/red/red_0.png"], top=2)
        >>> len(prediction.classes), prediction.probabilities[0] >= prediction.probabilities[1]
        (2, True)
    """
    trained = checkpoint if isinstance(checkpoint, Trained) else open_trained(checkpoint).fused()
    seen = WindowOptions() if windows is None else windows
    options = PredictOptions(
        window=seen.window,
        stride=seen.stride,
        scales=seen.scales,
        flip=seen.flip,
        top=top,
        on_bad_image=on_bad_image,
        masks=None if masks is None else str(masks),
        overwrite=overwrite,
    )
    return trained.task.predict(trained, images, options)
