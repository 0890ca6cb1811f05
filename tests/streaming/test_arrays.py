"""Files that are read in parts."""

import gc

import h5py
import numpy as np
import pytest

from cbsa_torch.streaming import open_array, open_features
from cbsa_torch.streaming.arrays import read_part
from tests.helpers.slides import write_trident
from tests.helpers.streaming import image

SOME = (slice(3, 21), slice(0, 30), slice(0, 3))


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


def test_files_of_every_kind_hold_the_same_image(tmp_path):
    pixels = image(40, 30)
    np.save(tmp_path / "image.npy", pixels)
    with h5py.File(tmp_path / "one.h5", "w") as file:
        file["scan"] = pixels
    with h5py.File(tmp_path / "two.hdf5", "w") as file:
        file["scan"], file["mask"] = pixels, pixels[..., 0]
    for name in ("image.npy", "one.h5", "one.h5::scan", "two.hdf5::scan"):
        array = open_array(f"{tmp_path}/{name}")
        assert array.shape == pixels.shape
        np.testing.assert_array_equal(read_part("source", array, SOME), pixels[SOME])
    for name in ("two.hdf5", "two.hdf5::none"):
        with pytest.raises(ValueError, match="must hold one array, or its name .* it holds: mask, scan"):
            open_array(f"{tmp_path}/{name}")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tiff(tmp_path):
    tifffile = pytest.importorskip("tifffile", reason="tifffile is no dependency")
    pixels = image(40, 30)
    tifffile.imwrite(tmp_path / "plain.tif", pixels, photometric="rgb")
    array = open_array(tmp_path / "plain.tif")
    assert isinstance(array, np.memmap)
    np.testing.assert_array_equal(array, pixels)
    pytest.importorskip("zarr", reason="zarr is no dependency")
    options = {"photometric": "rgb", "tile": (16, 16), "compression": "zlib"}
    with tifffile.TiffWriter(tmp_path / "tiled.tif") as file:  # at full size, and an overview
        file.write(pixels, subifds=1, **options)
        file.write(pixels[::2, ::2], subfiletype=1, **options)
    array = open_array(tmp_path / "tiled.tif")
    assert array.shape == pixels.shape
    np.testing.assert_array_equal(read_part("source", array, SOME), pixels[SOME])
    del array  # the store closes its file when it goes, and Python warns of that
    gc.collect()


def test_zarr(tmp_path):
    zarr = pytest.importorskip("zarr", reason="zarr is no dependency")
    pixels = image(40, 30)
    zarr.save_array(str(tmp_path / "one.zarr"), pixels)
    group = zarr.open_group(str(tmp_path / "two.zarr"), mode="w")
    group["scan"], group["mask"] = pixels, pixels[..., 0]
    for name in ("one.zarr", "two.zarr::scan"):
        np.testing.assert_array_equal(read_part("source", open_array(f"{tmp_path}/{name}"), SOME), pixels[SOME])
    with pytest.raises(ValueError, match="must hold one array, or its name must follow"):
        open_array(tmp_path / "two.zarr")
    group = zarr.open_group(str(tmp_path / "slide.zarr"), mode="w")
    group["features"], group["coords"] = np.ones((5, 3), np.float32), np.ones((5, 2), np.int64)
    assert [array.shape for array in open_features(tmp_path / "slide.zarr")] == [(5, 3), (5, 2)]


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
