"""emoji-scenes: determined by seed, split and index; exact masks; emoji of one split only."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from examples import emoji_scenes
from PIL import Image
from torch.utils.data import DataLoader

from cbsa_torch.train.data.fetch.data_sets import DATA_SETS, checksum, write_arrays
from cbsa_torch.train.data.seeded import SeededSamples
from cbsa_torch.train.errors import ConfigError, DataError
from cbsa_torch.train.tasks.segmentation import (
    EmojiScenes,
    ScenesConfig,
    SegmentationDataConfig,
    open_scenes,
    open_segmentation,
    training_transform,
)
from cbsa_torch.train.tasks.segmentation.scenes import background, paste

SMALL = ScenesConfig(size=48, train=20, val=6, test=6)


def scenes(arrays, split="train", count=20, **changes):
    return EmojiScenes(arrays, split, count, ScenesConfig(size=48, **changes))


def content(scene):
    image, mask = scene
    return np.asarray(image).tobytes(), mask.tobytes()


def test_a_scene_depends_on_split_index_and_seed_alone(emoji):
    first = [content(scenes(emoji)[i]) for i in range(20)]
    np.random.seed(1), torch.manual_seed(1)
    states = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    again = scenes(emoji)
    assert [content(again[i]) for i in reversed(range(20))] == first[::-1]
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    longer = scenes(emoji, count=30)
    assert content(longer[7]) == first[7]
    others = [content(scenes(emoji, seed=1)[i]) for i in range(20)]
    others += [content(scenes(emoji, "val")[i]) for i in range(20)]
    assert len({image for image, _ in first + others}) == 60


def test_a_stored_scene_does_not_change(emoji):
    """If this fails, every result on emoji-scenes is void: draw as before, or give the set another version."""
    image, mask = scenes(emoji)[0]
    assert np.bincount(mask.ravel(), minlength=4).tolist() == EXPECTED_COUNTS
    # Pillow may round differently from one version to the next
    np.testing.assert_allclose(np.asarray(image).mean((0, 1)), EXPECTED_MEAN, atol=0.1)


EXPECTED_COUNTS = [1173, 645, 239, 247]
EXPECTED_MEAN = [27.185, 89.171, 125.175]


def test_splits_show_their_own_emoji_only(emoji):
    for split, red in (("train", 50), ("val", 100), ("test", 150)):
        inside, blues = [], set()
        data = scenes(emoji, split, emoji=(1, 1), scale=(0.6, 0.6))
        for i in range(20):
            image, mask = data[i]
            pixels = np.asarray(image)
            # away from the edge, where alpha is full
            core = np.stack([np.roll(mask > 0, (dy, dx), (0, 1)) for dy in (-2, 0, 2) for dx in (-2, 0, 2)])
            core = core.all(0)[4:-4, 4:-4]
            if core.any():
                inside.append(pixels[4:-4, 4:-4][core][:, 0])
                blues |= set(pixels[4:-4, 4:-4][core][:, 2].tolist())
        # Pillow rounds when it divides by alpha
        assert np.abs(np.concatenate(inside).astype(int) - red).max() <= 2
        assert {round(blue / 255) for blue in blues} == {0, 1}


def test_every_class_and_background_is_drawn(emoji):
    data = scenes(emoji)
    assert np.unique(np.stack([data[i][1] for i in range(20)])).tolist() == [0, 1, 2, 3]
    assert data.class_names == ["background", "Flags", "Objects", "Symbols"]
    assert not scenes(emoji, emoji=(0, 0))[0][1].any()
    with pytest.raises(IndexError):
        data[20]


def test_pasting_labels_where_alpha_is_at_least_a_half():
    canvas, mask = np.full((4, 5, 3), 100.0), np.full((4, 5), 7)
    drawing = np.zeros((2, 3, 4), dtype=np.uint8)
    drawing[..., :3] = 200
    drawing[..., 3] = [[127, 128, 255], [0, 1, 254]]
    paste(canvas, mask, drawing, 1, 1, 3)
    assert mask.tolist() == [[7] * 5, [7, 7, 3, 3, 7], [7, 7, 7, 3, 7], [7] * 5]
    np.testing.assert_allclose(canvas[1, 1:4, 0], 100 + 100 * np.array([127, 128, 255]) / 255)
    assert (canvas[[0, 3]] == 100).all()
    assert (canvas[2, 1] == 100).all()


@pytest.mark.parametrize(("top", "left"), [(-1, -2), (3, 4), (-1, 4), (3, -2), (-9, 0), (0, -9), (9, 9)])
def test_pasting_over_the_border_keeps_what_is_inside(top, left):
    drawing = np.full((2, 3, 4), 255, dtype=np.uint8)
    canvas, mask = np.zeros((4, 5, 3)), np.zeros((4, 5), dtype=int)
    paste(canvas, mask, drawing, top, left, 1)
    y, x = np.mgrid[:4, :5]
    expected = (y >= top) & (y < top + 2) & (x >= left) & (x < left + 3)
    assert (mask == expected).all()
    assert ((canvas[..., 0] == 255) == expected).all()


def test_backgrounds_vary():
    spread = [background(np.random.default_rng(i), 32).std((0, 1)).max() for i in range(40)]
    plain = [s < 8 for s in spread]
    assert 3 <= sum(plain) <= 20
    assert max(spread) > 40


def test_a_split_without_a_category_is_refused(emoji):
    arrays = {**emoji, "split": np.where(emoji["label"] == 1, 0, emoji["split"])}
    with pytest.raises(DataError, match=r"no emoji of category 'Objects' in its val split"):
        open_scenes(arrays, SMALL)


def test_the_data_set_opens_by_name(emoji, tmp_path, monkeypatch):
    data_set = DATA_SETS["emoji64"]._replace(checksum=checksum(emoji))
    monkeypatch.setitem(DATA_SETS, "emoji64", data_set)
    config = SegmentationDataConfig(name="emoji-scenes", root=str(tmp_path), scenes=SMALL)
    with pytest.raises(DataError, match=r"cbsa data fetch emoji64 --output"):
        open_segmentation(config)
    write_arrays(tmp_path / "emoji64.npz", emoji)
    splits = open_segmentation(config, "L")
    assert [len(s) for s in splits[:3]] == [20, 6, 6]
    assert splits.test[0][0].mode == "L"
    assert splits.class_names == ["background", "Flags", "Objects", "Symbols"]
    config.scenes = ScenesConfig(emoji=(3, 2))
    with pytest.raises(ConfigError, match=r"data\.scenes\.emoji must rise from 0, got \(3, 2\)"):
        open_segmentation(config)


def test_scenes_are_drawn_above_their_masks(emoji, tmp_path, monkeypatch):
    data_set = DATA_SETS["emoji64"]._replace(checksum=checksum(emoji))
    monkeypatch.setitem(DATA_SETS, "emoji64", data_set)
    write_arrays(tmp_path / "emoji64.npz", emoji)
    options = ["--root", str(tmp_path), "--output", str(tmp_path / "scenes.png"), "--count", "3"]
    monkeypatch.setattr(sys, "argv", ["emoji_scenes", *options])
    emoji_scenes.main()
    with Image.open(tmp_path / "scenes.png") as picture:
        assert picture.size == (450, 370)
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_same_samples_with_any_workers(emoji, workers):
    config = SegmentationDataConfig(crop_size=32, base_size=48)
    data = SeededSamples(scenes(emoji), 3)
    data.transform = training_transform(config, (0.5,) * 3, (0.5,) * 3)
    batches = list(DataLoader(data, batch_size=5, num_workers=workers))
    images, masks = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert images.shape == (20, 3, 32, 32)
    assert masks.shape == (20, 32, 32)
    expected = [data[i] for i in range(20)]
    assert torch.equal(images, torch.stack([image for image, _ in expected]))
    assert torch.equal(masks, torch.stack([mask for _, mask in expected]))
    data.set_epoch(1)
    assert not torch.equal(data[0][0], expected[0][0])
