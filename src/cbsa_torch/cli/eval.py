"""``cbsa eval``: of whatever task the trained model is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from cbsa_torch.cli.options import OtherOptions, SizeOptions, at_least, open_on, parse
from cbsa_torch.train.engine.console import number_table, print_table, say
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.evaluate import evaluate_checkpoint
from cbsa_torch.train.tasks.base import WindowOptions


@dataclass
class _EvalArgs(OtherOptions, SizeOptions, WindowOptions):
    """Evaluate a trained model; writes eval_<split>.json beside the checkpoint."""

    checkpoint: str = "runs/digits"
    """A run folder, a file of weights, or the name of weights that come with the package (`cbsa list`)."""
    split: Literal["train", "val", "test"] = "test"
    """The images to evaluate on."""
    max_bad_images: int | None = None
    """Unreadable images that are left out, counted and listed; one more stops. Default: as in training."""
    batch_size: int | None = None
    """Images (of segmenters: windows) per forward pass; changes memory and time, not the result. Default: 256,
    or as in validation; slides: 1."""
    output: str | None = None
    """The JSON file. Default: eval_<split>.json beside the checkpoint (eval_<split>_multi_scale.json)."""


def run(args: list[str]) -> None:
    """Evaluate a trained model."""
    options = parse(_EvalArgs, args, "eval")
    at_least(0, max_bad_images=options.max_bad_images)
    at_least(1, batch_size=options.batch_size)
    trained = open_on(options.checkpoint, options, options.split)
    trained = options.applied_to(trained)
    if options.max_bad_images is not None:
        if not trained.task.takes_images:
            raise ConfigError("--max-bad-images is of images, and this model takes slides: leave it out")
        data: Any = trained.config.data  # of images
        data = dataclasses.replace(data, max_bad_images=options.max_bad_images)
        trained = trained._replace(task=trained.task.with_data(data))
    result = evaluate_checkpoint(
        trained.fused(),
        split=options.split,
        batch_size=options.batch_size,
        windows=options,
        output=options.output,
    )
    rows = result.class_table()
    if rows:
        table = number_table(*rows[0], left=1)
        for row in rows[1:]:
            table.add_row(*row)
        print_table(table)
    say(f"{options.split} {result.summary()}")
