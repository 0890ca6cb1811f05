"""Images at their own size: sizes, crops, batches with a budget of tokens."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from cbsa_torch.models import WhiteBoxTransformer
from cbsa_torch.train.config import DataConfig
from cbsa_torch.train.data import TokenBatches, in_parts, input_spec, make_loader, open_splits
from cbsa_torch.train.data.checked_images import PlainImages
from cbsa_torch.train.data.native import NativeSize, RandomNativeCrop, image_size
from cbsa_torch.train.errors import ConfigError, DataError

TOKENS = [int(t) for t in np.exp(np.random.default_rng(0).uniform(np.log(10), np.log(200), 83))]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_hold_every_image_once_within_the_budget(processes):
    shared = [TokenBatches(TOKENS, 500, 1000, seed=1, processes=processes, process=p) for p in range(processes)]
    assert len({len(batches) for batches in shared}) == 1
    orders = []
    for epoch in (0, 1):
        for batches in shared:
            batches.set_epoch(epoch)
        found = [batch for batches in shared for batch in batches]
        assert sorted(i for batch in found for i in batch) == list(range(len(TOKENS)))
        loads = [sum(TOKENS[i] for i in batch) for batch in found]
        assert max(loads) <= 500
        assert np.mean(loads) > 350
        assert {len(batch) for batch in found} <= {len(TOKENS) // len(found), len(TOKENS) // len(found) + 1}
        assert [len(list(batches)) for batches in shared] == [len(shared[0])] * processes
        orders.append(found)
    assert orders[0] != orders[1]
    shared[0].set_epoch(0)
    assert list(shared[0]) == orders[0][: len(shared[0])]
    other = TokenBatches(TOKENS, 500, 1000, seed=2, processes=processes)
    assert list(other) != orders[0][: len(other)]


def test_batches_hold_no_more_images_than_allowed():
    assert max(map(len, TokenBatches(TOKENS, 10_000, 8, seed=0))) == 8
    assert [len(b) for b in TokenBatches([200] * 5, 200, 8, seed=0)] == [1] * 5  # one fits
    three = [list(TokenBatches([200] * 5, 200, 8, seed=0, processes=3, process=p)) for p in range(3)]
    assert sorted(batch for batches in three for batch in batches) == [[0], [0], [1], [2], [3], [4]]
    with pytest.raises(DataError, match=r"1 training images are fewer than one for each of 2 process"):
        TokenBatches([4], 10, 8, seed=0, processes=2)


@pytest.mark.parametrize("whole", [False, True])
def test_sizes_are_kept_or_shrunk_in_their_aspect(whole):
    size = NativeSize(16, whole, 100)
    assert size.fit(64, 96) == (64, 96)
    assert size.fit(65, 90) == ((80, 96) if whole else (65, 90))
    height, width = size.fit(1000, 500)
    assert 85 <= size.patches(height, width) <= 100
    assert height / width == pytest.approx(2, rel=0.15)
    assert size.patches(*size.fit(3, 5000)) <= 100


@pytest.mark.parametrize("whole", [False, True])
def test_crops_have_no_more_patches_than_the_image(whole):
    size, image = NativeSize(16, whole), Image.new("RGB", (160, 96))
    assert RandomNativeCrop(size, (1.0, 1.0), (1.0, 1.0))(image).size == (160, 96)
    crop = RandomNativeCrop(size, (0.2, 0.8), (0.5, 2.0))
    random.seed(0)
    crops = [crop(image) for _ in range(50)]
    assert len({part.size for part in crops}) > 10
    for part in crops:
        assert part.width <= 160
        assert part.height <= 96
        assert not whole or (part.width % 16, part.height % 16) == (0, 0)


def test_sizes_are_those_of_the_images_as_they_are_read(images):
    rotated = Image.new("RGB", (40, 20))
    exif = rotated.getexif()
    exif[0x0112] = 6
    first = sorted((images / "train" / "blue").iterdir())[0]
    rotated.save(first, "png", exif=exif)
    sorted((images / "train" / "blue").iterdir())[1].write_bytes(b"no image")
    dataset = open_splits(DataConfig(root=str(images)), "RGB").train
    assert [image_size(dataset, i) for i in range(3)] == [(40, 20), (32, 32), (32, 32)]
    for i in range(len(dataset)):
        assert image_size(dataset, i) == dataset[i][0].size[::-1]


def test_lists_are_cut_into_parts_within_the_budget():
    images = [torch.zeros(3, side, 8) for side in (8, 16, 4, 64, 8)]  # 2, 3, 2, 9 and 2 tokens
    size = NativeSize(8)
    cut = in_parts(iter(images), lambda image: size.patches(*image.shape[1:]) + 1, 8)
    assert [[image.shape[1] for image in part] for part in cut] == [[8, 16, 4], [64], [8]]


def test_models_of_one_size_are_refused():
    spec = input_spec(WhiteBoxTransformer(32, 4, embed_dim=16, depth=1, num_heads=2))
    assert (spec.patch_size, spec.whole_patches) == (4, False)
    with pytest.raises(ConfigError, match=r"data\.native needs a model that takes images of several sizes"):
        make_loader(
            PlainImages([]), spec._replace(patch_size=None), DataConfig(native=True, workers=0), 2, train=False
        )
