"""Semantic segmentation: data sets of images and masks, their transforms, metrics and pictures."""

from cbsa_torch.images import IGNORE
from cbsa_torch.train.tasks.segmentation.colours import colour_mask, palette, write_coloured_mask
from cbsa_torch.train.tasks.segmentation.config import (
    ScenesConfig,
    SegmentationDataConfig,
    SegmentationTrainConfig,
)
from cbsa_torch.train.tasks.segmentation.evaluation import SegmentationMetric, miou_without, to_record
from cbsa_torch.train.tasks.segmentation.scenes import EmojiScenes, open_scenes
from cbsa_torch.train.tasks.segmentation.splits import open_segmentation, open_segmentation_split
from cbsa_torch.train.tasks.segmentation.transforms import evaluation_transform, training_transform

__all__ = [
    "IGNORE",
    "EmojiScenes",
    "ScenesConfig",
    "SegmentationDataConfig",
    "SegmentationMetric",
    "SegmentationTrainConfig",
    "colour_mask",
    "evaluation_transform",
    "miou_without",
    "open_scenes",
    "open_segmentation",
    "open_segmentation_split",
    "palette",
    "to_record",
    "training_transform",
    "write_coloured_mask",
]
