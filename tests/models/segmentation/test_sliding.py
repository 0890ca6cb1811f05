"""Windows: equal to a sum pixel by pixel, for any sizes, and the same whatever the batches are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from cbsa_torch.models import multi_scale_logits, sliding_logits
from tests.helpers.compare import assert_close


class Positional(nn.Module):
    """Logits that depend on the pixel, on where it lies in the window, and on the rest of the window."""

    def __init__(self, classes=3):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, classes + 1, dtype=torch.float64))
        self.drop = nn.Dropout(0.5)
        self.sizes = []

    def forward(self, x):
        self.sizes.append(tuple(x.shape))
        height, width = x.shape[2:]
        place = torch.arange(height)[:, None] * 0.37 + torch.arange(width) ** 2 * 0.11
        x = self.drop(x.mean(1, keepdim=True) + place + x.std(dim=(1, 2, 3), keepdim=True))
        return x * self.weight[:, None, None]


def by_hand(model, image, window, stride):
    """Every window alone; every pixel the mean of the windows that hold it."""
    height, width = image.shape[1:]
    found = [[[] for _ in range(width)] for _ in range(height)]
    h, w = min(window[0], height), min(window[1], width)
    tops, lefts = [], []
    for starts, length, side, step in ((tops, height, h, stride[0]), (lefts, width, w, stride[1])):
        at = 0
        while at + side < length:
            starts.append(at)
            at += step
        starts.append(length - side)
    for top in tops:
        for left in lefts:
            logits = model(image[None, :, top : top + h, left : left + w])[0]
            for i in range(h):
                for j in range(w):
                    found[top + i][left + j].append(logits[:, i, j])
    return torch.stack([torch.stack([torch.stack(p).mean(0) for p in row], -1) for row in found], -2)


sides = st.integers(1, 14)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equals_brute_force(data):
    window = (data.draw(sides), data.draw(sides))
    stride = tuple(data.draw(st.integers(1, side)) for side in window)
    shapes = data.draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=3))
    images = [torch.randn(2, *shape, dtype=torch.float64) for shape in shapes]
    model = Positional().eval()
    found = sliding_logits(model, images, window, stride, batch_size=data.draw(st.integers(1, 5)))
    with torch.no_grad():
        for image, logits in zip(images, found, strict=True):
            assert_close(logits, by_hand(model, image, window, stride), 1e-12)


def test_windows_of_all_images_share_batches():
    model = Positional()
    images = [torch.randn(3, 9, 9, dtype=torch.float64), torch.randn(3, 9, 4, dtype=torch.float64)]
    sliding_logits(model, images, 4, batch_size=5)
    assert [size[0] for size in model.sizes] == [5, 5, 2]  # 9 windows and 3
    assert {size[2:] for size in model.sizes} == {(4, 4)}


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(Positional(), nn.Dropout(0.5).eval())
    images = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    found = sliding_logits(model, images, 4)
    assert torch.equal(sliding_logits(model, images, 4), found)  # dropout is off
    assert [m.training for m in (model, model[0], model[0].drop, model[1])] == [True, True, True, False]
    assert not found.requires_grad
    with pytest.raises(RuntimeError, match="broken"):
        sliding_logits(nn.Sequential(Broken()), images)
    assert torch.is_grad_enabled()


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def test_low_precision_logits_are_summed_in_float32():
    model = Positional().to(torch.bfloat16)
    assert sliding_logits(model, torch.randn(1, 3, 6, 6).bfloat16(), 4).dtype == torch.float32


def test_several_scales_and_flips():
    model = Positional().eval()
    image = torch.randn(3, 12, 10, dtype=torch.float64)
    found = multi_scale_logits(model, [image], window=6, stride=4, scales=(0.5, 1.0), flip=True)[0]
    expected = torch.zeros(3, 12, 10, dtype=torch.float64)
    for size in ((6, 5), (12, 10)):
        small = F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        for flip in (False, True):
            view = small.flip(2) if flip else small
            logits = by_hand(model, view, (6, 6), (4, 4))
            logits = logits.flip(2) if flip else logits
            expected += F.interpolate(logits[None], (12, 10), mode="bilinear")[0].softmax(0) / 4
    assert_close(found.softmax(0), expected.detach(), 1e-10)
    assert_close(found.exp().sum(0), torch.ones(12, 10, dtype=torch.float64), 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_images_of_low_precision_are_resized(dtype):
    model, exact = Positional(), multi_scale_logits(Positional(), IMAGES)
    found = multi_scale_logits(model, IMAGES.to(dtype))
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0.05)


def test_images_of_any_memory_layout_are_resized_to_any_width():
    images = torch.randn(1, 3, 8, 2, dtype=torch.float64)
    expected = multi_scale_logits(Positional(), images, scales=(0.5,))
    channels_last = images.contiguous(memory_format=torch.channels_last)
    assert_close(multi_scale_logits(Positional(), channels_last, scales=(0.5,)), expected, 1e-12)


def test_flips_make_it_symmetric():
    model = Positional().eval()
    images = torch.randn(1, 3, 9, 8, dtype=torch.float64)
    found = multi_scale_logits(model, images, 6, scales=(1.0, 1.5))
    assert_close(multi_scale_logits(model, images.flip(-1), 6, scales=(1.0, 1.5)), found.flip(-1), 1e-9)


def test_one_class_keeps_its_sigmoid():
    model = Positional(classes=1).eval()
    images = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    found = multi_scale_logits(model, images, 8, scales=(1.0,), flip=False)
    assert_close(found.sigmoid(), model(images).sigmoid().detach(), 1e-10)


IMAGES = torch.zeros(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("images", "options", "kind", "message"),
    [
        (IMAGES, {"window": 0}, ValueError, "window must be at least 1, got 0"),
        (IMAGES, {"window": (4, 4, 4)}, ValueError, "window must be an int or"),
        (IMAGES, {"window": 4, "stride": 5}, ValueError, r"stride must be at most the window \(4, 4\)"),
        (IMAGES, {"stride": 1.5}, TypeError, "stride"),
        (IMAGES, {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        (IMAGES[0], {}, ValueError, r"images must have shape \(B, C, height, width\)"),
        ([IMAGES], {}, ValueError, r"each of images must have shape \(C, height, width\)"),
        ([], {}, ValueError, "images must not be empty"),
        (IMAGES.byte(), {}, TypeError, "images must have a floating-point dtype"),
        ([IMAGES[0], IMAGES[0, :1]], {}, ValueError, "images must have one number of channels and one dtype"),
        ([IMAGES[0], IMAGES[0].double()], {}, ValueError, "of torch.float32 and .* of torch.float64"),
    ],
)
def test_bad_arguments_are_named(images, options, kind, message):
    with pytest.raises(kind, match=message):
        sliding_logits(Positional(), images, **options)


def test_bad_scales_and_models_are_named():
    for scales in ((), 0.5):
        with pytest.raises(ValueError, match="scales must be a sequence of numbers above 0"):
            multi_scale_logits(Positional(), IMAGES, scales=scales)
    with pytest.raises(ValueError, match="scales must be positive"):
        multi_scale_logits(Positional(), IMAGES, scales=(0.0,))
    with pytest.raises(
        ValueError, match=r"model must return \(B, K, height, width\) logits .* got \(1, 3, 2, 4\)"
    ):
        sliding_logits(nn.MaxPool2d((2, 1)), IMAGES)
