from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cbsa_torch.train import train
from cbsa_torch.train.config import DataConfig
from cbsa_torch.train.data import InputSpec, make_loader, open_splits
from cbsa_torch.train.errors import ConfigError, DataError
from tests.helpers.colour_folder import write_split

SPEC = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)


def folder(root: Path, **kwargs) -> DataConfig:
    return DataConfig(name="folder", root=str(root), **{"workers": 0, "crop_scale": (0.5, 1.0), **kwargs})


def test_a_folder_opens_with_its_three_splits(images):
    splits = open_splits(folder(images), "RGB")
    assert [len(splits.train), len(splits.val), len(splits.test)] == [24, 12, 12]
    assert splits.class_names == ["blue", "green", "red"]
    image, label = splits.train[0]
    assert splits.class_names[label] == "blue"
    assert np.asarray(image).reshape(-1, 3).mean(0).argmax() == 2


def test_without_val_a_fixed_part_of_train_is_held_out(images):
    shutil.rmtree(images / "val")
    parts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        splits = open_splits(folder(images, val_fraction=0.25), "RGB")
        parts.append((sorted(splits.train.indices), sorted(splits.val.indices)))
    assert parts[0] == parts[1]
    assert len(parts[0][1]) == 6
    assert sorted(parts[0][0] + parts[0][1]) == list(range(24))


def test_held_out_images_are_not_augmented(images):
    shutil.rmtree(images / "val")
    data = folder(images, val_fraction=0.25, crop_scale=(0.1, 0.2))
    splits = open_splits(data, "RGB")
    plain = [np.asarray(splits.val[i][0]) for i in range(len(splits.val))]
    train_loader = make_loader(splits.train, SPEC, data, 6, train=True)
    val_loader = make_loader(splits.val, SPEC, data, 6, train=False)
    next(iter(train_loader))
    shown = next(iter(val_loader))[0].permute(0, 2, 3, 1).mul(0.5).add(0.5).mul(255)
    torch.testing.assert_close(shown, torch.tensor(np.stack(plain)).float(), atol=1.0, rtol=0)


def test_a_folder_of_classes_alone_is_a_training_set(images):
    splits = open_splits(folder(images / "train"), "RGB")
    assert len(splits.train) + len(splits.val) == 24
    assert splits.test is None


def test_classes_must_have_training_images(images):
    (images / "train" / "zebra").mkdir()
    with pytest.raises(DataError, match=r"train/zebra holds no images"):
        open_splits(folder(images), "RGB")


def test_val_without_train_is_refused(images):
    shutil.rmtree(images / "train")
    with pytest.raises(DataError, match="no train folder"):
        open_splits(folder(images), "RGB")


def test_nothing_is_left_to_train_on_or_to_tell_apart(tmp_path):
    write_split(tmp_path / "train", 1, ("red", "blue"))
    with pytest.raises(DataError, match="too few to hold out"):
        open_splits(folder(tmp_path, val_fraction=0.9), "RGB")
    shutil.rmtree(tmp_path / "train" / "blue")
    with pytest.raises(DataError, match="train has one class folder, red, and nothing to tell it from"):
        open_splits(folder(tmp_path), "RGB")


# ---- timm's factory


def test_torchvision_image_folders_open_through_timm(config):
    config.data.name = "torch/image_folder"
    assert train(config).best_epoch >= 1
    splits = open_splits(config.data, "RGB")
    assert [len(splits.train), len(splits.val)] == [24, 12]
    assert splits.class_names == ["blue", "green", "red"]


@pytest.mark.parametrize("name", ["torch/image_folder", ""])
def test_a_timm_data_set_without_validation_does_not_validate_on_its_training_images(images, name):
    splits = open_splits(DataConfig(name=name, root=str(images / "train")), "RGB")
    assert [len(splits.train), len(splits.val)] == [22, 2]
    assert not {*splits.train.indices} & {*splits.val.indices}


def test_a_tar_file_gives_data_or_a_clear_error(images, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images / "train", arcname=".")
    with pytest.raises(DataError, match="cannot tell the classes"):
        open_splits(DataConfig(name="", root=str(tmp_path / "images.tar")), "RGB")


@pytest.mark.parametrize("name", ["torch/nonsense", "torch/cifar10", "torch/image_folder"])
def test_a_timm_data_set_that_cannot_open_is_a_data_error(tmp_path, name):
    with pytest.raises(DataError, match=f"timm cannot open split 'train' of '{name}'"):
        open_splits(DataConfig(name=name, root=str(tmp_path / "nowhere")), "RGB")


@pytest.mark.parametrize(("name", "meant"), [("foldr", "folder"), ("animals", "animals28")])
def test_a_misspelt_data_set_name_does_not_open_as_a_folder(images, name, meant):
    with pytest.raises(ConfigError, match=f"did you mean '{meant}'"):
        open_splits(DataConfig(name=name, root=str(images)), "RGB")
