"""The configuration of a run: typed dataclasses that are also the command line and the YAML file.

A recipe is a YAML file with the same names, for the keys it sets. Unknown keys are errors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cbsa_torch._core.checks import nearest
from cbsa_torch.train.errors import ConfigError
from cbsa_torch.train.free_form import FreeArgs, write_yaml

T = TypeVar("T")


LOCAL = {"local": True}
"""Metadata of settings that tell of a machine or a run's folder, not of the model: they are not published."""
WEIGHTS = {**LOCAL, "weights": True}
"""Metadata of settings that name weights, which must not lie in the run's own folder."""
UNCOMPARED = {"compared": False}
"""Metadata of settings that a continued run may change, as they do not change what is computed."""


FOLDERS = ("folder", "", "torch/folder", "torch/image_folder")
"""Names of data sets that are a folder of the user's, whatever timm calls it."""


@dataclass
class ModelConfig:
    """The model.

    Examples:
        >>> from cbsa_torch.train import ModelConfig
        >>> config = ModelConfig("cbt_small_patch16_224", args={"contraction": "exact"})
        >>> config.init_from is None  # trained from scratch
        True
    """

    name: str = "cbt_tiny_patch16_224"
    """A timm model name; `cbsa list` shows ours."""
    image_size: int | None = None
    """Side in pixels that images are resized to. Default: what the model was designed for."""
    args: FreeArgs = field(default_factory=dict)
    """Further constructor arguments, e.g. num_representatives 49 contraction exact; those that a recipe or
    file gives stay, unless they are given here."""
    init_from: str | None = field(default=None, metadata=WEIGHTS)
    """Start from the weights of this run folder, .safetensors file of ours, released checkpoint (.pth,
    .pth.tar) of the official code, plain state dict of the model `name`, or hf-hub:owner/name (fine-tuning)."""

    def __post_init__(self) -> None:
        try:  # one form of every value, in which configurations are stored and compared
            self.args = json.loads(json.dumps(self.args))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model.args must hold plain values, got {self.args}: {error}") from error


@dataclass
class DataSource:
    """The settings that every kind of data has."""

    name: str = "folder"
    """Which data set."""
    root: str | None = field(default=None, metadata=LOCAL)
    """Its folder."""
    val_fraction: float = 0.1
    """Share of the training images held out for validation if there is no val split."""
    workers: int = field(default=4, metadata=LOCAL | UNCOMPARED)
    """Processes that read images; 0: the training process itself."""


def usual_workers() -> int:
    """``data.workers`` where nothing says how many: no more than there are cores, which PyTorch warns of."""
    return min(DataSource.workers, os.cpu_count() or 1)


