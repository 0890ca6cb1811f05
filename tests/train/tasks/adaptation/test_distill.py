"""The loss of a recovery, against counts by hand."""

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

from cbsa_torch.models import adapt_vit
from cbsa_torch.train.data import IGNORE
from cbsa_torch.train.losses import (
    Distillation,
    DistillConfig,
    blocks_with_attention,
    divergence,
    relative_error,
)


@pytest.fixture
def pair():
    small = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}
    teacher = timm.create_model("vit_tiny_patch16_224", num_classes=5, **small)
    return adapt_vit(teacher, "linear").model, teacher


@pytest.fixture
def batch():
    return torch.randn(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_equals_a_count_by_hand(temperature):
    student, teacher = torch.randn(2, 4, 5, dtype=torch.float64)
    p, q = ((x / temperature).exp() / (x / temperature).exp().sum(1, keepdim=True) for x in (teacher, student))
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(divergence(student, teacher, temperature), expected)
    assert divergence(teacher, teacher, temperature) == 0


def test_relative_error_counts_every_image_by_itself():
    student, teacher = torch.randn(2, 3, 4, 5)
    teacher[0] *= 100  # it must not drown the others
    each = [
        ((s - t).double() ** 2).sum() / (t.double() ** 2).sum() for s, t in zip(student, teacher, strict=True)
    ]
    assert relative_error(student, teacher).item() == pytest.approx(float(sum(each) / 3), rel=1e-6)
    assert relative_error(teacher, teacher) == 0


def test_labels_alone_are_the_cross_entropy(pair, batch):
    student, teacher = pair
    loss = Distillation(student, teacher, DistillConfig(labels=0.5), label_smoothing=0.1)(student, *batch)
    torch.testing.assert_close(loss, 0.5 * F.cross_entropy(student(batch[0]), batch[1], label_smoothing=0.1))


def test_images_that_could_not_be_read_leave_no_trace(pair, batch):
    student, teacher = pair
    loss = Distillation(student, teacher, DistillConfig(logits=0.7, features=0.3))
    images, targets = batch[0].clone(), batch[1].clone()
    known = torch.tensor([True, False, True, True, False, True])
    targets[~known], images[~known] = IGNORE, 1e3
    results = []
    for x, y in ((images, targets), (images[known], targets[known])):
        student.zero_grad()
        value = loss(student, x, y)
        value.backward()
        results.append((value.detach(), {n: p.grad.clone() for n, p in student.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
    assert loss(student, images, torch.full_like(targets, IGNORE)) == 0


def hooks(models):
    return [len(module._forward_hooks) for model in models for module in model.modules()]


def test_the_teacher_stays_as_it_is_and_no_hook_is_left(pair, batch):
    student, teacher = pair
    before, hooks_before = copy.deepcopy(teacher.state_dict()), hooks(pair)
    loss = Distillation(student, teacher, DistillConfig(logits=1, features=1))
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    for _ in range(2):
        loss(student, *batch).backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    with pytest.raises(AssertionError, match="Input height"):
        loss(student, batch[0][:, :, :3], batch[1])
    assert hooks(pair) == hooks_before  # the grid of patches is followed by some


def test_blocks_that_hold_attention():
    small = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 2}
    for name in ("vit_tiny_patch16_224", "vit_small_patch16_18x2_224"):
        assert blocks_with_attention(timm.create_model(name, **small)) == ["blocks.0", "blocks.1"]
    assert blocks_with_attention(timm.create_model("resnet10t")) == []
