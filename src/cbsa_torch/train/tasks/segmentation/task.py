"""The task of segmenting images: a class for every pixel."""

from __future__ import annotations

import dataclasses
import inspect
import io
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cbsa_torch._core.checks import check_choice
from cbsa_torch._core.files import write_atomically
from cbsa_torch.models.checkpoint import check_fit, refuse_fetching
from cbsa_torch.models.segmentation.factory import segmenter
from cbsa_torch.train.build import Built, build_model, draft_model, fit, open_source
from cbsa_torch.train.config import check_rules
from cbsa_torch.train.data import IGNORE, InputSpec, OpenedSplit, Splits, describe, input_spec, read_skipped
from cbsa_torch.train.data.checked_images import SkippedImages
from cbsa_torch.train.data.seeded import SeededSamples
from cbsa_torch.train.data.summary import palette_lines, read_all, read_lines
from cbsa_torch.train.data.workers import ignore_signals_in_workers
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.tasks.base import (
    TIMM_LINK,
    PredictOptions,
    Task,
    TaskSetup,
    Trained,
    WindowOptions,
    eval_transform,
    read_images,
    spread_indices,
)
from cbsa_torch.train.tasks.segmentation.colours import write_coloured_mask
from cbsa_torch.train.tasks.segmentation.config import (
    SegmentationDataConfig,
    SegmentationTrainConfig,
    WindowConfig,
    check_data_config,
)
from cbsa_torch.train.tasks.segmentation.evaluation import (
    SegmentationMetric,
    SegmentationResult,
    Windows,
    share,
    sharing,
)
from cbsa_torch.train.tasks.segmentation.splits import (
    MaskedImages,
    open_segmentation,
    open_segmentation_split,
)
from cbsa_torch.train.tasks.segmentation.transforms import (
    MaskedTransform,
    evaluation_transform,
    training_transform,
)

PRETRAINED = "pretrained"
"""``model.encoder_from``: the weights that timm has for an encoder."""
CLASSIFIER_PARTS = ("head", "fc_norm", "attn_pool", "fc")
"""Parts of classifiers that no encoder has."""
PAIRS_READ_FIRST = 200
"""How many pairs of a split are read before anything is trained: misunderstood labels show there."""
MASKS = "predicted_masks"
"""The folder of predicted masks, unless another is given."""


class MaskPrediction(NamedTuple):
    """The masks of one image, or why it could not be read."""

    image: str
    shares: dict[str, float]
    """Share of the pixels of each class that occurs, the largest first."""
    mask: str | None = None
    """A picture: the image, the coloured mask, and a legend."""
    labels: str | None = None
    """A grey PNG of the image's size whose values are the labels, 16 bits from 257 classes on; of a streamed
    image an array of NumPy."""
    error: str | None = None

    def class_shares(self) -> list[tuple[str, float]]:
        """The shares as a list."""
        return list(self.shares.items())


