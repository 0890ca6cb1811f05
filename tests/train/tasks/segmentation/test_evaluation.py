"""mIoU and pixel accuracy against an independent count; sums over images and processes."""

from __future__ import annotations

import math
import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.classification import MulticlassJaccardIndex

from cbsa_torch.train.tasks.segmentation import IGNORE, SegmentationMetric, miou_without, to_record


def names(count):
    return [f"class {i}" for i in range(count)]


def measure(maps, count):
    metric = SegmentationMetric(names(count))
    for predicted, labels in maps:
        metric.update(torch.from_numpy(predicted), torch.from_numpy(labels))
    return metric.compute()


def count_by_sets(maps, count):
    """IoU of every class from sets of pixels, one class at a time; nothing in common with a confusion matrix."""
    ious, accuracies, right, total = [], [], 0, 0
    for c in range(count):
        union = both = true = 0
        for predicted, labels in maps:
            for p, t in zip(predicted.ravel().tolist(), labels.ravel().tolist(), strict=True):
                if t == IGNORE:
                    continue
                union += c in (p, t)
                both += p == c and t == c
                true += t == c
        ious.append(both / union if union else None)
        accuracies.append(both / true if true else None)
        right += both
        total += true
    return ious, accuracies, right, total


def mean(values):
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else math.nan


@st.composite
def random_maps(draw):
    """Images of several sizes; many classes do not occur; some pixels or all are ignored."""
    count = draw(st.integers(1, 7))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    present = generator.integers(0, count, draw(st.integers(1, count)))
    guessed = generator.integers(0, count, draw(st.integers(1, count)))
    maps = []
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(generator.integers(1, 9, 2))
        labels = generator.choice([*present, IGNORE], shape)
        maps.append((generator.choice(guessed, shape), np.where(generator.random(shape) < 0.2, IGNORE, labels)))
    return maps, count


@settings(max_examples=150, deadline=None)
@given(random_maps())
def test_scores_agree_with_an_independent_count(case):
    maps, count = case
    ious, accuracies, right, total = count_by_sets(maps, count)
    got = measure(maps, count)
    assert [c.iou for c in got.classes.values()] == ious
    assert [c.accuracy for c in got.classes.values()] == accuracies
    assert got.pixels == total
    expected = (mean(ious), mean(accuracies), right / total if total else math.nan)
    assert (got.miou, got.mean_accuracy, got.pixel_accuracy) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(random_maps())
def test_the_mean_is_that_of_torchmetrics(case):
    maps, count = case
    if count < 2 or not any((labels != IGNORE).any() for _, labels in maps):
        return
    reference = MulticlassJaccardIndex(count, average="macro", ignore_index=IGNORE)
    for predicted, labels in maps:
        reference.update(torch.from_numpy(predicted), torch.from_numpy(labels))
    assert measure(maps, count).miou == pytest.approx(reference.compute().item(), abs=1e-6)


def test_by_hand():
    predicted = np.array([[0, 0, 1, 2, 2]])
    labels = np.array([[0, 1, 1, IGNORE, 0]])
    got = measure([(predicted, labels)], 5)
    assert [c.iou for c in got.classes.values()] == [1 / 3, 1 / 2, 0.0, None, None]
    assert [c.accuracy for c in got.classes.values()] == [1 / 2, 1 / 2, None, None, None]
    assert got.miou == pytest.approx((1 / 3 + 1 / 2 + 0) / 3)  # class 2 is predicted, hence counts
    assert got.pixel_accuracy == 0.5
    assert got.pixels == 4
    assert to_record(got)["classes"]["class 1"] == {"iou": 0.5, "accuracy": 0.5, "pixels": 2}


def test_nothing_but_ignored_pixels():
    got = measure([(np.zeros((2, 2), int), np.full((2, 2), IGNORE))], 3)
    assert math.isnan(got.miou)
    assert math.isnan(got.pixel_accuracy)
    assert got.pixels == 0


def test_dropped_classes_leave_the_mean_but_not_the_pixels():
    predicted, labels = np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2])
    got = measure([(predicted, labels)], 3)
    assert miou_without(got, ()) == got.miou
    assert miou_without(got, ("class 2",)) == pytest.approx((1 + 1 / 2) / 2)
    assert math.isnan(miou_without(got, got.classes))
    with pytest.raises(ValueError, match=r"got 'clas 2'; did you mean 'class 2'\? \(there are: class 0"):
        miou_without(got, ("clas 2",))


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        ([0, 3], [0, 1], r"predicted must be in \[0, 2\] for 3 class\(es\), got 0 to 3"),
        ([0, -1], [0, 1], r"predicted must be in \[0, 2\]"),
        ([0, 1], [0, 255], r"labels must be in \[-1, 2\] for 3 class\(es\), got 0 to 255"),
        ([0, 1], [[0], [1]], r"one shape, got \(2,\) and \(2, 1\)"),
    ],
)
def test_what_is_no_label_is_refused(predicted, labels, message):
    metric = SegmentationMetric(names(3))
    with pytest.raises(ValueError, match=message):
        metric.update(torch.tensor(predicted), torch.tensor(labels))
    with pytest.raises(TypeError, match="must be integers, got torch.float32"):
        metric.update(torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    assert metric.confmat.sum() == 0


def test_counts_beyond_float_precision_stay_exact():
    metric = SegmentationMetric(names(2))
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    metric.confmat[0, 0] = 2**53
    metric.update(torch.tensor([0]), torch.tensor([0]))
    assert metric.compute().pixels == 2**53 + 2


def one_of_two(rank, folder, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    generator = np.random.default_rng(rank)
    metric = SegmentationMetric(names(4))
    for _ in range(1 + 2 * rank):
        shape = tuple(generator.integers(1, 9, 2))
        metric.update(*(torch.from_numpy(generator.integers(low, 3, shape)) for low in (0, IGNORE)))
    own = metric.confmat.tolist()
    results.put((own, metric.compute().confusion))
    torch.distributed.destroy_process_group()


def test_two_processes_sum_exactly(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=one_of_two, args=(rank, tmp_path, results)) for rank in range(2)]
    for process in processes:
        process.start()
    (own, both), (other, both_too) = (results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    assert both == both_too == np.add(own, other).tolist()
    assert own != other
