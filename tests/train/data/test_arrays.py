"""Data sets in memory: digits, and those that were fetched."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cbsa_torch.train.config import DataConfig
from cbsa_torch.train.data import open_split, open_splits
from cbsa_torch.train.data.arrays import over_grey
from cbsa_torch.train.data.fetch import animals28, fetch
from cbsa_torch.train.errors import DataError


def digit_rows(part) -> list[bytes]:
    return [p.tobytes() + bytes([t]) for p, t in zip(part.pixels, part.labels, strict=True)]


def test_the_digits_split_is_disjoint_complete_stratified_and_always_the_same():
    splits = open_splits(DataConfig(name="digits"), "L")
    assert [len(splits.train), len(splits.val), len(splits.test)] == [1257, 180, 360]
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    everything = Counter(p.tobytes() + bytes([t]) for p, t in zip(pixels, digits.target, strict=True))
    assert sum((Counter(digit_rows(part)) for part in splits[:3]), Counter()) == everything
    shares = np.array([np.bincount(part.labels, minlength=10) / len(part) for part in splits[:3]])
    assert np.abs(shares - shares[0]).max() < 0.01
    np.random.seed(5)
    again = open_splits(DataConfig(name="digits"), "RGB")
    assert all(digit_rows(a) == digit_rows(b) for a, b in zip(splits[:3], again[:3], strict=True))
    assert (splits.train[0][0].mode, again.train[0][0].mode) == ("L", "RGB")


def test_the_trainer_opens_the_splits_as_stored(animals_file, tmp_path, monkeypatch):
    monkeypatch.setenv("CBSA_DATA", str(tmp_path))
    arrays = np.load(fetch("animals28"))
    splits = open_splits(DataConfig(name="animals28"), "L")
    assert splits.class_names == animals28.CLASS_NAMES
    for name, part in zip(("train", "val", "test"), splits[:3], strict=True):
        assert [label for _, label in part] == arrays[f"{name}_y"].tolist()
        np.testing.assert_array_equal(np.asarray(part[3][0]), arrays[f"{name}_x"][3])
        assert part[0][0].mode == "L"
    assert open_splits(DataConfig(name="animals28"), "RGB").val[0][0].mode == "RGB"
    assert len(open_split(DataConfig(name="animals28"), "L", "test", animals28.CLASS_NAMES).dataset) == 1000


def test_without_the_file_the_trainer_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CBSA_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"not at .*emoji64\.npz; get it with: cbsa data fetch emoji64$"):
        open_splits(DataConfig(name="emoji64"), "RGB")
    with pytest.raises(DataError, match=r"cbsa data fetch animals28 --output .*there$"):
        open_splits(DataConfig(name="animals28", root=str(tmp_path / "there")), "L")


def test_both_drawings_of_an_emoji_are_in_one_split(emoji_files, tmp_path):
    arrays = np.load(fetch("emoji64", tmp_path))
    splits = open_splits(DataConfig(name="emoji64", root=str(tmp_path)), "RGB")
    assert [len(part) for part in splits[:3]] == [84, 18, 18]
    assert splits.class_names == arrays["category_names"].tolist()
    first = int(np.nonzero(arrays["split"] == 1)[0][0])
    for vendor, index in (("google", 0), ("twitter", 9)):
        image, label = splits.val[index]
        np.testing.assert_array_equal(np.asarray(image), over_grey(arrays[vendor][first : first + 1])[0])
        assert label == arrays["label"][first]


def test_drawings_are_laid_over_mid_grey():
    generator = np.random.default_rng(0)
    drawings = generator.integers(0, 256, (2, 8, 8, 4), dtype=np.uint8)
    drawings[0, 0, 0], drawings[0, 0, 1] = (255, 255, 255, 255), (9, 9, 9, 0)
    alpha = drawings[..., 3:] / 255
    expected = drawings[..., :3] * alpha + 128 * (1 - alpha)
    got = over_grey(drawings)
    assert got.dtype == np.uint8
    assert np.abs(got - expected).max() <= 0.5
    assert got[0, 0, 0].tolist() == [255] * 3
    assert got[0, 0, 1].tolist() == [128] * 3
