"""The table of slides: its columns by name, and splits that keep every patient's slides together."""

from __future__ import annotations

import csv
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cbsa_torch._core.checks import nearest, some_of
from cbsa_torch.images import SPLIT_NAMES
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.tasks.slides.config import SlidesDataConfig
from cbsa_torch.train.tasks.slides.files import SUFFIXES


class Row(NamedTuple):
    """One slide."""

    slide: str
    """Its name in the table."""
    label: str
    patient: str
    split: str | None
    """As the table says; None where it has no such column."""


class Table(NamedTuple):
    """All slides, and what was read of them."""

    rows: list[Row]
    notes: tuple[str, ...]
    """How splits come about, a line each."""


def read_table(config: SlidesDataConfig) -> Table:
    """Read the table of ``config``.

    Raises:
        ConfigError: no ``data.root``. FileNotFoundError: no table. DataError: a column that is not there, or is
            there twice, a row without slide, label, patient or split, or of more cells than the heading, a
            slide that is there twice, a patient in two splits.
    """
    if config.root is None:
        raise ConfigError("data.root must name the folder of the feature files, got None")
    path = Path(config.root, "slides.csv") if config.csv is None else Path(config.csv)
    if not path.is_file():
        raise FileNotFoundError(f"no table of slides at {path} (data.csv names another)")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            there = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = there
            lines = [(reader.line_num, line) for line in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a table: {error}") from error
    required = {"slide": config.slide_column, "label": config.label_column}
    columns = {**required, "patient": config.patient_column, "split": config.split_column}
    for role, column in columns.items():
        if column is None:
            column = columns[role] = role if role in there else None
        elif column not in there:
            raise DataError(
                f"{path} has no column {column!r} (data.{role}_column); it has {some_of(there, 20)}"
                f"{nearest(column, there)}"
            )
        if column is not None and there.count(column) > 1:
            raise DataError(f"{path} has {there.count(column)} columns {column!r} (data.{role}_column)")
    rows = []
    for number, line in lines:
        if None in line:  # DictReader's key of cells without a column
            raise DataError(
                f"{path}, line {number}: more cells than the {len(there)} of the heading; commas inside of a "
                'cell need quotes ("...") around it'
            )
        cells = {role: (line[column] or "").strip() for role, column in columns.items() if column is not None}
        empty = [columns[role] for role, cell in cells.items() if not cell]
        if empty:
            raise DataError(f"{path}, line {number}: no {', no '.join(map(str, empty))}; each row needs one")
        if cells.get("split", "train") not in SPLIT_NAMES:
            raise DataError(
                f"{path}, line {number}: {columns['split']} must be one of {', '.join(SPLIT_NAMES)}, got "
                f"{cells['split']!r}{nearest(cells['split'], SPLIT_NAMES)}"
            )
        rows.append(
            Row(cells["slide"], cells["label"], cells.get("patient", cells["slide"]), cells.get("split"))
        )
    if not rows:
        raise DataError(f"{path} lists no slides")
    _check_rows(path, rows)
    by = "patient" if columns["patient"] is not None else "slide"
    splits = "given" if columns["split"] is not None else f"drawn by {by}, stratified by label"
    return Table(rows, (f"splits of {path.name}: {splits}",))


def _check_rows(path: Path, rows: Sequence[Row]) -> None:
    seen: dict[str, str] = {}
    split_of: dict[str, str | None] = {}
    for row in rows:
        suffix = next((suffix for suffix in SUFFIXES if row.slide.endswith(suffix)), "")
        name = os.path.normpath(row.slide.removesuffix(suffix))
        if name in seen:
            also = "" if seen[name] == row.slide else f", also as {seen[name]!r}"
            raise DataError(f"{path}: slide {row.slide!r} is there twice{also}")
        seen[name] = row.slide
        other = split_of.setdefault(row.patient, row.split)
        if other != row.split:
            raise DataError(f"{path}: patient {row.patient!r} is in two splits, {other} and {row.split}")


def assign_splits(rows: Sequence[Row], config: SlidesDataConfig, seed: int) -> dict[str, list[Row]]:
    """The rows by "train", "val" and, where there is one, "test".

    Splits that the table gives stay; without any, a test split is drawn, and without a val split, that is drawn
    of the training patients. Every label (of a patient with several: their combination) gives its share of the
    patients, at least one if it has three. The same seed draws the same.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.split or "train", []).append(row)
    if rows[0].split is None and config.test_fraction > 0:
        found["train"], found["test"] = _hold_out(found["train"], config.test_fraction, generator)
    if "val" not in found:
        found["train"], found["val"] = _hold_out(found.get("train", []), config.val_fraction, generator)
    return {name: found[name] for name in SPLIT_NAMES if found.get(name)}


def _hold_out(rows: Sequence[Row], fraction: float, generator: torch.Generator) -> tuple[list[Row], list[Row]]:
    """The rows that stay, and those of the patients that are held out."""
    labels: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        labels[row.patient].add(row.label)
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for patient in sorted(labels):
        groups[tuple(sorted(labels[patient]))].append(patient)
    held: set[str] = set()
    for _, patients in sorted(groups.items()):
        count = min(max(round(fraction * len(patients)), int(len(patients) >= 3)), len(patients) - 1)
        order = torch.randperm(len(patients), generator=generator).tolist()
        held |= {patients[i] for i in order[:count]}
    return [row for row in rows if row.patient not in held], [row for row in rows if row.patient in held]
