"""Files of features: what TRIDENT and CLAM write is read as it is, and what cannot be used is named."""

import h5py
import numpy as np
import pytest
import torch

from cbsa_torch.train.errors import DataError
from cbsa_torch.train.tasks.slides.files import find_file, read_header, read_slide
from tests.helpers.slides import TILE, WIDTH, draw_slide, write_clam, write_trident


@pytest.fixture
def drawn():
    return draw_slide(np.random.default_rng(0), positive=True)


def write(path, **datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
    return path


def test_both_tools_files_give_the_same(drawn, tmp_path):
    features, coords = drawn
    write_trident(tmp_path / "t.h5", features, coords)
    write_clam(tmp_path / "c.h5", features, coords.astype(np.int32))
    trident, clam = read_slide(tmp_path / "t.h5"), read_slide(tmp_path / "c.h5")
    assert (trident.tile_size, clam.tile_size) == (TILE, None)
    for slide in (trident, clam):
        assert torch.equal(slide.features, torch.from_numpy(features))
        assert torch.equal(slide.coords, torch.from_numpy(coords))
    assert read_header(tmp_path / "t.h5") == (len(features), WIDTH, True)


def test_other_forms_of_the_same_numbers(drawn, tmp_path):
    features, coords = drawn
    path = write(
        tmp_path / "a.h5", features=features.astype(np.float16)[None], coords=coords.astype(float)[None]
    )
    slide = read_slide(path)
    torch.testing.assert_close(slide.features, torch.from_numpy(features), atol=1e-2, rtol=1e-2)
    assert (slide.features.dtype, slide.coords.dtype) == (torch.float32, torch.float64)
    tensor = torch.from_numpy(features)[None].half().requires_grad_()
    for zipped in (True, False):  # False: as old versions of PyTorch wrote
        torch.save(tensor, tmp_path / "b.pt", _use_new_zipfile_serialization=zipped)
        slide = read_slide(tmp_path / "b.pt")
        assert (slide.features.shape, slide.features.dtype) == (features.shape, torch.float32)
        assert (slide.coords, slide.features.requires_grad) == (None, False)
        assert read_header(tmp_path / "b.pt") == (len(features), WIDTH, False)


NAN = np.array([[1.0, 2.0], [np.nan, 1.0]], dtype=np.float32)
GOOD = np.ones((2, 2), dtype=np.float32)


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({"coords": GOOD}, "no dataset 'features'.*holds coords"),
        ({"features": GOOD, "coords": np.zeros((3, 2))}, r"coords must have shape \(2, 2\) as there are 2 features, got \(3, 2\)"),
        ({"features": GOOD[:, 0]}, r"features must have shape \(N, D\)"),
        ({"features": GOOD[:0]}, "at least one tile"),
        ({"features": NAN, "coords": GOOD}, "features that are not finite, first in row 1"),
        ({"features": GOOD, "coords": NAN}, "coordinates that are not finite, first in row 1"),
        ({"features": [["a", "b"]]}, "features cannot be read"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named(datasets, message, tmp_path):
    path = write(tmp_path / "bad.h5", **datasets)
    with pytest.raises(DataError, match=f"{path}.*{message}"):
        read_slide(path)


def test_other_files_are_named(tmp_path):
    (tmp_path / "a.h5").write_bytes(b"no HDF5")
    with pytest.raises(DataError, match=r"a\.h5 cannot be read as HDF5"):
        read_slide(tmp_path / "a.h5")
    write_trident(tmp_path / "b.h5", GOOD, GOOD, tile=-1)
    with pytest.raises(DataError, match="patch_size_level0 of coords must be a positive number, got"):
        read_slide(tmp_path / "b.h5")
    torch.save({"features": torch.ones(2, 2)}, tmp_path / "c.pt")
    with pytest.raises(DataError, match=r"c\.pt must hold one floating-point tensor \(N, D\), got dict"):
        read_slide(tmp_path / "c.pt")
    torch.save(print, tmp_path / "d.pt")  # a pickle that names a function
    with pytest.raises(DataError, match=r"d\.pt holds something other than tensors.*refused"):
        read_slide(tmp_path / "d.pt")
    with h5py.File(write(tmp_path / "g.h5", features=GOOD), "a") as file:
        file.create_group("coords")
    with pytest.raises(DataError, match=r"g\.h5: coords must be a dataset"):
        read_slide(tmp_path / "g.h5")
    (tmp_path / "e.pt").write_bytes(b"")
    with pytest.raises(DataError, match=r"e\.pt cannot be read as a PyTorch file"):
        read_slide(tmp_path / "e.pt")


def test_a_slide_is_found_by_its_name(tmp_path):
    for name in ("a.h5", "b.pt", "c.h5", "c.pt", "d.1.h5"):
        (tmp_path / name).touch()
    assert [find_file(tmp_path, name).name for name in ("a", "b", "c.pt", "d.1")] == [
        "a.h5",
        "b.pt",
        "c.pt",
        "d.1.h5",
    ]
    for name, message in (
        ("c", "both c.h5 and c.pt"),
        ("e", "neither e.h5 nor e.pt"),
        ("a.pt", "no such file"),
    ):
        with pytest.raises(DataError, match=f"slide '{name}': {message}"):
            find_file(tmp_path, name)
