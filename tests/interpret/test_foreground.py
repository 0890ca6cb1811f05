import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

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
    (folders[0] / ".hidden").write_text("passed over")
    pairs = interpret.read_pairs(*folders, to_tensor)
    assert len(pairs) == 2
    for _ in range(2):  # more than once
        first, second = pairs
        assert (first.image.shape, second.image.shape) == ((3, 2, 4), (3, 3, 4))
        assert torch.equal(first.image, torch.full((3, 2, 4), 0.2))
        assert first.mask.tolist() == [[False, False, True, True]] * 2
        assert first.valid is None


@pytest.mark.parametrize("mode", ["1", "I;16", "L"])
def test_masks_of_one_channel(folders, mode):
    save(folders[1] / "a.png", [[0, 0, 255, 255]] * 2, mode)
    assert interpret.read_pairs(*folders, to_tensor)[0].mask.tolist() == [[False, False, True, True]] * 2


def make_voc(root):
    for name in ("one", "two"):
        save(root / "JPEGImages" / f"{name}.jpg", np.zeros((2, 3, 3)))
        save(root / "SegmentationClass" / f"{name}.png", [[0, 15, 255], [0, 255, 1]], "P")
    save(root / "JPEGImages" / "unlabelled.jpg", np.zeros((2, 3, 3)))
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("two\none\n")
    (lists / "train.txt").write_text("")
    return root


def test_voc(tmp_path):
    pairs = interpret.read_voc(make_voc(tmp_path), to_tensor)
    assert [image.stem for image, _ in pairs.files] == ["two", "one"]
    pair = pairs[0]
    assert pair.mask.tolist() == [[False, True, False], [False, False, True]]
    assert pair.valid.tolist() == [[True, True, False], [True, False, True]]


def test_errors_of_voc(tmp_path):
    with pytest.raises(ValueError, match="root .* must have a folder JPEGImages"):
        interpret.read_voc(tmp_path, to_tensor)
    make_voc(tmp_path)
    with pytest.raises(ValueError, match="split must be one of train, val, got 'vall'; did you mean 'val'"):
        interpret.read_voc(tmp_path, to_tensor, "vall")
    with pytest.raises(ValueError, match="names no images"):
        interpret.read_voc(tmp_path, to_tensor, "train")
    (tmp_path / "SegmentationClass" / "one.png").unlink()
    with pytest.raises(ValueError, match="not there: .*one.png"):
        interpret.read_voc(tmp_path, to_tensor)


def test_errors_of_folders(folders, tmp_path):
    images, masks = folders
    with pytest.raises(ValueError, match="images must be a folder, got .*nowhere"):
        interpret.read_pairs(tmp_path / "nowhere", masks, to_tensor)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="masks: the folder .*empty is empty"):
        interpret.read_pairs(images, tmp_path / "empty", to_tensor)
    with pytest.raises(TypeError, match="transform must be a function of a PIL image, got int"):
        interpret.read_pairs(images, masks, 224)
    with pytest.raises(TypeError, match="transform must return a torch.Tensor, got Image"):
        list(interpret.read_pairs(images, masks, lambda picture: picture))
    save(images / "c.png", np.zeros((2, 4, 3)))
    with pytest.raises(ValueError, match="no mask in .*masks for 'c'"):
        interpret.read_pairs(images, masks, to_tensor)
    (images / "c.png").unlink()
    (images / "a.png").rename(images / "d.png")
    with pytest.raises(ValueError, match="no mask in .*masks for 'd'"):
        interpret.read_pairs(images, masks, to_tensor)
    save(images / "b.jpg", np.zeros((2, 4, 3)))
    with pytest.raises(ValueError, match=r"b.jpg and b.png in .*images have one name"):
        interpret.read_pairs(images, masks, to_tensor)


@pytest.mark.parametrize(
    "error", [SyntaxError("broken chunk"), ValueError("odd"), Image.DecompressionBombError("too large")]
)
def test_whatever_pil_raises_at_a_file_names_the_file(folders, monkeypatch, error):
    def load(self):
        raise error

    pairs = interpret.read_pairs(*folders, to_tensor)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(ValueError, match=f"a.png cannot be read: {error}"):
        list(pairs)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("no picture"), "a.png is not an image that PIL can read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-30]), "a.png cannot be read"),
        (lambda path: save(path, np.zeros((2, 5))), "mask .*a.png is 2 x 5, but its image .*a.png is 2 x 4"),
        (lambda path: save(path, np.zeros((2, 4, 3))), "must have one channel .* got mode RGB"),
    ],
)
def test_files_that_are_no_masks(folders, write, message):
    pairs = interpret.read_pairs(*folders, to_tensor)
    write(folders[1] / "a.png")
    with pytest.raises(ValueError, match=message):
        list(pairs)
