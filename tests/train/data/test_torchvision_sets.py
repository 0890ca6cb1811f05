"""CIFAR, Flowers and Pets as torchvision reads them, with generated images; and the recipes that fine-tune on them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102

from cbsa_torch.models import load_checkpoint
from cbsa_torch.train import evaluate_checkpoint, train
from cbsa_torch.train.config import DataConfig
from cbsa_torch.train.data import IGNORE, InputSpec, make_loader, open_splits, read_skipped
from cbsa_torch.train.errors import DataError
from cbsa_torch.train.registry import load_config
from tests.helpers.official import official_model, official_state

RNG = np.random.default_rng(0)


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (36, 48, 3), dtype=np.uint8)).save(path)


def write_cifar(root: Path, classes: int) -> None:
    small = classes == 10
    folder = root / ("cifar-10-batches-py" if small else "cifar-100-python")
    folder.mkdir(parents=True)
    labels, names = ("labels", "label_names") if small else ("fine_labels", "fine_label_names")
    batches = {**{f"data_batch_{i}": 10 for i in range(1, 6)}, "test_batch": 20}
    for name, count in (batches if small else {"train": 50, "test": 20}).items():
        pixels = RNG.integers(0, 255, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, labels: [i % classes for i in range(count)]}))
    meta = {names: [f"class {i}" for i in range(classes)]}
    (folder / ("batches.meta" if small else "meta")).write_bytes(pickle.dumps(meta))


def write_flowers(root: Path) -> None:
    folder = root / "flowers-102"
    for i in range(1, 61):
        photo(folder / "jpg" / f"image_{i:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": np.arange(60) % 102 + 1})
    rows = {"trnid": np.arange(1, 31), "valid": np.arange(31, 41), "tstid": np.arange(41, 61)}
    savemat(folder / "setid.mat", rows)


def write_pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    lines = [f"Breed{i % 37:02d}_{i} {i % 37 + 1} 1 1" for i in range(60)]
    for line in lines:
        photo(folder / "images" / f"{line.split()[0]}.jpg")
    (folder / "annotations").mkdir()
    (folder / "annotations" / "trainval.txt").write_text("\n".join(lines[:40]) + "\n")
    (folder / "annotations" / "test.txt").write_text("\n".join(lines[40:]) + "\n")


WRITERS = {
    "torch/cifar10": lambda root: write_cifar(root, 10),
    "torch/cifar100": lambda root: write_cifar(root, 100),
    "flowers102": write_flowers,
    "pets": write_pets,
}
SIZES = {  # training, validation, test; classes
    "torch/cifar10": (45, 5, 20, 10),
    "torch/cifar100": (45, 5, 20, 100),
    "flowers102": (30, 10, 20, 102),
    "pets": (36, 4, 20, 37),
}


@pytest.fixture(autouse=True)
def any_content(monkeypatch):
    """The files are not those whose MD5 sums torchvision knows."""
    monkeypatch.setattr(
        torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: Path(path).exists()
    )
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: self._images_folder.is_dir())


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_splits_are_disjoint_and_no_test_image_validates(name, channels, tmp_path):
    WRITERS[name](tmp_path)
    data = DataConfig(name=name, root=str(tmp_path), workers=0)
    spec = InputSpec((channels, 24, 24), (0.5,) * channels, (0.5,) * channels, "bicubic", 1.0)
    splits = open_splits(data, spec.mode)
    assert (*(len(part) for part in splits[:3]), len(splits.class_names)) == SIZES[name]
    contents = [{np.asarray(part[i][0]).tobytes() for i in range(len(part))} for part in splits[:3]]
    assert len(set.union(*contents)) == sum(SIZES[name][:3])
    for part, is_train in ((splits.train, True), (splits.val, False), (splits.test, False)):
        images, labels = next(iter(make_loader(part, spec, data, 4, train=is_train)))
        assert images.shape == (4, channels, 24, 24)
        assert labels.min() >= 0


@pytest.mark.parametrize("name", ["flowers102", "pets"])
def test_a_set_that_is_not_there_says_how_to_get_it(name, tmp_path):
    with pytest.raises(DataError, match=rf"cannot open {name} in .*--data\.download"):
        open_splits(DataConfig(name=name, root=str(tmp_path)), "RGB")


def test_an_unreadable_image_is_left_out_and_listed(tmp_path):
    write_pets(tmp_path)
    bad = next(iter(sorted((tmp_path / "oxford-iiit-pet" / "images").iterdir())))
    bad.write_bytes(b"")
    data = DataConfig(name="pets", root=str(tmp_path), workers=0)
    splits = open_splits(data, "RGB", tmp_path / "s.txt")
    labels = [part[i][1] for part in splits[:3] for i in range(len(part))]
    assert labels.count(IGNORE) == 1
    assert read_skipped(tmp_path / "s.txt") == [f"{bad}\tnot an image, or of a kind that Pillow does not know"]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "flowers102", "pets"])
def test_the_recipe_fine_tunes_a_checkpoint_of_other_classes_and_size(name, finished, tmp_path):
    config = load_config(f"finetune_{name}")
    WRITERS[config.data.name](tmp_path / "data")
    config.model.name, config.model.image_size = "cbt_nano_patch4_32", 24
    config.model.init_from = str(finished[1].folder)
    config.data.root, config.data.workers = str(tmp_path / "data"), 0
    config.optim.epochs, config.optim.batch_size, config.engine.cpu = 1, 10, True
    config.output = str(tmp_path / "run")
    train(config)
    result = evaluate_checkpoint(config.output)
    classes = SIZES[config.data.name][3]
    assert (result.images, len(result.confusion)) == (20, classes)


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar"])
def test_a_released_checkpoint_is_fine_tuned_as_it_is(suffix, images, tmp_path):
    """Its head of other classes is replaced, its position embedding resampled, the rest kept."""
    model = official_model()
    torch.save({"state_dict": official_state(model)}, tmp_path / f"official{suffix}")
    config = load_config("finetune_folder")
    config.model.init_from, config.model.image_size = str(tmp_path / f"official{suffix}"), 32
    config.data.root, config.data.workers, config.output = str(images), 0, str(tmp_path / "run")
    config.optim.epochs, config.optim.batch_size, config.optim.lr, config.engine.cpu = 1, 8, 1e-12, True
    train(config)
    tuned, info = load_checkpoint(tmp_path / "run" / "model.safetensors")
    assert (tuned.num_classes, info["model_args"]["img_size"]) == (3, 32)
    assert info["model_args"]["layout"] == "official"
    for name, parameter in model.named_parameters():
        if not name.startswith("head") and name != "pos_embed":
            torch.testing.assert_close(tuned.get_parameter(name), parameter, atol=1e-6, rtol=0)
