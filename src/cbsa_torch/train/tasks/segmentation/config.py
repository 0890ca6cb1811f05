"""Settings of segmentation data: which images and masks, how they are augmented, how scenes are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cbsa_torch.train.config import (
    LOCAL,
    WEIGHTS,
    ImageSource,
    ModelConfig,
    RunConfig,
    check_rules,
    image_rules,
)


@dataclass
class ScenesConfig:
    """How the scenes of ``emoji-scenes`` are drawn. Another seed or setting is another data set.

    Examples:
        >>> from cbsa_torch.train import ScenesConfig
        >>> ScenesConfig(size=64).emoji
        (2, 6)
    """

    seed: int = 0
    """Seed of the data set, not of the run: all runs see the same scenes."""
    size: int = 128
    """Side of the square canvas in pixels."""
    train: int = 4000
    """Training scenes; an epoch shows each once, augmented anew."""
    val: int = 500
    """Validation scenes, of emoji that no training scene shows."""
    test: int = 1000
    """Test scenes, of emoji that neither of the others shows."""
    emoji: tuple[int, int] = (2, 6)
    """Fewest and most emoji pasted on a scene."""
    scale: tuple[float, float] = (0.25, 0.6)
    """Smallest and largest side of an emoji, as a share of the canvas."""
    rotate: float = 30.0
    """Emoji are turned by up to this many degrees."""
    hflip: float = 0.5
    """Probability that an emoji is mirrored."""


@dataclass
class SegmentationDataConfig(ImageSource):
    """The images, their masks and the augmentation.

    Examples:
        >>> from cbsa_torch.train import SegmentationDataConfig
        >>> SegmentationDataConfig(root="scenes", mask_values=(0, 255)).crop_size
        512
    """

    name: str = "folder"
    """"folder", "ade20k", "voc", "pascal_context", "pascal_context_59", "cityscapes" or "emoji-scenes"."""
    root: str | None = field(default=None, metadata=LOCAL)
    """Folder of the data set; of emoji-scenes that of emoji64.npz (default: $CBSA_DATA, else
    ~/.cache/cbsa_torch)."""
    ignore_label: int | None = None
    """Pixel value of a "folder"'s masks that stands for no class. Default: there is none."""
    mask_values: tuple[int, ...] = ()
    """Pixel values of a "folder"'s masks that stand for the classes, in the order of classes.txt, e.g. 0 255 in
    binary masks. Default: 0, 1, 2 ..."""
    crop_size: int = 512
    """Side of the square training crops; what an image leaves free is padded and ignored."""
    base_size: int | None = None
    """Shorter side of a training image at scale 1. Default: crop_size."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Smallest and largest scale of training images."""
    max_class_share: float | None = 0.75
    """Crops in which one class has a larger share are drawn again, up to ten times in all."""
    photometric: bool = True
    """Change brightness, contrast, saturation and hue at random."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)


@dataclass
class WindowConfig:
    """How whole images are seen in validation and evaluation: by windows, averaged where they overlap.

    Examples:
        >>> from cbsa_torch.train import WindowConfig
        >>> WindowConfig(size=512, stride=341).batch
        8
    """

    size: int | None = None
    """Side of the square windows in pixels; a shorter side of an image is taken whole.
    Default: data.crop_size."""
    stride: int | None = None
    """Pixels from one window to the next. Default: the window."""
    batch: int = 8
    """Windows of an image at a time; changes memory and time, not the result."""
    native: bool = False
    """No windows: images are seen whole and at their own size, several of them in a batch without padding."""
    max_tokens: int = 4096
    """With native: tokens (patches and classes) in a forward pass; a larger image goes alone. Changes memory
    and time, not the result."""


@dataclass
class SegmentationModelConfig(ModelConfig):
    """The model; its args are those of `cbsa_torch.models.segmenter`: encoder, mixer, dim ...

    Examples:
        >>> from cbsa_torch.train import SegmentationModelConfig
        >>> SegmentationModelConfig(args={"encoder": "vit_small_patch16_224"}, encoder_from="pretrained").name
        'segmenter'
    """

    name: str = "segmenter"
    """The model of timm that has an encoder and a decoder of masks."""
    encoder_from: str | None = field(default=None, metadata=WEIGHTS)
    """Weights that the encoder starts from: "pretrained" for those that timm has for model.args encoder; a
    trained classifier as for init_from, which then also says which encoder it is; or a plain state dict of the
    encoder that model.args encoder names."""


@dataclass(kw_only=True)
class SegmentationTrainConfig(RunConfig):
    """Train a segmenter: an encoder of images and a decoder of masks.

    Examples:
        >>> from cbsa_torch.train import SegmentationDataConfig, SegmentationTrainConfig
        >>> config = SegmentationTrainConfig(output="runs/scenes", data=SegmentationDataConfig(root="scenes"))
        >>> config.model.name, config.data.crop_size
        ('segmenter', 512)
    """

    task: ClassVar[str] = "segmentation"
    """Its name."""
    model: SegmentationModelConfig = field(default_factory=SegmentationModelConfig)
    data: SegmentationDataConfig = field(default_factory=SegmentationDataConfig)
    windows: WindowConfig = field(default_factory=WindowConfig)


def check_data_config(config: SegmentationDataConfig) -> None:
    """Refuse values that cannot work; raises ConfigError."""
    scenes, share, ignore = config.scenes, config.max_class_share, config.ignore_label
    values, own = config.mask_values, config.name == "folder"
    elsewhere = f"is of data.name 'folder'; {config.name!r} has its own"
    base = config.crop_size if config.base_size is None else config.base_size
    rules = [
        *image_rules(config),
        (config.crop_size >= 1, "data.crop_size must be at least 1", config.crop_size),
        (base >= 1, "data.base_size must be at least 1", base),
        (0 < config.scale[0] <= config.scale[1], "data.scale must rise above 0", config.scale),
        (share is None or 0 < share <= 1, "data.max_class_share must be in (0, 1]", share),
        (ignore is None or 0 <= ignore <= 0xFFFF, "data.ignore_label must be in [0, 65535]", ignore),
        (ignore is None or own, f"data.ignore_label {elsewhere}", ignore),
        (all(0 <= value <= 0xFFFF for value in values), "data.mask_values must be in [0, 65535]", values),
        (not values or own, f"data.mask_values {elsewhere}", values),
        (scenes.seed >= 0, "data.scenes.seed must not be negative", scenes.seed),
        (scenes.size >= 8, "data.scenes.size must be at least 8", scenes.size),
        (scenes.train >= 1, "data.scenes.train must be at least 1", scenes.train),
        (scenes.val >= 1, "data.scenes.val must be at least 1", scenes.val),
        (scenes.test >= 1, "data.scenes.test must be at least 1", scenes.test),
        (0 <= scenes.emoji[0] <= scenes.emoji[1], "data.scenes.emoji must rise from 0", scenes.emoji),
        (0 < scenes.scale[0] <= scenes.scale[1] <= 1, "data.scenes.scale must rise in (0, 1]", scenes.scale),
        (0 <= scenes.rotate <= 180, "data.scenes.rotate must be in [0, 180] degrees", scenes.rotate),
        (0 <= scenes.hflip <= 1, "data.scenes.hflip must be in [0, 1]", scenes.hflip),
    ]
    check_rules(rules)
