"""``cbsa data check``, and what ``cbsa train`` says of messy folders: nothing is misread in silence."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from cbsa_torch.cli import main
from cbsa_torch.train.config import dump_yaml
from cbsa_torch.train.tasks.segmentation import SegmentationDataConfig, open_segmentation
from tests.helpers.masked_folder import ENCODER, tiny_segmentation, write_masked_folder
from tests.helpers.pairs import write_image_or_mask as write
from tests.helpers.pairs import write_pairs


def tree(root, *folders, count=3):
    """Some images in each folder."""
    for folder in folders:
        for i in range(count):
            write(root / folder / f"{i}.png")
    return root


def in_splits(*splits):
    """Folders of two classes."""
    return [f"{split}/{name}" for split in splits for name in ("ant", "bee")]


def check(capsys, root, *options):
    """The exit code of ``cbsa data check``, what it printed, and its error."""
    code = main(["data", "check", str(root), "--data.workers", "0", *options])
    return (code, *capsys.readouterr())


def check_masks(capsys, root, *options, name="folder"):
    return check(capsys, root, "--config", "segmenter_ade20k", "--data.name", name, *options)


# ---- what is not recognised


@pytest.mark.parametrize(
    "names",
    [("train", "Val"), ("TRAINING", "Validation", "Testing"), ("Train", "dev"), ("training", "VALID", "test")],
)
def test_usual_names_of_splits_are_taken_in_any_case_and_said(tmp_path, capsys, names):
    root = tree(tmp_path / "photos", *in_splits(*names))
    code, out, _ = check(capsys, root)
    assert code == 0
    splits = ("train", "val", "test")[: len(names)]
    assert "".join(f"{split}: 6 images (ant 3, bee 3)\n" for split in splits) in out
    for split, name in zip(splits, names, strict=True):
        assert f"{split} is {root / name}\n" in out
    assert ("\ntest: " in out) == (len(names) == 3)
    assert "held out" not in out


def test_without_val_it_is_said_that_images_are_held_out(tmp_path, capsys):
    code, out, _ = check(capsys, tree(tmp_path / "photos", *in_splits("train")))
    assert code == 0
    assert "train: 5 images" in out
    assert "val: 1 images" in out
    assert "val is held out of train: there is no val split (data.val_fraction 0.1)" in out


def test_folders_and_files_that_play_no_part_are_named(tmp_path, capsys):
    others = [f"other{i}" for i in range(7)]
    root = tree(tmp_path / "photos", *in_splits("train", "val"), "evaluation/ant", *others, count=3)
    write(root / "stray.png")
    for name in ("val.zip", "labels.csv", "README"):
        (root / name).write_text("beside the splits")
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    (root / "train" / "ant" / "phone.HEIC").write_text("no image")
    os.mkfifo(root / "val" / "bee" / "pipe.png")  # would be waited for
    code, out, _ = check(capsys, root)
    assert code == 0
    names = "train, training, val, valid, validation, dev, test, testing"
    beside = ", ".join(sorted([*others, "README", "evaluation", "labels.csv", "stray.png", "val.zip"]))
    assert f"left out, not a split ({names}): {beside}\n" in out
    assert "left out, no image by its ending (.txt): train/ant/notes.txt\n" in out
    assert "left out, no image by its ending (.HEIC): train/ant/phone.HEIC\n" in out
    assert "left out, neither file nor folder: val/bee/pipe.png\n" in out


def test_a_class_that_a_split_lacks_is_named(tmp_path, capsys):
    code, out, _ = check(capsys, tree(tmp_path / "photos", *in_splits("train"), "val/ant"))
    assert code == 0
    assert "warning: no images of bee in val\n" in out


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ("car", "train"),
            "train is called like a split but has images and no class folders: if it is a class",
        ),
        (("train", "val"), "set data.splits to none"),
        (("val", "zebra"), "set data.splits to none"),
        ((*in_splits("train", "val"), "valid/ant"), "has val and valid, both names of the val split"),
        ((*in_splits("train"), "Train/ant"), "both names of the train split"),
        (in_splits("val", "tset"), "has no train folder (its folders: tset, val)"),
        (in_splits("Trainset", "Testset"), "class 'Testset' or 'ant'? (folders of splits are called train,"),
    ],
)
def test_what_may_be_read_in_two_ways_is_refused_with_the_setting_that_decides(
    tmp_path, capsys, folders, message
):
    code, _, err = check(capsys, tree(tmp_path / "photos", *folders))
    assert code == 1
    assert message in err


@pytest.mark.parametrize("name", ["val", "Test", "TRAINING", "masks/val"])
@pytest.mark.parametrize("kind", ["a file", "a link that leads nowhere"])
def test_what_is_called_like_a_split_and_is_no_folder_is_refused(tmp_path, capsys, name, kind):
    root, look = tree(tmp_path / "photos", "train/ant", "train/bee", "images/train", "masks/train"), check
    if "/" in name:
        look = check_masks
        shutil.rmtree(root / "train")
        (root / "classes.txt").write_text("a\nb")
    if kind == "a file":
        (root / name).write_text("../elsewhere")  # a link, as Git writes it where there are none
    else:
        (root / name).symlink_to("../elsewhere")
    code, _, err = look(capsys, root)
    assert code == 1
    what = "called like a split but is not a folder" if kind == "a file" else f"{kind}, to ../elsewhere"
    assert f"{root / name} is {what}: " in err


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train/ant", "val/ant"), "photos/train has one class folder, ant, and nothing to tell it from"),
        (("data/ant", "data/bee"), "is the class 'data' or 'ant'?"),
        (
            ("images", "masks"),
            "photos has the folders images and masks: to train a segmenter on them, add --con",
        ),
        (
            ("train/masks", "train/images"),
            "photos/train has the folders images and masks: to train a segmenter",
        ),
        (
            (*in_splits("train"), "train/caf\u00e9", "val/cafe\u0301"),
            "but 'caf\\xe9' of the same letters in another form of Unicode (here 'cafe\\u0301'): rename one",
        ),
    ],
)
def test_classes_that_cannot_be_meant_are_refused(tmp_path, capsys, folders, message):
    code, _, err = check(capsys, tree(tmp_path / "photos", *folders))
    assert code == 1
    assert message in err


def test_a_class_of_files_that_are_no_images_by_their_names_is_refused_and_they_are_named(tmp_path, capsys):
    root = tree(tmp_path / "photos", *in_splits("train", "val"))
    for photo in (root / "train" / "bee").iterdir():
        photo.rename(photo.with_suffix(".heic"))
    code, _, err = check(capsys, root)
    assert code == 1
    assert "train/bee holds no images; left out, no image by its ending (.heic): train/bee/0.heic, " in err


def test_evaluations_and_reports_say_what_they_read(tmp_path, capsys, trained_on_folder):
    def say(command, root, *options):
        code = main([command, "--checkpoint", str(trained_on_folder), "--root", str(root), *options])
        out, err = capsys.readouterr()
        assert (code, err) == (0, "")
        return out

    root = tree(tmp_path / "photos", "dark", "light", count=10)
    out = say("eval", root, "--split", "val")
    assert "val: 2 images (" in out
    assert "val is held out of train: there is no val split (data.val_fraction 0.1)\n" in out
    (root / "train").mkdir()
    for name in ("dark", "light"):
        (root / name).rename(root / "train" / name)
    assert "train: 18 images (" in say("eval", root, "--split", "train")  # without those that validate
    (root / "train").rename(root / "Test")
    (root / "Test" / "dark" / "0.png").rename(root / "Test" / "dark" / "0.heic")
    shutil.rmtree(root / "Test" / "light")
    small = ["--images", "2", "--shown", "1", "--robustness-images", "0"]
    for out in (say("eval", root), say("report", root, *small)):
        assert "test: 9 images (dark 9, light 0)\nwarning: no images of light in test\n" in out
        assert f"test is {root}/Test\nleft out, no image by its ending (.heic): Test/dark/0.heic\n" in out


def test_classes_may_be_called_like_splits(tmp_path, capsys):
    code, out, _ = check(capsys, tree(tmp_path, "car", "train", "val", count=10), "--data.splits", "none")
    assert code == 0
    assert "classes: 3 (car, train, val)" in out
    assert "train: 27 images" in out


def test_masks_follow_the_same_rules_of_splits(tmp_path, capsys):
    for folder in ("Training", "VAL", "bus"):
        for i in range(3):
            name = f"{folder.lower()}{i}.png"
            write(tmp_path / "images" / folder / name)
            write(tmp_path / "masks" / folder.replace("Training", "train") / name, [0, 1])
    (tmp_path / "classes.txt").write_text("a\nb")
    code, _, err = check_masks(capsys, tmp_path)
    assert code == 1
    assert "images has Training, VAL, called like splits, beside other folders with images (bus)" in err
    code, out, _ = check_masks(capsys, tmp_path, "--data.splits", "folders")
    assert code == 0
    assert "train: 3 images" in out
    assert "val: 3 images" in out
    assert "): images/bus, masks/bus\n" in out
    (tmp_path / "masks" / "train").rename(tmp_path / "masks" / "Training")
    code, out, _ = check_masks(capsys, tmp_path, "--data.splits", "none")
    assert code == 0
    assert "train: 8 images" in out


def test_masks_of_a_split_without_images_are_refused_and_what_lies_beside_is_named(tmp_path, capsys):
    root = write_pairs(tmp_path / "around")
    write(root / "train" / "depth" / "0.png")
    (root / "val" / "notes.md").write_text("of val")
    (root / "masks.zip").write_text("of all")
    code, out, _ = check_masks(capsys, root)
    assert code == 0
    assert "testing): masks.zip\n" in out
    assert "left out, neither images nor masks: train/depth, val/notes.md\n" in out
    (root / "train" / "masks").rename(root / "train" / "labels")
    code, _, err = check_masks(capsys, root)
    assert code == 1
    assert "train/masks is not a folder (folders in " in err
    assert "train: depth, images, labels)" in err
    root = tmp_path / "within"
    for folder in ("images/train", "masks/train", "masks/Val"):
        write(root / folder / "0.png", [0, 1])
    (root / "classes.txt").write_text("a\nb")
    code, _, err = check_masks(capsys, root)
    assert code == 1
    assert f"{root}/masks/Val is the val split of the masks, and {root}/images has none" in err


# ---- hidden files


@pytest.mark.parametrize("name", ["folder", "torch/image_folder", ""])
def test_hidden_files_and_those_of_systems_are_left_out_whoever_reads(tmp_path, capsys, name):
    root = tree(tmp_path / "photos", *in_splits("train", "val"))
    for i in range(16):
        (root / "train" / "ant" / f"._{i}.png").write_text("of macOS")
    tree(
        root, "train/bee/.ipynb_checkpoints", "train/__MACOSX", "train/bee/@eaDir", "val/.cache", "__MACOSX/ant"
    )
    (root / "train" / "bee" / "Thumbs.db").write_text("of Windows")
    code, out, _ = check(capsys, root, "--data.name", name)
    assert code == 0
    assert "classes: 2 (ant, bee)\ntrain: 6 images (ant 3, bee 3)\nval: 6 images (ant 3, bee 3)\n" in out
    assert "left out, hidden: __MACOSX, train/__MACOSX, train/ant/._0.png and 19 more\n" in out


def test_hidden_files_among_images_and_masks_are_left_out(tmp_path, capsys):
    root = write_pairs(tmp_path / "data")
    for hidden in ("images/.ipynb_checkpoints/train_0.jpg", "images/._train_0.jpg", "masks/@eaDir/train_0.png"):
        write(root / "train" / hidden)
    code, out, _ = check_masks(capsys, root)
    assert code == 0
    assert "train: 8 images\n" in out
    left_out = "train/images/._train_0.jpg, train/images/.ipynb_checkpoints, train/masks/@eaDir"
    assert f"left out, hidden: {left_out}\n" in out


# ---- nested folders and links


@pytest.mark.parametrize("nested", ["train/ant/bee", "train/ant/more", "val/bee/a/b"])
def test_a_folder_in_a_class_folder_is_refused(tmp_path, capsys, nested):
    root = tree(tmp_path / "photos", *in_splits("train", "val"), nested)
    code, _, err = check(capsys, root)
    assert code == 1
    split, _, inner = nested.partition("/")
    assert f"{root / split} has images that do not lie directly in a class folder, e.g. {inner}/0.png" in err


@pytest.mark.parametrize(
    ("link", "target", "message"),
    [
        ("train/ant/loop", "..", "train/ant/loop is the folder {root}/train again, by a link"),
        (
            "train/ant/loop",
            "../..",
            "train/ant/loop is a link to {root}, in which {root} lies: remove the link",
        ),
        ("train/ant/loop", "/", "train/ant/loop is a link to /, in which {root} lies: remove the link"),
        ("train/cat", "ant", "again, by a link: remove the link"),
        ("val", "train", "again, by a link"),
        ("train/ant/z.png", "0.png", "train/ant/z.png is a link to {root}/train/ant/0.png, which is read, too"),
        ("test/ant/z.png", "../../train/bee/0.png", "which is read, too"),
        ("train/cow", "../gone/cow", "train/cow is a link that leads nowhere, to ../gone/cow: mend or remove"),
        (
            "test/ant/more",
            "more",
            "test/ant/more is a link that leads nowhere, to more: mend or remove the link",
        ),
    ],
)
def test_links_to_what_is_read_already_or_to_nothing_are_refused(tmp_path, capsys, link, target, message):
    root = tree(tmp_path / "photos", *in_splits("train", "test"))
    (root / link).symlink_to(target)
    code, _, err = check(capsys, root)
    assert code == 1
    assert message.format(root=root) in err


def test_links_to_folders_and_images_elsewhere_are_followed(tmp_path, capsys):
    elsewhere, root = tree(tmp_path / "disk", "ant"), tree(tmp_path / "photos", "train/bee")
    (root / "train" / "ant").symlink_to(elsewhere / "ant")
    write(elsewhere / "one.png")
    (root / "train" / "bee" / "z.png").symlink_to(elsewhere / "one.png")
    (root / "train" / "bee" / "lost.png").symlink_to(elsewhere / "none.png")
    code, out, err = check(capsys, root, "--data.val-fraction", "0.1")
    assert "train: 7 images" in out
    assert code == 1
    assert "lost.png: No such file or directory" in out
    assert "1 file(s) cannot be used" in err
    (root / "train" / "ant" / "same.png").symlink_to(elsewhere / "one.png")
    code, _, err = check(capsys, root)
    assert code == 1
    assert "are links to the same image" in err


def test_copies_in_other_splits_or_classes_are_warned_of(tmp_path, capsys):
    root = tree(tmp_path / "photos", *(in_splits("train")), count=1)
    write(root / "train" / "bee" / "longer.png")
    pictures = {folder: (root / "train" / folder / "0.png").read_bytes() for folder in ("ant", "bee")}
    assert pictures["ant"] == pictures["bee"]
    code, out, _ = check(capsys, root)
    assert code == 0
    ant, bee = (root / "train" / name / "0.png" for name in ("ant", "bee"))
    assert "warning: 1 image(s) are in several splits or classes, byte for byte: " in out
    assert f"{ant} and {bee}\n" in out or f"{bee} and {ant}\n" in out
    Image.new("L", (9, 9)).save(ant)
    Image.new("L", (9, 8)).save(bee)
    assert "warning: 1 image" not in check(capsys, root)[1]
    masked = write_masked_folder(tmp_path / "masked")
    assert "byte for byte" not in check_masks(capsys, masked)[1]
    first, second = (masked / split / "images" / "0.png" for split in ("train", "test"))
    second.unlink()
    os.link(first, second)
    shutil.copy(masked / "train" / "masks" / "0.png", masked / "test" / "masks" / "0.png")
    assert f"byte for byte: {first} and {second}\n" in check_masks(capsys, masked)[1]


def test_a_loop_among_images_and_masks_is_refused_and_masks_may_be_shared(tmp_path, capsys):
    root = write_pairs(tmp_path / "data")
    first, second = (root / "train" / "masks" / f"train_{i}.png" for i in range(2))
    second.unlink()
    second.symlink_to(first)
    assert check_masks(capsys, root)[0] == 0
    (root / "train" / "images" / "loop").symlink_to("..")
    code, _, err = check_masks(capsys, root)
    assert code == 1
    assert "again, by a link" in err


# ---- masks


def binary_masks(root, value=255):
    """Pairs with masks of 0 and ``value``, and two classes."""
    shutil.rmtree(write_pairs(root) / "test")
    for mask in root.glob("*/masks/*.png"):
        write(mask, [0, *[value] * 7])
    (root / "classes.txt").write_text("ground\nobject")
    return root


def train_segmenter(capsys, root, *options, crop=8):
    """The exit code of ``cbsa train`` for one epoch, what it printed, and its error."""
    config = tiny_segmentation(root, root.with_name("run"))
    config.optim.epochs, config.data.crop_size = 1, crop
    config.model.args["encoder_args"] = {**ENCODER, "img_size": crop}
    root.with_suffix(".yaml").write_text(dump_yaml(config))
    code = main(["train", "--config", str(root.with_suffix(".yaml")), *options])
    return (code, *capsys.readouterr())


def test_binary_masks_are_refused_before_training_with_the_setting_that_reads_them(tmp_path, capsys):
    root = binary_masks(tmp_path / "data")
    code, _, err = train_segmenter(capsys, root, "--data.max-bad-images", "3")
    assert code == 1
    assert "unknown label 255 (7 pixel(s)); known are 0 to 1; this looks like a binary mask" in err
    assert "set data.mask_values to 0 255" in err
    assert not (tmp_path / "run").exists()
    code, out, _ = train_segmenter(capsys, root, "--data.mask-values", "0", "255")
    assert code == 0
    assert "8 of 8 training masks: ground 85.4 %, object 14.6 %; ignored 0 %\n" in out
    assert "warning" not in out


def test_masks_whose_object_is_ignored_are_warned_of(tmp_path, capsys):
    root = binary_masks(tmp_path / "data")
    code, out, _ = train_segmenter(capsys, root, "--data.ignore-label", "255")
    assert code == 0
    assert out.index("training masks") < out.index("epoch ")
    assert "8 of 8 training masks: ground 100 %, object 0 %; ignored 14.6 %\n" in out
    assert "warning: no pixels of object in 8 of 8 training masks\npixels of ignore_label 255 are not" in out
    assert "set data.mask_values (0 255 for binary masks)\n" in out


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        (128, [], "set data.mask_values to 0 128\n"),
        (
            255,
            ["--data.ignore-label", "255"],
            "train, pixels read: ground 100 %, object 0 %; ignored 14.6 %\nwarning: no pixels of object in train\n"
            "pixels of ignore_label 255 are not trained on: ",
        ),
        (
            1,
            ["--data.mask-values", "0", "7", "--data.ignore-label", "1"],
            "warning: no pixels of object in train\n",
        ),
        (1, ["--data.mask-values", "0", "1", "2"], "data.mask_values must be 2 different values, one for each"),
        (1, ["--data.mask-values", "1", "1"], "data.mask_values must be 2 different values"),
        (1, ["--data.mask-values", "0", "70000"], "data.mask_values must be in [0, 65535]"),
        (1, ["--data.mask-values", "0", "1", "--data.ignore-label", "1"], "ignore_label must not be the label"),
        (
            1,
            ["--data.mask-values", "0", "1", "--data.name", "voc"],
            "data.mask_values is of data.name 'folder'",
        ),
    ],
)
def test_values_of_masks_that_mean_nothing_are_named(tmp_path, capsys, value, options, message):
    _, out, err = check_masks(capsys, binary_masks(tmp_path / "data", value), *options)
    assert message in out + err


def test_palettes_that_were_numbered_anew_are_warned_of(tmp_path, capsys):
    root = write_pairs(tmp_path / "data")
    colours = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]
    for i, path in enumerate(sorted(root.glob("train/masks/*.png"))):
        with Image.open(path) as grey:
            mask = Image.frombytes("P", grey.size, grey.tobytes())
        mask.putpalette([level for colour in [*colours, (9, 9, i)] for level in colour])  # value 3 is nowhere
        mask.save(path)
    code, out, _ = train_segmenter(capsys, root)
    assert code == 0
    assert "8 of 8 training masks: sky 95.8 %, water 2.08 %, sand 2.08 %" in out
    assert "warning" not in out
    mask.putpalette([level for colour in reversed(colours) for level in colour])
    mask.save(path)
    said = f"warning: value 0 has the colour (0, 0, 0) in {root}/train/masks/train_"
    for out in (check_masks(capsys, root)[1], train_segmenter(capsys, root, "--overwrite")[1]):
        assert said in out
        assert "(0, 128, 0) in " in out
        assert "labels are values, not colours; did a program number the palettes anew?\n" in out


@pytest.mark.parametrize(("split", "said"), [("train", "8 of 8 training"), ("val", "3 of 3 validation")])
def test_masks_in_which_everything_is_ignored_are_refused_before_training(tmp_path, capsys, split, said):
    root = binary_masks(tmp_path / "data")
    for mask in root.glob(f"{split}/masks/*.png"):
        write(mask, [255])
    code, _, err = train_segmenter(capsys, root, "--data.ignore-label", "255")
    assert code == 1
    assert f"no pixel of any class in {said} masks" in err
    assert not (tmp_path / "run").exists()
    code, _, err = check_masks(capsys, root, "--data.ignore-label", "255")
    assert code == 1
    assert f"no pixels of any class in {split}\n" in err


@pytest.mark.parametrize("rename", ["{}_mask", "mask_{}", "{}-labels"])
def test_masks_with_other_names_than_their_images_are_refused_before_training(tmp_path, capsys, rename):
    root = write_pairs(tmp_path / "data")
    for mask in root.glob("train/masks/*.png"):
        mask.rename(mask.with_stem(rename.format(mask.stem)))
    code, _, err = train_segmenter(capsys, root, "--data.max-bad-images", "99")
    assert code == 1
    assert f"train: 8 image(s) without a mask, e.g. {root}/train/masks/train_0.png is not there; " in err
    assert f"{rename.format('train_0')}.png has no image); a mask must have the name of its image" in err
    assert not (tmp_path / "run").exists()


def test_masks_of_a_kind_that_is_not_read_are_named(tmp_path, capsys):
    root = write_pairs(tmp_path / "data")
    for mask in root.glob("train/masks/*.png"):
        mask.rename(mask.with_suffix(".npy"))
    code, _, err = check_masks(capsys, root)
    assert code == 1
    assert "train: 8 image(s) without a mask" in err
    assert (
        "; left out, no image by its ending (.npy): train/masks/train_0.npy, train/masks/train_1.npy, " in err
    )


def test_a_few_files_without_a_partner_are_named_and_left_out(tmp_path, capsys):
    root = write_pairs(tmp_path / "data")
    (root / "train" / "masks" / "train_3.png").unlink()
    code, out, _ = train_segmenter(capsys, root)
    assert code == 0
    assert f"train: 1 image(s) without a mask, e.g. {root}/train/masks/train_3.png is not there\n" in out
    code, _, err = train_segmenter(capsys, root, "--data.max-bad-images", "0", "--overwrite")
    assert code == 1
    assert "(data.max_bad_images is 0)" in err


# ---- orientation


def turn(path, orientation=6):
    """Store an image as a camera does that was held upright: turned, with the orientation that says so."""
    with Image.open(path) as image:
        upright = np.asarray(image)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.rot90(upright, {6: 1, 3: 2, 8: 3}[orientation])
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)


@pytest.mark.parametrize("orientation", [6, 3, 8])
def test_photos_with_an_orientation_fit_masks_that_are_drawn_upright(tmp_path, capsys, orientation):
    root = write_masked_folder(tmp_path / "data")
    data = open_segmentation(SegmentationDataConfig(root=str(root))).val
    before = [np.asarray(image) for image, _ in data]
    for photo in root.glob("*/images/*.png"):
        turn(photo, orientation)
    assert all(np.array_equal(image, kept) for (image, _), kept in zip(data, before, strict=True))
    assert check_masks(capsys, root)[0] == 0


def test_a_mask_that_lies_beside_a_turned_photo_is_refused_and_the_turn_is_said(tmp_path, capsys):
    root = write_pairs(tmp_path / "data")
    turn(root / "train" / "images" / "train_2.jpg")
    mask = root / "train" / "masks" / "train_2.png"
    write(mask, [0, 1, 2], (6, 8))  # as the photo is stored
    code, out, _ = check_masks(capsys, root)
    assert code == 1
    assert f"{mask}: the mask is 6x8 pixels (width x height), its image " in out
    assert "they differ by a quarter turn: images and masks are read upright, as their EXIF" in out


def test_predictions_are_those_of_what_viewers_show(tmp_path, capsys, trained_on_folder):
    photo, output = tmp_path / "photo.png", tmp_path / "p.json"
    Image.fromarray(np.tile(np.linspace(0, 255, 8, dtype=np.uint8), (8, 1))).save(photo)
    command = ["predict", "--checkpoint", str(trained_on_folder), str(photo), "--output", str(output)]
    assert main(command) == 0
    before = output.read_text()
    turn(photo)
    assert main(command) == 0
    assert output.read_text() == before


# ---- lists


def voc(root, names, **lists):
    """VOC with images of these names, and lists as they are given."""
    for name in names:
        write(root / "JPEGImages" / f"{name}.jpg")
        write(root / "SegmentationClass" / f"{name}.png", [0, 1, 255])
    folder = root / "ImageSets" / "Segmentation"
    folder.mkdir(parents=True)
    for name, content in lists.items():
        (folder / f"{name}.txt").write_bytes(content)
    return root


NAMES = [f"my photo {i}" for i in range(6)]


@pytest.mark.parametrize(
    ("end", "start"), [("\n", b""), ("\r\n", b""), ("  \n\n", b""), ("\n", b"\xef\xbb\xbf"), ("\t\r\n", b"")]
)
def test_lists_are_split_at_line_breaks_alone(tmp_path, capsys, end, start):
    train, val = (start + "".join(name + end for name in part).encode() for part in (NAMES[:4], NAMES[4:]))
    code, out, err = check_masks(
        capsys, voc(tmp_path / "voc", NAMES, train=train, Val=val, trainval=b"x"), name="voc"
    )
    assert code == 0, err
    assert "train: 4 images\nval: 2 images\n" in out
    assert ", and .txt): ImageSets/Segmentation/trainval.txt\n" in out


def test_odd_lists_and_folders_of_voc_are_taken_or_named(tmp_path, capsys):
    root = voc(tmp_path / "voc", NAMES, train=b"my photo 0\rmy photo 1", test=b"my photo 2")
    lists = root / "ImageSets" / "Segmentation"
    (lists / "test.txt").rename(lists / "Valid.TXT")
    for name in ("test", "val.csv", "._val.txt"):
        (lists / name).write_text("my photo 3")
    (root / "Annotations").mkdir()
    code, out, _ = check_masks(capsys, root, name="voc")
    assert code == 0
    assert "train: 2 images\nval: 1 images\n" in out
    assert ", and .txt): ImageSets/Segmentation/test, ImageSets/Segmentation/val.csv\n" in out
    assert "left out, hidden: ImageSets/Segmentation/._val.txt\n" in out
    assert "left out, neither images, masks nor lists: Annotations\n" in out
    (root / "JPEGImages" / "my photo 2.jpg").unlink()
    (root / "JPEGImages" / "my photo 2.jpg").symlink_to("my photo 0.jpg")
    code, _, err = check_masks(capsys, root, name="voc")
    assert code == 1
    assert "my photo 0.jpg and " in err
    assert "my photo 2.jpg are one image, by a link" in err


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (b"my photo 0\nmy photo 1\nmy photo 0", b"my photo 2", "train.txt names 'my photo 0' twice"),
        (b"my photo 0\nmy photo 1", b"my photo 1", "'my photo 1' is in the lists of both train and val"),
        (b"my photo 0.jpg", b"my photo 1", "my photo 0.jpg.jpg is not there"),
        (b"my\nphoto", b"my photo 1", "train: 2 image(s) without a mask"),
        (b"caf\xe9", b"my photo 1", "train.txt is not text in UTF-8"),
    ],
)
def test_lists_that_name_what_is_not_there_or_twice_are_refused(tmp_path, capsys, train, val, message):
    code, _, err = check_masks(capsys, voc(tmp_path / "voc", NAMES, train=train, val=val), name="voc")
    assert code == 1
    assert message in err


def test_a_test_list_without_masks_is_left_out_and_said(tmp_path, capsys):
    root = voc(tmp_path / "voc", NAMES, train=b"my photo 0", val=b"my photo 1", test=b"later 1\nlater 2")
    for i in (1, 2):
        write(root / "JPEGImages" / f"later {i}.jpg")
    code, out, _ = check_masks(capsys, root, name="voc")
    assert code == 0
    assert "left out, the test split: its 2 image(s) have no masks\n" in out


# ---- what train prints, and check


def test_train_prints_what_check_prints_before_the_first_epoch(tmp_path, capsys, tiny):
    root = tree(tmp_path / "photos", *in_splits("train", "Val"), "extra")
    _, checked, _ = check(capsys, root)
    said = checked.partition("reading train")[0]
    options = ["--config", "folder", "--data.root", str(root), "--output", str(tmp_path / "run"), *tiny]
    small = ["--model", "cbt_pico_patch1_8", "--optim.batch-size", "2"]
    assert main(["train", *options, *small]) == 0
    out = capsys.readouterr().out
    assert said in out
    assert out.index(said) < out.index("epoch ")


def test_check_reads_every_file_and_neither_trains_nor_writes(tmp_path, capsys):
    root = tree(tmp_path / "photos", *in_splits("train", "val", "test"))
    for i, split in enumerate(("train", "val", "test")):
        (root / split / "bee" / f"{i}.png").write_text("no image")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = check(capsys, root, "--data.max-bad-images", "0")
    assert code == 1
    for i, split in enumerate(("train", "val", "test")):
        assert f"cannot be used: {root}/{split}/bee/{i}.png: not an image" in out
        assert f"{split}, images read: ant 3, bee 2\n" in out
    assert "3 file(s) cannot be used; training leaves out up to data.max_bad_images (0) of them" in err
    assert sorted(tmp_path.rglob("*")) == before


def test_check_knows_data_sets_by_name_and_many_classes(tmp_path, capsys):
    assert main(["data", "check", "--config", "digits", "--data.workers", "0"]) == 0
    assert "train: 1,257 images (0 124, 1 128, " in capsys.readouterr().out
    root = tree(tmp_path, *(f"{split}/c{i:02}" for split in ("train", "val") for i in range(24)), count=2)
    write(root / "train" / "c07" / "more.png")
    code, out, _ = check(capsys, root)
    assert code == 0
    assert "classes: 24 (c00, c01, " in out
    assert "train: 49 images (from c00 2 to c07 3)\n" in out
