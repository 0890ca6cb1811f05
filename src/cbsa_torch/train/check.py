"""Reading all of a data set without training on it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from cbsa_torch.train.config import RunConfig
from cbsa_torch.train.data import describe, read_skipped
from cbsa_torch.train.data.summary import read_all, read_lines
from cbsa_torch.train.engine.console import Reporter
from cbsa_torch.train.errors import DataError
from cbsa_torch.train.registry import task_of


def check_data(config: RunConfig) -> None:
    """Print what training would read of the configured data and what not, and read every file of it.

    Raises:
        ConfigError, DataError: the data cannot be used, or a file of it cannot be.
    """
    # every bad file is listed, not only those up to the limit
    task = task_of(config).with_data(dataclasses.replace(config.data, max_bad_images=sys.maxsize))
    task.check()
    reporter = Reporter()
    unit = "images" if task.one_class_per_image else "pixels"
    ignore_label = getattr(config.data, "ignore_label", None)
    without: list[str] = []
    with TemporaryDirectory() as folder:
        skipped = Path(folder) / "skipped.txt"
        splits = task.open_data("RGB", skipped)
        for line in describe(splits):
            reporter.say(line)
        for name, dataset in splits.parts().items():
            reporter.say(f"reading {name} ...")
            tally = read_all(dataset, len(splits.class_names), config.data.workers)
            without += [] if tally[1:].any() else [name]
            first, *warnings = read_lines(name, splits.class_names, tally, unit, ignore_label)
            for line in (f"{name}, {unit} read: {first}", *warnings):
                reporter.say(line)
        bad = read_skipped(skipped)
    for line in bad:
        reporter.say("cannot be used: " + line.replace("\t", ": ", 1))
    if bad:
        raise DataError(
            f"{len(bad)} file(s) cannot be used; training leaves out up to data.max_bad_images "
            f"({config.data.max_bad_images}) of them"
        )
    if without:
        raise DataError(f"no {unit} of any class in {', '.join(without)}")
    reporter.say("every file can be used")
