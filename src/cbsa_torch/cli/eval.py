"""``cbsa eval``: of whatever task the trained model is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from cbsa_torch.cli.options import at_least, number_table, parse
from cbsa_torch.train.evaluate import evaluate_checkpoint, open_trained
from cbsa_torch.train.tasks.base import WindowOptions


@dataclass
class _EvalArgs(WindowOptions):
    """Evaluate a trained model; writes eval_<split>.json beside the checkpoint."""

    checkpoint: str = "runs/digits"
    """A run folder or a .safetensors file of one."""
    split: Literal["train", "val", "test"] = "test"
    """The images to evaluate on."""
    root: str | None = None
    """Evaluate on the data in this folder instead of where the training data lay."""
    data: str | None = None
    """What lies there. Default: for classifiers "folder"; for segmenters what was trained on, e.g. "ade20k";
    "folder" is for images and masks of your own."""
    max_bad_images: int | None = None
    """Unreadable images that are left out, counted and listed; one more stops. Default: as in training."""
    batch_size: int | None = None
    """Images (of segmenters: windows) per forward pass; changes memory and time, not the result. Default: 256,
    or as in validation."""
    output: str | None = None
    """The JSON file. Default: eval_<split>.json beside the checkpoint (eval_<split>_multi_scale.json)."""


def run(args: list[str]) -> None:
    """Evaluate a trained model."""
    options = parse(_EvalArgs, args, "eval")
    changes = {"root": options.root, "name": options.data, "max_bad_images": options.max_bad_images}
    changes = {key: value for key, value in changes.items() if value is not None}
    at_least(0, max_bad_images=options.max_bad_images)
    at_least(1, batch_size=options.batch_size)
    trained = open_trained(options.checkpoint)
    if options.root is not None and trained.task.data_name_elsewhere is not None:
        changes.setdefault("name", trained.task.data_name_elsewhere)
    data: Any = trained.config.data  # of the task
    result = evaluate_checkpoint(
        trained,
        split=options.split,
        data=dataclasses.replace(data, **changes),
        batch_size=options.batch_size,
        windows=options,
        output=options.output,
    )
    rows = result.class_table()
    if rows:
        table = number_table(*rows[0], left=1)
        for row in rows[1:]:
            table.add_row(*row)
        Console().print(table)
    print(f"{options.split} {result.summary()}")
