"""Files that are read in parts."""

import h5py
import numpy as np
import pytest

from cbsa_torch.streaming import open_array, open_features
from tests.helpers.slides import write_trident
from tests.helpers.streaming import image


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.npy"):
        open_array(tmp_path / "none.npy")
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"must be a \.npy, \.tif, \.h5 or \.zarr file"):
        open_array(tmp_path / "photo.jpg")
    (tmp_path / "empty.npy").touch()
    with pytest.raises(ValueError, match=r"empty\.npy cannot be read: "):
        open_array(tmp_path / "empty.npy")
    np.save(tmp_path / "image.npy", image(4, 4))
    with pytest.raises(ValueError, match="none called 'a'"):
        open_array(f"{tmp_path}/image.npy::a")


def test_features_and_coordinates_of_a_slide(tmp_path):
    features, coords = np.ones((5, 3), np.float16), np.arange(10).reshape(5, 2)
    write_trident(tmp_path / "slide.h5", features, coords)
    found = open_features(tmp_path / "slide.h5")
    assert [array.shape for array in found] == [(5, 3), (5, 2)]
    write_trident(tmp_path / "none.h5", features, None)
    assert open_features(tmp_path / "none.h5")[1] is None
    assert open_features(f"{tmp_path}/slide.h5::features")[1] is None
    np.save(tmp_path / "features.npy", features)
    assert open_features(tmp_path / "features.npy")[0].shape == (5, 3)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["tokens"] = features
    with pytest.raises(ValueError, match="must hold an array 'features'; it holds: tokens"):
        open_features(tmp_path / "other.h5")
