"""Folders of images by class."""

from __future__ import annotations

import pytest
from timm.data.readers.reader_image_folder import ReaderImageFolder

from cbsa_torch.images import DataError, class_folders, class_samples, find_splits
from cbsa_torch.images.folders import EXTENSIONS
from tests.helpers.pairs import write_image_or_mask as write


def test_samples_come_in_the_order_of_timm(tmp_path):
    """The rows that are held out, and the augmentation of each image, depend on it."""
    cats = ("cat/10.png", "cat/9.PNG", "cat/b2.jpg", "cat/B1.JPG")
    for name in (*cats, "Dog/1.webp", "ant/01x3.bmp", "ant/1x9.bmp"):
        write(tmp_path / name)
    (tmp_path / "ant" / "notes.txt").write_text("not read")
    write(tmp_path.with_name("elsewhere") / "z.png")
    (tmp_path / "linked").symlink_to(tmp_path.with_name("elsewhere"))
    names = class_folders(tmp_path)
    assert names == ["Dog", "ant", "cat", "linked"]
    reader = ReaderImageFolder(str(tmp_path), input_key=";".join(EXTENSIONS))
    classes = {label: name for name, label in reader.class_to_idx.items()}
    theirs = [(path, classes[label]) for path, label in reader.samples]
    assert [(str(path), names[label]) for path, label in class_samples(tmp_path, names)] == theirs
    assert len(theirs) == 8


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no class folders: images must lie in one folder per class"),
        (["a.png"], "no class folders"),
        (["zebra/a.png"], "a class 'zebra' that the training images have not"),
        (["cat/a.txt.gz"], r"no images found in .*; names of images end in \.png"),
        (["cat/a.png", "b.png"], r"images without a class, beside the class folders, e\.g\. b\.png"),
    ],
)
def test_other_folders_are_refused(tmp_path, files, message):
    for name in files:
        if name.endswith(".png"):
            write(tmp_path / name)
        else:
            (tmp_path / name).parent.mkdir()
            (tmp_path / name).write_text("no image")
    with pytest.raises(DataError, match=message):
        class_samples(tmp_path, ["cat", "dog"])


def test_a_data_set_is_a_folder(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        find_splits(tmp_path / "nowhere")
