"""Data sets of labelled images: digits, fetched packages, folders, and what timm's factory opens."""

from cbsa_torch.images import IGNORE, read_image_file
from cbsa_torch.train.data.checked_images import read_skipped
from cbsa_torch.train.data.loader import (
    InputSpec,
    input_spec,
    make_loader,
    make_native_loader,
    native_size,
    native_transform,
)
from cbsa_torch.train.data.native import NativeSize, TokenBatches, in_parts
from cbsa_torch.train.data.seeded import set_epoch
from cbsa_torch.train.data.splits import OpenedSplit, Splits, class_names_of, open_split, open_splits
from cbsa_torch.train.data.summary import describe, describe_split

__all__ = [
    "IGNORE",
    "InputSpec",
    "NativeSize",
    "OpenedSplit",
    "Splits",
    "TokenBatches",
    "class_names_of",
    "describe",
    "describe_split",
    "in_parts",
    "input_spec",
    "make_loader",
    "make_native_loader",
    "native_size",
    "native_transform",
    "open_split",
    "open_splits",
    "read_image_file",
    "read_skipped",
    "set_epoch",
]
