"""Semantic segmentation: data sets of images and masks, their transforms, metrics and pictures."""

from cbsa_torch.train.data import IGNORE
from cbsa_torch.train.tasks.segmentation.colours import colour_mask, palette, write_coloured_mask
from cbsa_torch.train.tasks.segmentation.config import (
    ScenesConfig,
    SegmentationDataConfig,
    SegmentationTrainConfig,
)
from cbsa_torch.train.tasks.segmentation.evaluation import (
    ClassScore,
    SegmentationMetric,
    SegmentationScores,
    miou_without,
    scores,
    to_record,
)
from cbsa_torch.train.tasks.segmentation.masks import LabelMap, labels_from_colours, read_mask_file
from cbsa_torch.train.tasks.segmentation.pairs import MaskedImages, Pair
from cbsa_torch.train.tasks.segmentation.scenes import EmojiScenes, open_scenes
from cbsa_torch.train.tasks.segmentation.splits import (
    SegmentationSplits,
    open_segmentation,
    open_segmentation_split,
)
from cbsa_torch.train.tasks.segmentation.transforms import (
    MaskedTransform,
    evaluation_transform,
    training_transform,
)

__all__ = [
    "IGNORE",
    "ClassScore",
    "EmojiScenes",
    "LabelMap",
    "MaskedImages",
    "MaskedTransform",
    "Pair",
    "ScenesConfig",
    "SegmentationDataConfig",
    "SegmentationMetric",
    "SegmentationScores",
    "SegmentationSplits",
    "SegmentationTrainConfig",
    "colour_mask",
    "evaluation_transform",
    "labels_from_colours",
    "miou_without",
    "open_scenes",
    "open_segmentation",
    "open_segmentation_split",
    "palette",
    "read_mask_file",
    "scores",
    "to_record",
    "training_transform",
    "write_coloured_mask",
]
