"""Folders of images and masks of any content are paired by the rules of docs/reference/segmentation_data.md, or refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbsa_torch.train.errors import DataError
from cbsa_torch.train.tasks.segmentation import SegmentationDataConfig, open_segmentation

SPLITS = {"train": "train", "Val": "val", "TESTING": "test"}
PLACES = ("", "deep/", ".cache/", "caf\udce9/")
NAMES = ("0.png", "0.jpg", "1.png", "a b.png", "[x].png", "._0.png", "notes.txt", "0_mask.png")
files = st.tuples(
    st.sampled_from((*SPLITS, "extra")),
    st.sampled_from(("images", "masks")),
    st.sampled_from(PLACES),
    st.sampled_from(NAMES),
)
whole = [(split, kind, "", "0.png") for split in SPLITS for kind in ("images", "masks")]
trees = st.tuples(st.sampled_from((0, 2, 4, 6)), st.lists(files, max_size=5))


class Refused(Exception):  # noqa: N818
    """The rules refuse the folder."""


def by_the_rules(tree):
    """The keys of each split that are paired, from the files as they were written; or Refused."""
    found = {}
    for split, kind, place, name in dict.fromkeys(tree):
        if split not in SPLITS:
            continue
        keys = found.setdefault(SPLITS[split], {}).setdefault(kind, [])
        if name.endswith(".txt") or name.startswith(".") or place.startswith("."):
            continue
        keys.append(place + name.rpartition(".")[0])
    if "train" not in found:
        raise Refused("no train")
    pairs = {}
    for split, kinds in found.items():
        if split == "test" and not kinds.get("masks"):
            if "masks" in kinds and not kinds.get("images"):
                raise Refused("nothing there")
            if "masks" in kinds and len({*kinds["images"]}) < len(kinds["images"]):
                raise Refused("two files of one name")
            continue
        if set(kinds) != {"images", "masks"}:
            raise Refused("a folder is missing")
        if any(len({*keys}) < len(keys) for keys in kinds.values()):
            raise Refused("two files of one name")
        if not {*kinds["images"]} & {*kinds["masks"]}:
            raise Refused("no pair is whole")
        pairs[split] = {*kinds["images"], *kinds["masks"]}
    if "val" not in pairs and len(pairs["train"]) < 2:
        raise Refused("nothing to hold out")
    return pairs


@settings(max_examples=100, deadline=None)
@given(tree=trees)
def test_every_folder_is_paired_by_the_rules_or_refused_with_the_cause(tmp_path_factory, tree):
    tree = [*whole[: tree[0]], *tree[1]]
    compare(tmp_path_factory.mktemp("pairs"), tree, tree, by_the_rules, folders=2)


def within_by_the_rules(tree):
    """The same where the splits are folders within ``images`` and ``masks``."""
    kinds = {kind: {} for kind in ("images", "masks")}
    for split, kind, place, name in dict.fromkeys(tree):
        keys = kinds[kind].setdefault(split, [])
        if not name.endswith(".txt") and not name.startswith(".") and not place.startswith("."):
            keys.append(place + name.rpartition(".")[0])
    images, masks = kinds["images"], kinds["masks"]
    if not images or not masks:
        raise Refused("a folder is missing")
    if not {*images} & {*SPLITS}:  # then all of it is one split
        keys = [[f"{split}/{key}" for split in found for key in found[split]] for found in (images, masks)]
        found = {"train": keys}
    elif images.get("extra") or not {*masks} & {*SPLITS} <= {*images}:
        raise Refused("other folders with images, or masks of a split without images")
    else:
        found = {}
        for split in {*images} & {*SPLITS}:
            if split in masks or split != "TESTING":
                found[SPLITS[split]] = images[split], masks.get(split)
    if "train" not in found or any(keys is None for _, keys in found.values()):
        raise Refused("a folder is missing")
    for split, (image_keys, mask_keys) in [*found.items()]:
        if any(len({*keys}) < len(keys) for keys in (image_keys, mask_keys)):
            raise Refused("two files of one name")
        if split == "test" and image_keys and not {*image_keys} & {*mask_keys} and not mask_keys:
            del found[split]
        elif not {*image_keys} & {*mask_keys}:
            raise Refused("no pair is whole")
    pairs = {split: {*image_keys, *mask_keys} for split, (image_keys, mask_keys) in found.items()}
    if "val" not in pairs and len(pairs["train"]) < 2:
        raise Refused("nothing to hold out")
    return pairs


@settings(max_examples=100, deadline=None)
@given(tree=trees)
def test_splits_within_the_folders_are_paired_by_the_rules_too(tmp_path_factory, tree):
    tree = [*whole[: tree[0]], *tree[1]]
    paths = [(kind, split, place, name) for split, kind, place, name in tree]
    folders = 2 if {split for split, kind, _, _ in tree if kind == "images"} & {*SPLITS} else 1
    compare(tmp_path_factory.mktemp("within"), paths, tree, within_by_the_rules, folders=folders)


def compare(root, paths, tree, rules, folders):
    """The pairs that are read are those of the rules; keys start below so many folders in ``root``."""
    (root / "classes.txt").write_text("a\nb")
    for *place, name in paths:
        root.joinpath(*place).mkdir(parents=True, exist_ok=True)
        root.joinpath(*place, name).write_bytes(b"not read here")
    config = SegmentationDataConfig(root=str(root), max_bad_images=99)
    try:
        expected = rules(tree)
    except Refused:
        with pytest.raises(DataError) as caught:
            open_segmentation(config)
        assert str(root) in str(caught.value) or "too few to hold out" in str(caught.value)
        return
    read = {}
    for name, dataset in open_segmentation(config).parts().items():
        for pair in dataset.pairs:
            keys = {path.relative_to(root).with_suffix("").parts[folders:] for path in pair}
            assert len(keys) == 1
            read.setdefault(name, []).append("/".join(keys.pop()))
    if "val" not in expected:
        read["train"] += read.pop("val")
    assert {name: sorted(keys) for name, keys in read.items()} == {k: sorted(v) for k, v in expected.items()}