class Segmentation(Task):
    """One class for every pixel."""

    config: SegmentationTrainConfig
    score = "val_miou"
    score_title = "mean IoU"
    hub_task, hub_metric = "image-segmentation", "mean_iou"
    share_title = "share of pixels"
    model_kind = "image segmenter"
    own_model = "segmenter"
    one_class_per_image = False
    unused_options = frozenset({"top", "maps"})

    @classmethod
    def model_summary(cls, args: Mapping[str, Any], shown: Callable[[object], str]) -> str:
        """Encoder and decoder."""
        encoder, mixer = (shown(args.get(name, _default(name))) for name in ("encoder", "mixer"))
        return f"encoder {encoder} of {TIMM_LINK}, decoder of masks with {mixer.upper()} layers"

    def check(self) -> None:
        """Refuse settings of data, windows and model that cannot work."""
        model = self.config.model
        check_data_config(self.config.data)
        self._windows(None, None)
        if model.name != self.own_model:
            raise ConfigError(f"model.name must be {self.own_model!r} for segmentation, got {model.name!r}")
        if model.init_from is not None and model.encoder_from is not None:
            raise ConfigError("model.init_from and model.encoder_from exclude each other, got both")

    def check_options(self, options: WindowOptions) -> None:
        """Refuse what has no effect, sizes below 1, a stride above the window, no or odd scales."""
        super().check_options(options)
        self._windows(options, None)

    def _windows(self, given: WindowOptions | None, batch: int | None) -> Windows:
        """Windows as in validation, but for what is given."""
        config, names = self.config.windows, ("window", "stride", "batch_size")
        if given is None:
            given, names = WindowOptions(), ("windows.size", "windows.stride", "windows.batch")
        if config.native:
            return self._whole(given, batch)
        stride = config.stride if given.stride is None and given.window is None else given.stride
        sizes = given.window, config.size, self.config.data.crop_size
        size = next(size for size in sizes if size is not None)
        batch, scales = config.batch if batch is None else batch, given.scales
        check_rules([
            (size >= 1, f"{names[0]} must be at least 1", size),
            (stride is None or 1 <= stride <= size, f"{names[1]} must be in [1, {size}], the window", stride),
            (batch >= 1, f"{names[2]} must be at least 1", batch),
            (bool(scales) and all(0 < s <= 16 for s in scales), "scales must be numbers in (0, 16]", scales),
        ])  # fmt: skip
        return Windows(size, stride, batch, scales, given.flip)

    def _whole(self, given: WindowOptions, batch: int | None) -> Windows:
        """Images seen whole; raises ConfigError for what would then have no effect."""
        config = self.config.windows
        check_rules([
            (config.size is None, "windows.size must be left out with windows.native", config.size),
            (config.stride is None, "windows.stride must be left out with windows.native", config.stride),
            (config.max_tokens >= 1, "windows.max_tokens must be at least 1", config.max_tokens),
            (batch is None, "batch_size is of windows: give max_tokens where images are seen whole", batch),
            *(
                (value == option.default, f"{option.name} must be left out where images are seen whole", value)
                for option in dataclasses.fields(WindowOptions)
                for value in (getattr(given, option.name),)
            ),
        ])  # fmt: skip
        return Windows(None, max_tokens=config.max_tokens)

    def with_native(self, changes: Mapping[str, Any]) -> Task:
        """The same task that sees images whole, in place of windows."""
        if "max_image_tokens" in changes:
            raise self.no_effect("max_image_tokens")
        kept = {} if changes.get("native") else dataclasses.asdict(self.config.windows)
        windows = WindowConfig(**{**kept, **changes})
        self.check_native(windows.native, changes)
        return type(self)(dataclasses.replace(self.config, windows=windows))

    def open_data(self, mode: str, skipped: Path) -> Splits:
        """Splits of (image, mask)."""
        splits = open_segmentation(self.config.data, mode, skipped)
        if len(splits.class_names) < 2:
            raise DataError(
                f"{self.config.data.name} has one class, {splits.class_names}, and nothing to tell it from: "
                "what is around it (the background) needs a class of its own"
            )
        return splits

    def open(self, skipped: Path, *, continued: bool) -> TaskSetup:
        """The data sets, and the model with a mask for each of their classes."""
        config, weights, notes = open_encoder(self.config, continued=continued)
        data = config.data
        draft = draft_model(config)
        splits = self.open_data(input_spec(draft.model).mode, skipped)
        read = [*describe(splits), *_read_some(splits, data)]
        model, args, changes = build_model(config, len(splits.class_names), draft)
        if weights is not None:
            load_encoder(model, weights, str(config.model.encoder_from))
        known = input_spec(model)
        size = known.input_size[0], data.crop_size, data.crop_size
        spec = known._replace(input_size=size, crop_pct=1.0)
        _check_size(model, spec.input_size, f"data.crop_size {data.crop_size}")
        if config.windows.native:  # another size than that, too
            _check_size(model, (size[0], data.crop_size, 2 * data.crop_size), "windows.native")
        told = [*read, *notes, *changes]
        return TaskSetup(model, args, splits.class_names, spec, splits.train, splits.val, notes=told)

    def training_loader(self, setup: TaskSetup, batch_size: int) -> DataLoader[Any]:
        """Augmented crops in random order."""
        samples = SeededSamples(setup.train, self.config.seed)
        samples.transform = training_transform(self.config.data, setup.spec.mean, setup.spec.std)
        loader: DataLoader[Any] = DataLoader(
            samples, batch_size, shuffle=True, drop_last=True, num_workers=self.config.data.workers
        )
        ignore_signals_in_workers(loader)
        return loader

    def open_split(
        self, mode: str, class_names: list[str], split: str | None, skipped: Path | None = None
    ) -> OpenedSplit:
        """A split of (image, mask)."""
        return open_segmentation_split(self.config.data, mode, split, class_names, skipped)

    def evaluation_loader(
        self, dataset: Dataset[Any], spec: InputSpec, accelerator: Accelerator, batch_size: int | None = None
    ) -> Any:
        """Whole images one by one, each for one process; ``batch_size`` is of their windows."""
        dataset.transform = evaluation_transform(spec.mean, spec.std)  # type: ignore[attr-defined]
        return share(dataset, self.config.data.workers, accelerator)

    @torch.no_grad()
    def evaluate(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        batches: Iterable[Any],
        class_names: Sequence[str],
        *,
        windows: WindowOptions | None = None,
        batch_size: int | None = None,
    ) -> SegmentationResult:
        """Mean IoU, by windows of the training crop's size or as configured."""
        seen, shared = self._windows(windows, batch_size), sharing(accelerator) > 1
        metric = SegmentationMetric(class_names, sync=shared).to(accelerator.device)
        losses: list[tuple[float, int]] = []
        samples = (sample for sample in batches if sample is not None)
        for part in seen.parts(model, samples, lambda sample: sample[0]):
            with accelerator.autocast():
                found = seen.logits(model, [image.to(accelerator.device) for image, _ in part])
            for each, (_, truth) in zip(found, part, strict=True):
                logits, labels = each.float(), truth.to(accelerator.device)
                metric.update(logits.argmax(0), labels)
                total = F.cross_entropy(logits[None], labels[None], ignore_index=IGNORE, reduction="sum")
                losses.append((total.item(), int((labels != IGNORE).sum())))
        if shared:
            losses = gather_object(losses)
        # exact: any number of processes gives the same sum
        loss = math.fsum(total for total, _ in losses) / max(sum(count for _, count in losses), 1)
        return SegmentationResult(metric.compute(), loss, sum(count > 0 for _, count in losses), seen)

    def predict(
        self, trained: Trained, images: Sequence[str | Path], options: PredictOptions
    ) -> list[MaskPrediction]:
        """Write ``NAME_mask.png`` and ``NAME_labels.png`` of each image, of any size."""
        self.check_options(options)
        folder, seen = Path(options.masks or MASKS), self._windows(options, None)
        check_choice("on_bad_image", options.on_bad_image, ("stop", "skip"))
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder, where masks could be written")
        taken: dict[str, Path] = {}
        for path in map(Path, images):
            other = taken.setdefault(path.stem, path)
            if other is not path:
                raise ConfigError(
                    f"{other} and {path} would both be written as {path.stem}_mask.png in {folder}; rename one"
                )
        present = [path for stem in taken for path in _mask_files(folder, stem) if path.exists()]
        if present and not options.overwrite:
            raise ConfigError(f"{present[0]} is there already; choose another folder (--masks), or --overwrite")
        folder.mkdir(parents=True, exist_ok=True)
        device, transform = (
            next(trained.model.parameters()).device,
            evaluation_transform(trained.spec.mean, trained.spec.std),
        )
        items = (
            (path, image, None if isinstance(image, str) else _pixels(transform, image).to(device))
            for path, image in read_images(images, trained.spec.mode, options.on_bad_image)
        )
        predictions = []
        for part in seen.parts(trained.model, items, lambda item: item[2]):
            pixels = [each for *_, each in part if each is not None]
            with torch.inference_mode():
                found = iter(seen.logits(trained.model, pixels) if pixels else [])
            for path, image, _ in part:
                if isinstance(image, str):
                    predictions.append(MaskPrediction(str(path), {}, error=image))
                else:
                    labels = next(found).argmax(0).cpu().numpy()
                    predictions.append(_write_masks(trained.class_names, path, image, labels, folder))
        return predictions

    def geometry(self, spec: InputSpec) -> dict[str, Any]:
        """No pixel is resized: windows cover the image, their logits are averaged; or it is seen whole."""
        seen = self._windows(None, None)
        if seen.size is None:
            return {"own_size": {"sides_are_multiples_of": 1, "at_most_patches": None}}
        stride = seen.size if seen.stride is None else seen.stride
        return {"windows": {"side": seen.size, "stride": stride, "overlap": "mean of the outputs"}}

    def sample(self, dataset: Any, spec: InputSpec, count: int) -> tuple[Tensor, list[int]]:
        """Squares from the centre of images; they have no single class."""
        transform = eval_transform(spec)
        squares = [transform(dataset[i][0]) for i in spread_indices(len(dataset), count)]
        return torch.stack(squares), []

    def main_class(self, outputs: Tensor) -> list[int]:
        """The class of most pixels, from logits (images, classes, height, width)."""
        classes: list[int] = outputs.argmax(1).flatten(1).mode(1).values.tolist()
        return classes


