import numpy as np
import pytest
import torch
from PIL import Image

from cbsa_torch import interpret


def to_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(np.asarray(array, dtype=np.uint8))
    if mode == "P":
        picture = picture.convert("L")
        picture.putpalette([i for i in range(256) for _ in range(3)])
    elif mode is not None:
        picture = picture.convert(mode)
    picture.save(path)


@pytest.fixture
def folders(tmp_path):
    for name, side in (("b", 3), ("a", 2)):
        save(tmp_path / "images" / f"{name}.png", np.full((side, 4, 3), 51))
        save(tmp_path / "masks" / f"{name}.png", [[0, 0, 255, 7]] * side)
    return tmp_path / "images", tmp_path / "masks"


def test_pairs_by_name(folders):
    pairs = interpret.read_pairs(*folders, to_tensor)
    assert len(pairs) == 2
    for _ in range(2):  # more than once
        first, second = pairs
        assert (first.image.shape, second.image.shape) == ((3, 2, 4), (3, 3, 4))
        assert torch.equal(first.image, torch.full((3, 2, 4), 0.2))
        assert first.mask.tolist() == [[False, False, True, True]] * 2
        assert first.valid is None


def test_voc(tmp_path):
    for name in ("one", "two"):
        save(tmp_path / "JPEGImages" / f"{name}.jpg", np.zeros((2, 3, 3)))
        save(tmp_path / "SegmentationClass" / f"{name}.png", [[0, 15, 255], [0, 255, 1]], "P")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("two\none\n")
    pairs = interpret.read_voc(tmp_path, to_tensor)
    assert [pair.image.stem for pair in pairs.pairs] == ["two", "one"]
    assert pairs[0].mask.tolist() == [[False, True, False], [False, False, True]]
    assert pairs[0].valid.tolist() == [[True, True, False], [True, False, True]]
    (tmp_path / "SegmentationClass" / "one.png").unlink()
    with pytest.raises(ValueError, match="no mask for image .*one.jpg"):
        interpret.read_voc(tmp_path, to_tensor)
    with pytest.raises(ValueError, match="no test.txt; there are val"):
        interpret.read_voc(tmp_path, to_tensor, "test")


def test_folders_that_do_not_match_are_refused(folders, tmp_path):
    images, masks = folders
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        interpret.read_pairs(tmp_path / "nowhere", masks, to_tensor)
    with pytest.raises(TypeError, match="transform must be a function of a PIL image, got int"):
        interpret.read_pairs(images, masks, 224)
    with pytest.raises(TypeError, match=r"transform must return a torch\.Tensor, got Image"):
        list(interpret.read_pairs(images, masks, lambda picture: picture))
    (images / "a.png").rename(images / "d.png")
    with pytest.raises(ValueError, match=r"no image for mask .*masks/a\.png"):
        interpret.read_pairs(images, masks, to_tensor)
    (masks / "a.png").unlink()
    with pytest.raises(ValueError, match=r"no mask for image .*images/d\.png"):
        interpret.read_pairs(images, masks, to_tensor)


def test_files_that_are_no_masks(folders):
    pairs, path = interpret.read_pairs(*folders, to_tensor), folders[1] / "a.png"
    save(path, np.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"masks/a.png: the mask is 5x2 pixels .* image .*a.png 4x2"):
        list(pairs)
    path.write_text("no picture")
    with pytest.raises(ValueError, match="cannot use .*masks/a.png: not an image"):
        list(pairs)
