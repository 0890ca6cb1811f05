"""``cbsa predict --stream``: an image or a slide that does not fit into memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cbsa_torch import streaming
from cbsa_torch.train.engine.console import Reporter, say
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.tasks.base import Prediction, PredictOptions, Trained, WindowOptions
from cbsa_torch.train.tasks.classification import TOP, ClassPrediction
from cbsa_torch.train.tasks.segmentation.task import MaskPrediction

FOLDER = "streamed"
_ROWS = 1024
"""Rows of labels that are counted at once."""


@dataclass
class StreamOptions:
    """How an image or a slide that does not fit into memory is seen."""

    stream: str | None = None
    """An image too large for memory, seen whole and at its own size: .npy, .tif, .h5 or .zarr, with ::NAME for
    one of several arrays; of a model of slides, its file of features and coords (.h5, .zarr) or of features
    alone. Killed, the same command goes on from the last finished sweep."""
    memory: str = "1GiB"
    """With --stream: what is held of source and tokens at once, beside the model and the libraries."""
    stream_results: tuple[Literal["logits", "map", "features", "labels"], ...] = ()
    """With --stream: what to write: logits, map (class token to all tokens; also a picture), features (of all
    tokens) or labels (of all pixels). Default: labels of segmenters, else logits; which are always written."""
    stream_layer: int = -1
    """With --stream: layer of the map, from 0; negative numbers count from the last."""
    stream_channels: Literal["last", "first"] = "last"
    """With --stream: the axis of the colours."""
    stream_folder: str | None = None
    """With --stream: the folder for the results. Default: streamed/NAME."""
    scratch: str | None = None
    """With --stream: a folder for the tokens between layers, twice their size. Default: in the results'."""
    scratch_dtype: Literal["float32", "bfloat16"] = "float32"
    """With --stream: of these tokens; bfloat16 takes half as much and rounds."""


def predict(trained: Trained, source: str, options: Any) -> Prediction:
    """Stream one image or slide through a trained model.

    Args:
        trained: fused or not.
        source: the file.
        options: of both kinds, :class:`StreamOptions` and ``PredictOptions``.
    """
    trained.task.check_options(options)
    _refuse(options)
    main: Any = "logits" if trained.task.one_class_per_image else "labels"
    name = Path(source.partition("::")[0]).stem
    folder = Path(options.stream_folder or Path(FOLDER) / name)
    try:
        with Reporter().work() as progress:
            result = streaming.stream(
                trained.model,
                folder=folder,
                **_source(trained, source, options),
                results=tuple(dict.fromkeys((main, *options.stream_results))),
                layer=options.stream_layer,
                memory=options.memory,
                scratch=options.scratch,
                scratch_dtype=getattr(torch, options.scratch_dtype),
                progress=progress,
            )
    except (streaming.StreamError, ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"--stream {source}: {error}") from error
    written = ", ".join(str(path) for path in result.files.values())
    say(f"{' x '.join(map(str, result.grid_size))} tokens; written: {written}")
    if result.logits is None:
        return MaskPrediction(
            source, _shares(result.files["labels"], trained.class_names), None, str(result.files["labels"])
        )
    probabilities = result.logits.softmax(-1)[0]
    best = probabilities.topk(min(TOP if options.top is None else options.top, len(trained.class_names)))
    return ClassPrediction(
        source, [trained.class_names[i] for i in best.indices.tolist()], best.values.tolist()
    )


def _source(trained: Trained, source: str, options: Any) -> dict[str, Any]:
    """What is streamed, and how it is read."""
    if trained.task.takes_images:
        array, spec = streaming.open_array(source), trained.spec
        return {"source": array, "channels": options.stream_channels, "mean": spec.mean, "std": spec.std}
    if options.stream_channels != "last":
        raise ConfigError(f"stream_channels is of images, and {trained.path} takes {trained.task.unit}")
    features, coords = streaming.open_features(source)
    fed: Any = trained.spec
    return {"source": features, "coords": coords if fed.coords else None}


def _refuse(options: Any) -> None:
    """Raise where an option has no effect on an image that is seen whole."""
    if options.top is not None and options.top < 1:
        raise ConfigError(f"top must be at least 1, got {options.top}")
    unused = [*vars(WindowOptions()), "masks", "maps", "overwrite", "on_bad_image"]
    for name in unused:
        if getattr(options, name) != getattr(PredictOptions(), name):
            raise ConfigError(f"{name} has no effect with stream, which sees its source whole; leave it out")


def _shares(path: Path, names: list[str]) -> dict[str, float]:
    """Share of the pixels of each class that occurs, the largest first."""
    labels = np.load(path, mmap_mode="r")
    counts = np.zeros(len(names), np.int64)
    for top in range(0, labels.shape[0], _ROWS):
        counts += np.bincount(labels[top : top + _ROWS].ravel(), minlength=len(names))
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
    return {names[i]: float(counts[i] / labels.size) for i in order}
