"""A sample's augmentation depends on seed, epoch and index alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader, skip_first_batches
from torch.utils.data import IterableDataset
from torchvision.datasets import FakeData

from cbsa_torch.train.config import DataConfig
from cbsa_torch.train.data import InputSpec, make_loader, open_splits, set_epoch
from cbsa_torch.train.data.arrays import ArrayImages
from cbsa_torch.train.data.checked_images import PlainImages
from cbsa_torch.train.data.seeded import SeededSamples, seed_everything

SPEC = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0)
STRONG = {"crop_scale": (0.2, 1.0), "color_jitter": 0.4, "auto_augment": "rand-m9-mstd0.5", "rotate": 10.0}


def datasets(kind, images):
    """The training split of every kind of data set there is."""
    if kind == "held out":
        return open_splits(DataConfig(root=str(images / "train")), "RGB").train
    if kind == "digits":
        return open_splits(DataConfig(name="digits"), "RGB").train
    if kind == "arrays":
        pixels = np.random.default_rng(0).integers(0, 255, (9, 28, 28), dtype=np.uint8)
        return ArrayImages(pixels, np.arange(9), "RGB")
    if kind == "torchvision":
        return PlainImages(FakeData(9, (3, 40, 40), 3), "RGB")
    name = {"folder": "folder", "timm": "", "torchvision folder": "torch/image_folder"}[kind]
    return open_splits(DataConfig(name=name, root=str(images)), "RGB").train


KINDS = ["folder", "held out", "digits", "arrays", "torchvision", "torchvision folder", "timm"]


def loader_of(dataset, workers=0, seed=0, **settings):
    return make_loader(
        dataset, SPEC, DataConfig(workers=workers, **{**STRONG, **settings}), 4, train=True, seed=seed
    )


def samples(loader, count=8):
    return torch.stack([loader.dataset[i][0] for i in range(count)])


def in_batches(loader):
    """Images by label and content, whatever their order: sorted by a sum that tells them apart."""
    shown = torch.cat([images for images, _ in loader])
    return shown[shown.sum((1, 2, 3)).argsort()]


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_the_same_whenever_it_is_read(kind, images):
    dataset = datasets(kind, images)
    first = samples(loader_of(dataset))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    loader = loader_of(dataset)
    backwards = torch.stack([loader.dataset[i][0] for i in reversed(range(8))])
    assert torch.equal(first, backwards.flip(0))
    assert torch.equal(first, torch.stack([image for image, _ in loader.dataset.__getitems__(list(range(8)))]))


@pytest.mark.parametrize("kind", ["folder", "held out", "arrays"])
def test_workers_do_not_change_the_samples(kind, images):
    dataset = datasets(kind, images)
    shown = []
    for workers in (0, 2):
        loader = loader_of(dataset, workers)
        set_epoch(loader, 3)
        torch.manual_seed(0)  # the order
        shown.append(torch.cat([batch for batch, _ in loader]))
    assert torch.equal(*shown)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_differ(images, workers):
    loader = loader_of(datasets("folder", images), workers)
    shown = []
    for epoch in (1, 2, 1):
        set_epoch(loader, epoch)
        shown.append(in_batches(loader))
    assert torch.equal(shown[0], shown[2])
    assert not torch.isclose(shown[0], shown[1]).all((1, 2, 3)).any()


def test_seeds_and_indices_differ():
    image = np.random.default_rng(0).integers(0, 255, (1, 40, 40, 3), dtype=np.uint8)
    flat = ArrayImages(np.tile(image, (8, 1, 1, 1)), np.zeros(8), "RGB")
    first, second = samples(loader_of(flat)), samples(loader_of(flat, seed=1))
    assert len({image.numpy().tobytes() for image in [*first, *second]}) == 16


@pytest.mark.parametrize("kind", KINDS)
def test_the_random_states_of_the_process_are_not_touched(kind, images):
    loader = loader_of(datasets(kind, images))
    before = states()
    loader.dataset[0]
    loader.dataset.__getitems__([0, 1, 2])
    with pytest.raises(IndexError):
        loader.dataset[10**6]
    assert states() == before


def test_the_generators_are_not_copies_of_each_other_and_numbers_are_not_confused():
    """Python's and NumPy's are the same algorithm; with one seed they would draw the same numbers."""
    seed_everything(0, 1, 2)
    drawn = [*(random.random() for _ in range(20)), *np.random.random(20), *torch.rand(20).tolist()]
    assert len({round(float(x), 6) for x in drawn}) == 60
    seeds = []
    for numbers in [(0, 1, 12), (0, 11, 2), (1, 0, 12), (12, 1, 0)]:
        seed_everything(*numbers)
        seeds.append((random.random(), np.random.random(), torch.rand(1).item()))
    assert all(len(set(column)) == 4 for column in zip(*seeds, strict=True))


def test_flips_are_even_over_indices():
    """Seeds of neighbouring indices give independent draws: half of 2,000 images are flipped, give or take."""
    image = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    image[:, :, 0] = 255
    dataset = SeededSamples(ArrayImages(np.tile(image, (2000, 1, 1, 1)), np.zeros(2000), "RGB"), 0)
    dataset.transform = lambda _: [x < 0.5 for x in (random.random(), np.random.random(), torch.rand(1).item())]
    flips = np.array([dataset[i][0] for i in range(2000)])
    assert (np.abs(flips.mean(0) - 0.5) < 0.05).all()
    assert (np.abs(np.corrcoef(flips.T) - np.eye(3)) < 0.1).all()
    assert abs(np.corrcoef(flips[:-1, 0], flips[1:, 0])[0, 1]) < 0.1


def test_evaluation_and_data_sets_that_stream_are_not_seeded(images):
    class Stream(IterableDataset):
        transform = None

        def __iter__(self):
            return iter([])

    assert isinstance(loader_of(Stream()).dataset, Stream)
    dataset = datasets("folder", images)
    assert make_loader(dataset, SPEC, DataConfig(workers=0), 4, train=False).dataset is dataset


def prepared(images, processes=2, rank=0):
    loader = loader_of(datasets("folder", images))
    ranks = {"num_processes": processes, "process_index": rank, "put_on_device": False}
    return prepare_data_loader(loader, **ranks, use_seedable_sampler=True, data_seed=7)


def test_the_epoch_reaches_the_samples_in_several_processes_and_after_skipped_batches(images):
    """Accelerate tells nested samplers the epoch, but not the data set."""
    loader = prepared(images)
    assert isinstance(loader.batch_sampler, BatchSamplerShard)
    for epoch in (1, 4):
        set_epoch(loader, epoch)
        whole = [batch.clone() for batch, _ in loader]
        assert loader.dataset.epoch == epoch
        set_epoch(loader, epoch)
        rest = [batch.clone() for batch, _ in skip_first_batches(loader, 1)]
        assert len(whole) == len(rest) + 1 == 3
        assert all(map(torch.equal, whole[1:], rest))


def test_processes_together_show_what_one_shows(images):
    alone, *both = (prepared(images, processes, rank) for processes, rank in ((1, 0), (2, 0), (2, 1)))
    for loader in (alone, *both):
        set_epoch(loader, 2)
    one = torch.cat([batch for batch, _ in alone])
    two = torch.cat([torch.cat([a, b]) for (a, _), (b, _) in zip(*both, strict=True)])
    assert torch.equal(one, two)
