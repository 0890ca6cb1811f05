"""Folders of any layout are read by the rules that docs/reference/data.md states, or refused: these rules, written again."""

from __future__ import annotations

import contextlib
import io
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cbsa_torch.cli import main
from cbsa_torch.images import IGNORE
from cbsa_torch.train.config import DataConfig
from cbsa_torch.train.data import describe, open_splits
from cbsa_torch.train.data.checked_images import PlainImages
from cbsa_torch.train.errors import DataError

SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
ODD = ("caf\udce9", "[/b] a\tb", "ünï", "train\n")
"""Names that are not UTF-8, that look like markup, that hold white space."""
HIDDEN = (".ipynb_checkpoints", "__MACOSX", "@eaDir")
TOPS = ("train", "Training", "val", "DEV", "test", "Testing", "extra", "ant", *HIDDEN, *ODD)
CLASSES = ("ant", "bee", "train", *HIDDEN, *ODD)
FILES = ("0.png", "1.PNG", "2.jpg", "._0.png", "Thumbs.db", "notes.txt", "Val", "[x].png", "caf\udce9.png")
KINDS = ("image", "image", "image", "broken", "pipe", "dangling", "link")


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = picture()

folders = st.one_of(
    st.tuples(st.sampled_from(TOPS), st.sampled_from(CLASSES)),
    st.tuples(st.sampled_from(("train", "val", "test")), st.sampled_from(CLASSES[:2])),
    st.tuples(st.sampled_from(TOPS)),
    st.just(()),
    st.tuples(st.sampled_from(TOPS), st.sampled_from(CLASSES), st.sampled_from(CLASSES)),
)
entries = st.tuples(folders, st.sampled_from(FILES), st.sampled_from(KINDS), st.integers(0, 9), st.booleans())
STARTS = ((), ("ant", "bee"), ("TRAIN/ant", "TRAIN/bee"), ("train/ant", "train/bee"))
STARTS += tuple((*STARTS[-1], f"{val}/ant") for val in ("val", "DEV", "Test"))
"""Folders with two images each, from which a tree begins."""
trees = st.tuples(st.sampled_from(STARTS), st.lists(entries, max_size=4))


def build(root, entries):
    """Write the files, and links to what is there already: to a file, or to its folder."""
    written = [root]
    for parts, name, kind, target, to_folder in entries:
        folder = root.joinpath(*parts)
        path = folder / (f"to {name}" if kind == "link" and to_folder else name)
        if path.exists() or path.is_symlink():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        aim = written[target % len(written)]
        if kind == "link" and to_folder:
            path.symlink_to(aim if aim.is_dir() else aim.parent)
        elif kind == "link":
            path.symlink_to(aim)
        elif kind == "dangling":
            path.symlink_to("nowhere.png")
        elif kind == "pipe":  # to read it would never end
            os.mkfifo(path)
        else:
            path.write_bytes(PICTURE if kind == "image" else b"broken")
        written.append(path)


class Refused(Exception):  # noqa: N818
    """The rules refuse the tree."""


def visible(folder):
    return [
        path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and path.name.lower() not in ("__macosx", "@eadir", "thumbs.db")
    ]


def folders_in(folder):
    return [path for path in visible(folder) if path.is_dir()]


def is_image(path):
    return path.suffix.lower() in (".png", ".jpg") and not path.is_dir()


def images_below(folder, seen):
    """The images, and in ``seen`` the real paths of all folders and images."""
    seen.append(os.path.realpath(folder))
    if Counter(seen).most_common(1)[0][1] > 1:  # else a loop of links has no end
        raise Refused("a folder twice")
    for path in visible(folder):
        if path.is_dir():
            yield from images_below(path, seen)
        elif not path.exists() and not is_image(path):
            raise Refused("a link that leads nowhere, perhaps to a folder")
        elif is_image(path) and (path.is_file() or not path.exists()):
            if path.exists():
                seen.append(os.path.realpath(path))
            yield path


def by_the_rules(root):
    """The images of each split with their classes, by their paths; or Refused."""
    found = [path for path in visible(root) if path.name.lower() in SPLITS]
    if not all(path.is_dir() for path in found):
        raise Refused("called like a split and no folder")
    taken = {SPLITS[path.name.lower()]: path for path in found}
    if len(taken) < len(found):
        raise Refused("two folders of one split")
    if any(not folders_in(path) and any(map(is_image, visible(path))) for path in found):
        raise Refused("a class or a split")
    taken = taken or {"train": root}
    if "train" not in taken:
        raise Refused("no train")
    classes = {path.name for path in folders_in(taken["train"])}
    images, seen = {}, []
    for split, folder in taken.items():
        here = {path.name for path in folders_in(folder)}
        images[split] = {path: path.parent.name for path in images_below(folder, seen)}
        if not here or not here <= classes or not images[split]:
            raise Refused("classes")
        if any(len(path.relative_to(folder).parts) != 2 for path in images[split]):
            raise Refused("not directly in a class folder")
    if max(Counter(seen).values()) > 1:
        raise Refused("read twice")
    if {*images["train"].values()} != classes or len(classes) < 2:
        raise Refused("an empty class, or one alone")
    if "val" not in images and len(images["train"]) < 2:
        raise Refused("nothing to hold out")
    return images


def files_of(dataset, class_names):
    """What a split reads: each file with its class."""
    indices = range(len(dataset))
    if isinstance(dataset, PlainImages):  # held out of the training images
        dataset, indices = dataset.source, dataset.indices
    samples = [dataset.reader.samples[i] for i in indices]
    labels = [dataset[i][1] for i in indices]
    for (path, label), got in zip(samples, labels, strict=True):
        assert got == (label if path.exists() and path.read_bytes() == PICTURE else IGNORE)
    return {path: class_names[label] for path, label in samples}


@settings(max_examples=100, deadline=None)
@given(tree=trees)
def test_every_tree_is_read_by_the_rules_or_refused_with_the_cause(tmp_path_factory, tree):
    root = tmp_path_factory.mktemp("tree")
    start = [((folder,), f"{i}.png", "image", 0, False) for folder in tree[0] for i in (7, 8)]
    build(root, [*start, *tree[1]])
    config = DataConfig(root=str(root), max_bad_images=99)
    try:
        expected = by_the_rules(root)
    except Refused:
        expected = None
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        code = main(["data", "check", str(root), "--data.workers", "0"])
    images = [path for found in (expected or {}).values() for path in found]
    usable = [path.exists() and path.read_bytes() == PICTURE for path in images]
    assert code == (0 if expected and all(usable) else 1)
    assert said.getvalue().count("cannot be used: ") == usable.count(False)
    if expected is None:
        assert str(root) in errors.getvalue() or "too few to hold out" in errors.getvalue()
        with pytest.raises(DataError) as caught:
            open_splits(config, "L")
        assert str(root) in str(caught.value) or "too few to hold out" in str(caught.value)
        return
    splits = open_splits(config, "L")
    read = {name: files_of(dataset, splits.class_names) for name, dataset in splits.parts().items()}
    if "val" not in expected:
        assert not read["train"].keys() & read["val"].keys()
        read["train"] |= read.pop("val")
    assert read == expected
    said = "\n".join(describe(splits))
    said.encode()  # can be printed
    for path in visible(root) if root not in {path.parent.parent for path in read["train"]} else []:
        if path.name.lower() not in SPLITS and path.name.isascii() and path.name.isprintable():
            assert path.name in said
