"""Images, masks and folders of them as files: which belong together, and what their pixels mean.

Pillow and NumPy alone. Training and interpretation read files through this package only, so that every rule
(names of folders, hidden files, transparency, masks) is written once.
"""

from cbsa_torch.images.decode import convert, read_image_file
from cbsa_torch.images.errors import DataError, UnreadableImageError
from cbsa_torch.images.folders import SPLIT_NAMES, Scan, class_folders, class_samples, class_splits, find_splits
from cbsa_torch.images.masks import IGNORE, LabelMap, labels_from_colours, read_foreground, read_mask_file
from cbsa_torch.images.pairs import Pair, check_pairs, check_size, pair_folders

__all__ = [
    "IGNORE",
    "SPLIT_NAMES",
    "DataError",
    "LabelMap",
    "Pair",
    "Scan",
    "UnreadableImageError",
    "check_pairs",
    "check_size",
    "class_folders",
    "class_samples",
    "class_splits",
    "convert",
    "find_splits",
    "labels_from_colours",
    "pair_folders",
    "read_foreground",
    "read_image_file",
    "read_mask_file",
]
