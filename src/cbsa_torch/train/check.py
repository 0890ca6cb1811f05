"""Reading all of a data set without training on it."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from cbsa_torch.train.config import ImageSource, RunConfig
from cbsa_torch.train.data import describe, read_skipped
from cbsa_torch.train.data.summary import files_of, palette_lines, read_all, read_lines
from cbsa_torch.train.engine.console import Reporter
from cbsa_torch.train.errors import DataError
from cbsa_torch.train.registry import task_of

MOST_COPIES = 3
"""Of more images that are there again, the others are only counted."""


def check_data(config: RunConfig) -> None:
    """Print what training would read of the configured data and what not, and read every file of it.

    Raises:
        ConfigError, DataError: the data cannot be used, or a file of it cannot be.
    """
    task, most = task_of(config), 0
    if isinstance(config.data, ImageSource):  # every bad file is listed, not only those up to the limit
        task = task.with_data(dataclasses.replace(config.data, max_bad_images=sys.maxsize))
        most = config.data.max_bad_images
    task.check()
    reporter = Reporter()
    unit = task.unit if task.one_class_per_image else "pixels"
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
            warnings += palette_lines(dataset, range(len(dataset)))  # type: ignore[arg-type]
            for line in (f"{name}, {unit} read: {first}", *warnings):
                reporter.say(line)
        bad = read_skipped(skipped)
    for line in _copies({name: files_of(dataset) for name, dataset in splits.parts().items()}):
        reporter.say(line)
    for line in bad:
        reporter.say("cannot be used: " + line.replace("\t", ": ", 1))
    if bad:
        raise DataError(
            f"{len(bad)} file(s) cannot be used; training leaves out up to data.max_bad_images ({most}) of them"
        )
    if without:
        raise DataError(f"no {unit} of any class in {', '.join(without)}")
    reporter.say("every file can be used")


def _copies(files: Mapping[str, list[tuple[Path, int | None]]]) -> list[str]:
    """A line about images that are there again, byte for byte, in another split or class."""
    by_size = defaultdict(list)
    for split, samples in files.items():
        for path, label in samples:
            if path.is_file():
                by_size[path.stat().st_size].append((path, (split, label)))
    by_content = defaultdict(list)
    for size, found in by_size.items():
        for path, place in found if size and len({place for _, place in found}) > 1 else []:
            by_content[hashlib.sha256(path.read_bytes()).digest()].append((path, place))
    copies = [found for found in by_content.values() if len({place for _, place in found}) > 1]
    if not copies:
        return []
    shown = "; ".join(f"{found[0][0]} and {found[-1][0]}" for found in copies[:MOST_COPIES])
    return [f"warning: {len(copies)} image(s) are in several splits or classes, byte for byte: {shown}"]
