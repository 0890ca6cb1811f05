"""Evaluate a trained checkpoint on a split of its data, or of other data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

import cbsa_torch.models  # noqa: F401  (registers our models with timm)
from cbsa_torch._core.files import write_atomically
from cbsa_torch.models.checkpoint import CheckpointError, load_checkpoint
from cbsa_torch.train.config.base import DataConfig, RunConfig, TrainConfig, read_config
from cbsa_torch.train.data import InputSpec, make_loader, open_split, read_skipped
from cbsa_torch.train.engine.accelerator import new_accelerator
from cbsa_torch.train.engine.console import Reporter
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.run.folder import RunFolder
from cbsa_torch.train.tasks.classification import Evaluation, evaluate


class Trained(NamedTuple):
    """A trained model with what its checkpoint says about it."""

    model: nn.Module
    spec: InputSpec
    class_names: list[str]
    config: RunConfig
    info: dict[str, Any]
    path: Path
    """The checkpoint file."""


def open_trained(checkpoint: str | Path) -> Trained:
    """Load the weights that a run folder keeps (``optim.keep``), or a ``.safetensors`` file of a run."""
    path = Path(checkpoint)
    if path.is_dir():
        path = RunFolder(path).weights
        if not path.exists():
            raise FileNotFoundError(f"{checkpoint} holds no trained model (no {path.name})")
    model, info = load_checkpoint(path)
    try:
        fed = info["input"]
        spec = InputSpec(
            tuple(fed["input_size"]),
            tuple(fed["mean"]),
            tuple(fed["std"]),
            fed["interpolation"],
            fed["crop_pct"],
        )
        config = read_config(info["config"], f"{path}: config")
        return Trained(model, spec, list(info["class_names"]), config, info, path)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} was not written by a training run: no {error} in it") from error


def classifier_config(trained: Trained) -> TrainConfig:
    """The configuration of a trained classifier.

    Raises:
        ConfigError: it was trained for something else.
    """
    if not isinstance(trained.config, TrainConfig):
        raise ConfigError(
            f"{trained.path} is of the task {trained.config.task!r}, and this is for classifiers; `cbsa eval` "
            "and `cbsa predict` know both"
        )
    return trained.config


def evaluate_checkpoint(
    checkpoint: str | Path,
    *,
    split: str = "test",
    data: DataConfig | None = None,
    batch_size: int = 256,
    output: str | Path | None = None,
) -> Evaluation:
    """Evaluate and write ``eval_<split>.json`` beside the checkpoint.

    Args:
        checkpoint: a run folder or a ``.safetensors`` file of one.
        split: "train", "val" or "test".
        data: where the images are. Default: what the model was trained on.
        batch_size: images per forward pass.
        output: the JSON file. Default: beside the checkpoint.
    """
    trained = open_trained(checkpoint)
    data = classifier_config(trained).data if data is None else data
    output = trained.path.parent / f"eval_{split}.json" if output is None else Path(output)
    skipped = output.with_suffix(".skipped.txt")
    dataset = open_split(data, trained.spec.mode, split, trained.class_names, skipped)
    accelerator = new_accelerator(mixed_precision="no")
    reporter = Reporter(accelerator.is_main_process)
    if accelerator.is_main_process:
        skipped.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    loader = make_loader(dataset, trained.spec, data, batch_size, train=False)
    model, loader = accelerator.prepare(trained.model, loader)
    with reporter.bar(f"evaluating {split}", len(loader)) as advance:
        result = evaluate(accelerator, model, loader, len(trained.class_names), advance)
    is_main = accelerator.is_main_process
    accelerator.wait_for_everyone()
    unread = read_skipped(skipped)
    if unread:
        reporter.say(f"{len(unread)} unreadable image(s) were left out, listed in {skipped}")
    if result.images == 0:
        raise DataError(f"no image of the {split} split could be read")
    if is_main:
        record = {
            "checkpoint": trained.path.name,
            "split": split,
            **result._asdict(),
            "skipped_images": unread,
            "class_names": trained.class_names,
        }
        write_atomically(output, json.dumps(record, indent=2).encode())
    return result
