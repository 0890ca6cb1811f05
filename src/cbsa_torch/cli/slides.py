"""What ``cbsa predict`` writes about slides: a table of probabilities, and maps of attention."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch

from cbsa_torch._core.files import write_atomically
from cbsa_torch.interpret import capture, token_attention
from cbsa_torch.interpret.plots import to_png
from cbsa_torch.interpret.tile_maps import coordinate_map
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.tasks.base import Trained
from cbsa_torch.train.tasks.classification import ClassPrediction
from cbsa_torch.train.tasks.slides.bags import Bags, FeatureSpec, read_for

FOLDER = "predicted_slides"
"""The folder of maps and table, unless another is given."""
TABLE = "predictions.csv"


class MapFiles(NamedTuple):
    """The files of one slide."""

    picture: Path
    numbers: Path


def plan_files(slides: Sequence[str], folder: Path, overwrite: bool) -> dict[str, MapFiles]:
    """The files to be written, by slide; raises ConfigError before anything is computed if that cannot work."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder, where maps could be written")
    planned: dict[str, MapFiles] = {}
    taken: dict[str, str] = {}
    for slide in map(str, map(Path, slides)):  # as predictions name them
        stem = Path(slide).stem
        if taken.setdefault(stem, slide) != slide or slide in planned:
            raise ConfigError(
                f"{taken[stem]} and {slide} would both be written as {stem}_map.png in {folder}; rename one"
            )
        planned[slide] = MapFiles(folder / f"{stem}_map.png", folder / f"{stem}_map.csv")
    present = [path for files in planned.values() for path in files if path.exists()]
    present += [path for path in (folder / TABLE,) if path.exists()]
    if present and not overwrite:
        raise ConfigError(f"{present[0]} is there already; choose another folder (--maps), or --overwrite")
    return planned


def write_table(predictions: Sequence[ClassPrediction], class_names: Sequence[str], folder: Path) -> Path:
    """The probabilities of all slides: a row each, a column for each class that is named; returns the file."""
    rows: list[list[object]] = [["slide", "predicted", *class_names, "error"]]
    for prediction in predictions:
        shares = dict(prediction.class_shares())
        best = prediction.classes[0] if prediction.classes else ""
        rows.append([prediction.image, best, *(shares.get(name, "") for name in class_names), prediction.error])
    path = folder / TABLE
    _write_csv(path, rows)
    return path


@torch.inference_mode()
def write_map(trained: Trained, slide: str, files: MapFiles, title: str) -> None:
    """How much the class token of the last layer attends to every tile, mean over heads.

    The picture needs coordinates; without any, only the numbers are written.
    """
    spec = cast(FeatureSpec, trained.spec)
    tiles = read_for(spec, Path(slide))
    bags = Bags.of([tiles], spec).to(next(trained.model.parameters()).device)
    with capture(trained.model, [-1]) as records:
        bags.logits(trained.model)
    (record,) = records.values()
    attention = token_attention(record).mean(1)[0].cpu()  # (N,)
    places = [["", ""]] * len(attention) if tiles.coords is None else tiles.coords.tolist()
    values = zip(places, attention.tolist(), strict=True)
    _write_csv(
        files.numbers, [["tile", "x", "y", "attention"], *([i, *xy, a] for i, (xy, a) in enumerate(values))]
    )
    if tiles.coords is not None:
        figure = coordinate_map(
            tiles.coords, attention, tiles.tile_size, title=title, label="attention of the class token"
        )
        write_atomically(files.picture, to_png(figure))


def _write_csv(path: Path, rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode())