def _read_some(splits: Splits, data: SegmentationDataConfig) -> list[str]:
    """Read pairs before anything is trained; lines about the classes in their masks.

    Raises:
        DataError: more pairs cannot be used than allowed, or no pixel of a split has a class.
    """
    lines = []
    for name, split in (("training", splits.train), ("validation", splits.val)):
        if not isinstance(split, MaskedImages):  # drawn, not read
            continue
        indices = spread_indices(len(split), PAIRS_READ_FIRST)
        with TemporaryDirectory() as folder:
            listed = Path(folder) / "skipped.txt"
            # counted below: the list of a run is not begun yet, and workers share this one
            pairs = MaskedImages(split.pairs, split.mode, split.labels, SkippedImages(listed, sys.maxsize))
            tally = read_all(pairs, len(splits.class_names), data.workers, indices)
            failed = read_skipped(listed)
        read = f"{len(indices)} of {len(split)} {name} masks"
        if len(failed) > data.max_bad_images:
            shown = failed[0].replace("\t", ": ", 1)
            raise DataError(
                f"of {read} {len(failed)} cannot be used, and data.max_bad_images is {data.max_bad_images} "
                f"(cbsa data check lists all): {shown}"
            )
        if not tally[1:].any():
            raise DataError("; ".join([f"no pixel of any class in {read}", *failed[:1]]))
        first, *warnings = read_lines(read, splits.class_names, tally, "pixels", data.ignore_label)
        lines += [f"{read}: {first}", *warnings, *palette_lines(split, indices)]
    return lines


