"""Evaluate a trained segmenter on a split of its data, or of other data."""

from __future__ import annotations

import json
from pathlib import Path

from cbsa_torch._core.files import write_atomically
from cbsa_torch.train.data import read_skipped
from cbsa_torch.train.engine.accelerator import new_accelerator
from cbsa_torch.train.engine.console import Reporter
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.evaluate import Trained, open_trained
from cbsa_torch.train.tasks.segmentation.config import SegmentationDataConfig, SegmentationTrainConfig
from cbsa_torch.train.tasks.segmentation.measure import SegmentationEvaluation, Windows, measure, share
from cbsa_torch.train.tasks.segmentation.metrics import to_record
from cbsa_torch.train.tasks.segmentation.splits import open_segmentation_split
from cbsa_torch.train.tasks.segmentation.transforms import evaluation_transform


def segmenter_config(trained: Trained) -> SegmentationTrainConfig:
    """The configuration of a trained segmenter.

    Raises:
        ConfigError: it was trained for something else.
    """
    if not isinstance(trained.config, SegmentationTrainConfig):
        raise ConfigError(f"{trained.path} is of the task {trained.config.task!r}, and this is for segmenters")
    return trained.config


def trained_windows(
    config: SegmentationTrainConfig,
    size: int | None = None,
    stride: int | None = None,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = False,
) -> Windows:
    """Windows as in validation, or others.

    Raises:
        ConfigError: sizes below 1, a stride above the window, no or odd scales.
    """
    if stride is None and size is None:
        stride = config.windows.stride
    size = config.window() if size is None else size
    if size < 1:
        raise ConfigError(f"window must be at least 1, got {size}")
    if stride is not None and not 1 <= stride <= size:
        raise ConfigError(f"stride must be in [1, {size}], the window, got {stride}")
    if not scales or not all(0 < scale <= 16 for scale in scales):
        raise ConfigError(f"scales must be numbers in (0, 16], got {scales}")
    return Windows(size, stride, config.windows.batch, scales, flip)


def evaluate_segmenter(
    checkpoint: str | Path,
    *,
    split: str = "test",
    data: SegmentationDataConfig | None = None,
    windows: Windows | None = None,
    output: str | Path | None = None,
) -> SegmentationEvaluation:
    """Evaluate and write ``eval_<split>.json`` beside the checkpoint; ``_multi_scale`` with scales or flips.

    Args:
        checkpoint: a run folder or a ``.safetensors`` file of one.
        split: "train", "val" or "test".
        data: where images and masks are. Default: what the model was trained on.
        windows: how images are seen. Default: as in validation.
        output: the JSON file. Default: beside the checkpoint.
    """
    trained = open_trained(checkpoint)
    config = segmenter_config(trained)
    data = config.data if data is None else data
    windows = trained_windows(config) if windows is None else windows
    plain = windows.scales == (1.0,) and not windows.flip
    name = f"eval_{split}{'' if plain else '_multi_scale'}.json"
    output = trained.path.parent / name if output is None else Path(output)
    skipped = output.with_suffix(".skipped.txt")
    accelerator = new_accelerator(mixed_precision="no")
    reporter = Reporter(accelerator.is_main_process)
    dataset = open_segmentation_split(data, trained.spec.mode, split, trained.class_names, skipped)
    dataset.transform = evaluation_transform(trained.spec.mean, trained.spec.std)  # type: ignore[attr-defined]
    if accelerator.is_main_process:
        skipped.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    model = trained.model.to(accelerator.device)
    images = share(dataset, data.workers, accelerator)
    with reporter.bar(f"evaluating {split}", len(images)) as advance:
        result = measure(accelerator, model, images, trained.class_names, windows, advance)
    is_main = accelerator.is_main_process
    accelerator.wait_for_everyone()
    unread = read_skipped(skipped)
    if unread:
        reporter.say(f"{len(unread)} unreadable image(s) or mask(s) were left out, listed in {skipped}")
    if result.images == 0:
        raise DataError(f"no image of the {split} split has a mask that could be read")
    if is_main:
        record = {
            "checkpoint": trained.path.name,
            "split": split,
            **to_record(result.scores),
            "loss": result.loss,
            "images": result.images,
            "windows": windows._asdict(),
            "skipped_images": unread,
            "class_names": trained.class_names,
        }
        write_atomically(output, json.dumps(record, indent=2).encode())
    return result
