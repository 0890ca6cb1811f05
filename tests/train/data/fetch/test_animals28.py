from __future__ import annotations

import hashlib
import io
import os
import pickle

import numpy as np
import pytest

from cbsa_torch.images import DataError
from cbsa_torch.train.data.fetch.animals28 import (
    CLASS_NAMES,
    PACKAGE,
    ArrayUnpickler,
    build,
    read_wheel,
    split_rows,
)
from tests.helpers.packages import make_wheel


def by_hash(images: np.ndarray, rows) -> list[int]:
    return sorted(rows, key=lambda i: hashlib.sha256(b"animals28/v1/" + images[i].tobytes()).hexdigest())


def test_a_class_is_cut_in_the_order_of_its_hashes(animals):
    images, labels = (a[:200] for a in animals)
    split = split_rows(images, labels, held_out=3)
    for label in range(10):
        order = by_hash(images, np.nonzero(labels == label)[0].tolist())
        assert [r for r in split["test"] if labels[r] == label] == order[:3]
        assert [r for r in split["val"] if labels[r] == label] == order[3:6]
        assert [r for r in split["train"] if labels[r] == label] == order[6:]
    for rows in split.values():
        assert rows.tolist() == by_hash(images, rows.tolist())
    assert sorted(np.concatenate(list(split.values()))) == list(range(200))


@pytest.mark.parametrize("change", ["same", "mirrored", "nearby", "nearby and mirrored", "a chain", "not near"])
def test_lookalikes_go_to_train(animals, change):
    images, labels = animals[0][:40].copy(), np.zeros(40, int)
    images[images < 100] = 100
    first, second = split_rows(images, labels, held_out=10)["test"][:2]
    images[second] = images[first][:, ::-1] if "mirrored" in change else images[first]
    if "nearby" in change:  # RMS 16 / 255 = 0.063
        images[second] = images[second] - 16
    if change == "not near":  # RMS 18 / 255 = 0.0706
        images[second] = images[second] - 18
    if change == "a chain":  # the ends differ by 32 / 255, each by half of it from the middle
        third = int(split_rows(images, labels, held_out=10)["val"][0])
        images[second], images[third] = images[first] - 16, images[first] - 32
    split = split_rows(images, labels, held_out=10)
    assert {first, second} <= set(split["test" if change == "not near" else "train"])
    assert [len(split[name]) for name in ("test", "val", "train")] == [10, 10, 20]


def test_equal_images_of_train_keep_the_order_of_their_rows(animals):
    images, labels = animals[0][:40].copy(), np.zeros(40, int)
    images[[7, 3, 31]] = images[20]
    train = split_rows(images, labels, held_out=5)["train"].tolist()
    start = train.index(3)
    assert train[start : start + 4] == [3, 7, 20, 31]


def test_the_arrays_are_those_documented(animals, animals_wheel):
    arrays = build({PACKAGE.name: animals_wheel[0]})
    for split, count in (("train", 500), ("val", 1000), ("test", 1000)):
        x, y, row = (arrays[f"{split}_{kind}"] for kind in ("x", "y", "row"))
        assert (x.dtype, y.dtype, row.dtype) == (np.uint8, np.uint8, np.uint16)
        assert (x.shape, y.shape, row.shape) == ((count, 28, 28), (count,), (count,))
        np.testing.assert_array_equal(x, animals[0][row])
        np.testing.assert_array_equal(y, animals[1][row])
    assert len(arrays) == 10
    assert arrays["class_names"].tolist() == CLASS_NAMES


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_malicious_wheel_is_refused_and_not_executed(tmp_path, animals):
    made = tmp_path / "made"
    with pytest.raises(DataError, match="asks for posix.mkdir; nothing of it was executed"):
        read_wheel(make_wheel(animals[0], Malicious(str(made))))
    assert not made.exists()


def test_pickles_of_older_numpy_are_read():
    """The real file names a module that NumPy 2 warns about."""
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    old = pickle.dumps(array, 3).replace(b"numpy._core", b"numpy.core")
    np.testing.assert_array_equal(ArrayUnpickler(io.BytesIO(old)).load(), array)