def _default(name: str) -> Any:
    return inspect.signature(segmenter).parameters[name].default


@torch.no_grad()
def _check_size(model: nn.Module, input_size: tuple[int, int, int], name: str) -> None:
    """Let an image through, before a run touches anything: some encoders take images of one size only."""
    model.eval()
    try:
        model(torch.zeros(1, *input_size))
    except ValueError as error:
        raise ConfigError(f"{name} does not fit the model: {error}") from error


def _mask_files(folder: Path, stem: str) -> tuple[Path, Path]:
    return folder / f"{stem}_mask.png", folder / f"{stem}_labels.png"


def _pixels(transform: MaskedTransform, image: Image.Image) -> Tensor:
    """An image without a mask as a model is fed it."""
    return transform(image, np.zeros((image.size[1], image.size[0]), dtype=np.int64))[0]


def _write_masks(
    names: Sequence[str], path: Path, image: Image.Image, labels: np.ndarray, folder: Path
) -> MaskPrediction:
    mask, raw = _mask_files(folder, path.stem)
    write_coloured_mask(image, labels, names, mask)
    buffer = io.BytesIO()
    Image.fromarray(labels.astype(np.uint8 if len(names) <= 256 else np.uint16)).save(buffer, "PNG")
    write_atomically(raw, buffer.getvalue())
    values, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    shares = {names[int(values[i])]: float(counts[i] / labels.size) for i in order}
    return MaskPrediction(str(path), shares, str(mask), str(raw))


def open_encoder(
    config: SegmentationTrainConfig, *, continued: bool
) -> tuple[SegmentationTrainConfig, dict[str, Tensor] | None, tuple[str, ...]]:
    """The configuration with the encoder that ``model.encoder_from`` says in ``model.args``, and its weights.

    Args:
        continued: the weights are not needed, and are not fetched.

    Returns:
        The configuration, the weights, and sentences that say how they were read.

    Raises:
        ConfigError: not an encoder, or it takes one image size only. CheckpointError: of the file; or
            ``model.args`` name another encoder than it does, options that it says itself, or no encoder where
            it says none.
    """
    source, size = config.model.encoder_from, config.model.image_size
    if source is None or source == PRETRAINED:
        return config, None if source is None or continued else pretrained_weights(config), ()
    args = config.model.args
    given = args.get("encoder"), args.get("encoder_args")
    model, info, path = open_source("model.encoder_from", source, *given)
    if info["model"] == "segmenter":
        raise ConfigError(
            f"model.encoder_from must be a classifier, and {path} holds a segmenter: to start from all of it, "
            "use model.init_from"
        )
    own = {key: value for key, value in info["model_args"].items() if key != "num_classes"}
    opened = fit(Built(model, own, tuple(info.get("notes", ()))), None, size)
    chosen: dict[str, Any] = {**args, "encoder": info["model"], "encoder_args": opened.args}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, args=chosen))
    return config, None if continued else opened.model.state_dict(), opened.notes


def pretrained_weights(config: SegmentationTrainConfig) -> dict[str, Tensor]:
    """The weights that timm has for the encoder of ``model.args``."""
    args = config.model.args
    name, encoder_args = args.get("encoder", _default("encoder")), args.get("encoder_args") or {}
    refuse_fetching("model.args encoder_args", encoder_args, "model.encoder_from is set", ConfigError)
    given = {"img_size": config.model.image_size, "in_chans": args.get("in_chans")}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, **given, **encoder_args)
    except Exception as error:  # any model of timm, and the network
        raise ConfigError(f"model.encoder_from: timm has no weights for {name} here: {error}") from error
    return model.state_dict()


def load_encoder(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights into ``model.encoder``; all of the encoder must be there, and nothing beyond but a head.

    Raises:
        CheckpointError: names or shapes that do not fit.
    """
    encoder: Any = model.encoder
    own = encoder.state_dict()
    given = {
        name: value
        for name, value in weights.items()
        if name in own or name.split(".")[0] not in CLASSIFIER_PARTS
    }
    check_fit(given, own, f"model.encoder_from {source}")
    encoder.load_state_dict(given)