@dataclass
class ImageSource(DataSource):
    """The settings that every kind of images has."""

    splits: Literal["auto", "folders", "none"] = "auto"
    """What folders called train, val, test ... are in a folder of your own: "folders" = splits; "none" =
    classes, or folders like any other; "auto" = splits, and an error where they may be either."""
    max_bad_images: int = field(default=10, metadata=UNCOMPARED)
    """Unreadable images, and bad masks, that are left out, counted and listed; one more stops the run. 0: the
    first does."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""


@dataclass
class DataConfig(ImageSource):
    """The images and their augmentation.

    Examples:
        >>> from cbsa_torch.train import DataConfig
        >>> DataConfig(root="photos", crop_scale=(0.5, 1.0)).crop_ratio
        (0.75, 1.3333)
    """

    name: str = "folder"
    """"digits" (embedded), "animals28" or "emoji64" (`cbsa data fetch`), "folder", "flowers102" or "pets", or a
    name for timm's dataset factory, e.g. "torch/cifar10"."""
    root: str | None = field(default=None, metadata=LOCAL)
    """Folder with train/, val/ and perhaps test/, each holding one folder of images per class; or, for a
    timm data set, where its files are; or, for a fetched one, its folder (default: $CBSA_DATA, else
    ~/.cache/cbsa_torch)."""
    download: bool = field(default=False, metadata=LOCAL | UNCOMPARED)
    """Let timm or torchvision download the data set, if they can."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Random resized crop: smallest and largest share of the area."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333)
    """Random resized crop: smallest and largest ratio of sides."""
    rotate: float = 0.0
    """Random rotation by up to this many degrees."""
    shift: float = 0.0
    """Random shift by up to this share of the sides."""
    color_jitter: float = 0.0
    """Strength of colour jitter: brightness, contrast and saturation change by up to this share. timm leaves it
    out beside auto_augment."""
    native: bool = False
    """Images at their own size: neither resized nor cropped to one size (data.crop_scale and data.crop_ratio
    make crops of the images' own scale), several sizes in a batch without padding. For the models of
    `cbsa list`."""
    max_tokens: int = 16384
    """With data.native: tokens of a process in a forward pass. Batches are filled up to it, or to
    optim.batch_size images; larger images are shrunk to fit into one."""
    max_image_tokens: int | None = None
    """With data.native: tokens of an image, class token included; larger ones are shrunk, in evaluation too."""
    auto_augment: str | None = None
    """timm's policy: "rand", "augmix", "original", "originalr", "v0", "v0r" or "3a", with its numbers after
    dashes, e.g. "rand-m9-mstd0.5". timm takes a magnitude m above 10 for 10, unless mmax is given."""


@dataclass
class OptimConfig:
    """The optimiser and its schedule.

    Examples:
        >>> from cbsa_torch.train import OptimConfig
        >>> OptimConfig("adamw", lr=1e-3, epochs=30, warmup_epochs=2).batch_size
        256
    """

    name: str = "lion"
    """Any timm optimiser, e.g. "lion" (the paper's for ImageNet) or "adamw"."""
    lr: float = 2e-4
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Strength of weight decay, on matrices only unless decay_everything."""
    decay_everything: bool = False
    """Also decay biases, norms, embeddings and step sizes, as the official code does."""
    batch_size: int = 256
    """Images per optimiser step, over all processes and accumulation steps."""
    epochs: int = 150
    """How often every training image is seen."""
    warmup_epochs: float = 20
    """Linear warm-up from warmup_lr to lr, at most `epochs` long; then the schedule down to min_lr."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step of the warm-up; lr, if that is smaller."""
    min_lr: float = 0.0
    """Learning rate at the end of the schedule."""
    schedule: Literal["cosine", "poly"] = "cosine"
    """How the learning rate falls: as half a cosine, or as a power of the share of steps that is left."""
    poly_power: float = 0.9
    """That power; 1 is a straight line."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all classes, in [0, 1)."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    ema_decay: float | None = None
    """Evaluate and keep an exponential moving average of the weights with this decay."""
    keep: Literal["best", "last"] = "best"
    """The epoch whose weights are kept for use: the best on the validation split, of equal ones that with the
    smallest loss, or the last (where that split is too small to choose by)."""


@dataclass
class EngineConfig:
    """How it is computed; Accelerate chooses devices and processes (`accelerate launch`).

    Examples:
        >>> from cbsa_torch.train import EngineConfig
        >>> EngineConfig(precision="bf16", accumulate=4, tracker="none").keep_states
        2
    """

    precision: Literal["no", "bf16", "fp16"] = "no"
    """Mixed precision."""
    cpu: bool = field(default=False, metadata=LOCAL)
    """Use the CPU although there is a GPU."""
    accumulate: int = 1
    """Gradient accumulation steps."""
    threads: int | None = field(default=None, metadata=LOCAL)
    """CPU threads of torch."""
    compile: bool = False
    """torch.compile the model."""
    fsdp: bool = False
    """Shard weights, gradients and optimiser over the processes (FSDP2) instead of copying them (DDP)."""
    context_parallel: int = 1
    """Processes that share the rows of every training image, or the tiles of every slide; their number must
    divide that of all."""
    save_steps: int | None = field(default=None, metadata=UNCOMPARED)
    """Save the state also every this many optimiser steps, besides after every epoch."""
    keep_states: int = field(default=2, metadata=UNCOMPARED)
    """How many of the last states are kept."""
    tracker: str = field(default="tensorboard", metadata=LOCAL | UNCOMPARED)
    """Any tracker that Accelerate knows ("wandb", "mlflow", "trackio" ...), or "none"."""


@dataclass(kw_only=True)
class RunConfig:
    """What every run is told, whatever it trains; each task has a configuration of its own."""

    task: ClassVar[str]
    """The key ``task`` of a YAML file; without it a file is about classification."""

    output: str = field(default="runs/latest", metadata=LOCAL | UNCOMPARED)
    """The run's folder."""
    seed: int = 0
    """Seed of all random numbers: first weights, order of the images, augmentation, dropout. From 0 on."""
    resume: bool = field(default=False, metadata=LOCAL | UNCOMPARED)
    """Take the configuration from the run in the output folder, which must exist. Without it, a run of the
    same configuration is continued, too."""
    accept_changes: bool = field(default=False, metadata=LOCAL | UNCOMPARED)
    """Continue the run in the output folder although its configuration is another."""
    overwrite: bool = field(default=False, metadata=LOCAL | UNCOMPARED)
    """Replace the run in the output folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataSource
    """The task's."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """Train an image classifier.

    Examples:
        >>> from cbsa_torch.train import DataConfig, TrainConfig
        >>> config = TrainConfig(output="runs/photos", data=DataConfig(root="photos"))
        >>> config.optim.name, config.seed
        ('lion', 0)
    """

    task: ClassVar[str] = "classification"
    """Its name."""
    data: DataConfig = field(default_factory=DataConfig)


def settings(config: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[Any, Any], Any]]:
    """Every setting of a configuration: its key, such as "optim.lr", its metadata and its value."""
    for item in dataclasses.fields(config):
        key, value = f"{prefix}{item.name}", getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from settings(value, f"{key}.")
        else:
            yield key, item.metadata, value


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Everything as plain values, for YAML and JSON; the task is named where it is not classification."""
    # replaced by itself: arguments that were set later are checked, too
    model = dataclasses.replace(config.model)
    values = json.loads(json.dumps(dataclasses.asdict(dataclasses.replace(config, model=model)), default=str))
    return values if config.task == TrainConfig.task else {"task": config.task, **values}


def dump_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML that :func:`cbsa_torch.train.load_config` reads back."""
    return write_yaml(to_dict(config), sort_keys=False)


def from_dict(cls: type[T], values: Any, where: str) -> T:
    """Build a dataclass from a mapping; unknown keys and values of another type raise ConfigError."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must be a mapping of keys to values, got {type(values).__name__}")
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = {name: hint for name, hint in get_type_hints(cls).items() if name in fields}
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise ConfigError(
            f"unknown key {unknown[0]!r} in {where}{nearest(unknown[0], hints)} (allowed: {', '.join(hints)})"
        )
    return cls(**{key: _convert(value, hints[key], f"{where}: {key}") for key, value in values.items()})


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check ``value`` against the annotation ``hint``, converting what YAML writes differently."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        # YAML reads an unquoted no as False
        value = "no" if value is False and "no" in args else value
        if value not in args:
            choices = ", ".join(map(repr, args))
            raise ConfigError(f"{where} must be one of {choices}, got {value!r}{nearest(value, args)}")
        return value
    if origin is tuple:
        if args[-1] is ... and isinstance(value, (list, tuple)):
            args = args[:1] * len(value)
        if not isinstance(value, (list, tuple)) or len(value) != len(args):
            count = "a list of" if args[-1] is ... else len(args)
            raise ConfigError(f"{where} must be {count} values, got {value!r}")
        return tuple(_convert(v, a, where) for v, a in zip(value, args, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a mapping, got {value!r}")
        return {str(k): v for k, v in value.items()}
    # other readers of YAML leave 1e-3 (no dot) a string; 20 is an integer
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif type(value) is hint:
        return value
    raise ConfigError(f"{where} must be {hint.__name__}, got {value!r} of type {type(value).__name__}")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one: ``{"optim.lr": 0.001, ...}``."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return result


def check_rules(rules: Iterable[tuple[bool, str, Any]]) -> None:
    """Raise ConfigError for the first of (holds, rule, got) that does not hold."""
    for holds, rule, got in rules:
        if not holds:
            raise ConfigError(f"{rule}, got {got}")


def check_config(config: RunConfig) -> None:
    """Refuse values that cannot work, before anything is read or written; the data are the task's to check."""
    for key, value in flat(to_dict(config)).items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise ConfigError(f"{key} must be finite, got {item}")
    optim, ema = config.optim, config.optim.ema_decay
    threads, every, keep = config.engine.threads, config.engine.save_steps, config.engine.keep_states
    shared = config.engine.context_parallel
    native = isinstance(config.data, DataConfig) and config.data.native
    size, model = config.model.image_size, config.model
    check_rules([
        (0 <= config.seed < 2**31, "seed must be in [0, 2**31)", config.seed),
        (size is None or size >= 1, "model.image_size must be at least 1", size),
        (
            "num_classes" not in model.args,
            "model.args num_classes must be left out (the data gives the number of classes)",
            model.args.get("num_classes"),
        ),
        (
            size is None or "img_size" not in model.args,
            "model.args img_size must be left out beside model.image_size",
            model.args.get("img_size"),
        ),
        (optim.batch_size >= 1, "optim.batch_size must be at least 1", optim.batch_size),
        (optim.epochs >= 1, "optim.epochs must be at least 1", optim.epochs),
        (optim.lr > 0, "optim.lr must be positive", optim.lr),
        (optim.weight_decay >= 0, "optim.weight_decay must not be negative", optim.weight_decay),
        (optim.warmup_epochs >= 0, "optim.warmup_epochs must not be negative", optim.warmup_epochs),
        (0 <= optim.label_smoothing < 1, "optim.label_smoothing must be in [0, 1)", optim.label_smoothing),
        (ema is None or 0 < ema < 1, "optim.ema_decay must be in (0, 1)", ema),
        (optim.poly_power > 0, "optim.poly_power must be positive", optim.poly_power),
        (0 <= optim.min_lr <= optim.lr, "optim.min_lr must be in [0, optim.lr]", optim.min_lr),
        (optim.warmup_lr >= 0, "optim.warmup_lr must not be negative", optim.warmup_lr),
        (optim.clip_grad is None or optim.clip_grad > 0, "optim.clip_grad must be positive", optim.clip_grad),
        (threads is None or 1 <= threads <= 4096, "engine.threads must be in [1, 4096]", threads),
        (config.engine.accumulate >= 1, "engine.accumulate must be at least 1", config.engine.accumulate),
        (shared >= 1, "engine.context_parallel must be at least 1", shared),
        (
            not (native and config.engine.compile),
            "engine.compile must be off with data.native: it would compile every size anew",
            config.engine.compile,
        ),
        (
            shared == 1 or not native,
            "engine.context_parallel must be 1 with data.native: processes share rows of images of one size",
            shared,
        ),
        (keep >= 1, "engine.keep_states must be at least 1", keep),
        (every is None or every >= 1, "engine.save_steps must be at least 1", every),
        (
            ema is None or not config.engine.fsdp,
            "optim.ema_decay must be unset with engine.fsdp (sharded weights are not averaged)",
            ema,
        ),
        (not (config.resume and config.overwrite), "resume and overwrite exclude each other", "both"),
    ])  # fmt: skip


def data_rules(data: DataSource) -> list[tuple[bool, str, Any]]:
    """What holds for every kind of data, as :func:`check_rules` takes it."""
    return [
        (0 < data.val_fraction < 1, "data.val_fraction must be in (0, 1)", data.val_fraction),
        (0 <= data.workers <= 1024, "data.workers must be in [0, 1024]", data.workers),
    ]


def image_rules(data: ImageSource) -> list[tuple[bool, str, Any]]:
    """What holds for every kind of images."""
    return [
        *data_rules(data),
        (data.max_bad_images >= 0, "data.max_bad_images must not be negative", data.max_bad_images),
        (0 <= data.hflip <= 1, "data.hflip must be in [0, 1]", data.hflip),
        (
            data.splits == "auto" or data.name in FOLDERS,
            f"data.splits is of data.name 'folder'; {data.name!r} has its own",
            data.splits,
        ),
    ]


def check_image_settings(data: DataConfig) -> None:
    """Refuse settings of a classifier's images that cannot work."""
    scale, ratio, limit = data.crop_scale, data.crop_ratio, data.max_image_tokens
    check_rules([
        *image_rules(data),
        (0 <= data.color_jitter <= 10, "data.color_jitter must be in [0, 10]", data.color_jitter),
        (0 < scale[0] <= scale[1] <= 1, "data.crop_scale must rise in (0, 1]", scale),
        (0 < ratio[0] <= ratio[1], "data.crop_ratio must rise above 0", ratio),
        (data.max_tokens >= 2, "data.max_tokens must be at least 2", data.max_tokens),
        (limit is None or limit >= 2, "data.max_image_tokens must be at least 2", limit),
        (data.native or limit is None, "data.max_image_tokens must be left out without data.native", limit),
        (0 <= data.rotate <= 180, "data.rotate must be in [0, 180] degrees", data.rotate),
        (0 <= data.shift <= 1, "data.shift must be in [0, 1]", data.shift),
    ])  # fmt: skip
