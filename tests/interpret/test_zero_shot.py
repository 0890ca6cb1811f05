import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import cbsa_torch.models  # noqa: F401
from cbsa_torch import interpret
from cbsa_torch.interpret.zero_shot import _region
from cbsa_torch.nn import MSSA


class Painted(nn.Module):
    """A model whose maps are its input: head h of the layer has channel h of the image as its map.

    The class token's logits are the logarithm of the image, through the identity as the projection.
    """

    def __init__(self, channels):
        super().__init__()
        self.attn = MSSA(2 * channels, channels, num_prefix_tokens=1)
        with torch.no_grad():
            self.attn.qkv.weight.copy_(torch.eye(2 * channels))

    def forward(self, images):
        b, c, *grid = images.shape
        cells = images.double().clamp(min=1e-300).log().flatten(2) * math.sqrt(2)
        tokens = torch.zeros(b, 1 + cells.shape[-1], c, 2).double()
        tokens[:, 0, :, 0] = 1
        tokens[:, 1:, :, 0] = cells.mT
        # The class token's own logit is moderate: its share of the softmax lies outside the map.
        return self.attn(tokens.flatten(2), tuple(grid))


@pytest.fixture
def painted():
    return Painted(2).double()


FOUR = torch.zeros(4, 4, dtype=torch.bool)
FOUR[:2, :2] = True


def pair():
    """Head 0: .5, .2, .1 on the object, .2 beside it; head 1: all on the last row."""
    first = [[0.5, 0.2, 0.2, 0.0], [0.1, 0.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4]
    second = [[0.0] * 4, [0.0] * 4, [0.0] * 4, [0.25] * 4]
    return torch.tensor([first, second]).double(), FOUR


def test_iou_by_hand(painted):
    """60 % of the mass: .5 + .2, and the other .2, which is equal. 2 of these 3 are in the object of 4."""
    pairs = [interpret.SegmentedImage(*pair())]  # as read_pairs yields them
    found = interpret.zero_shot_iou(painted, pairs, boundary_width=1)
    assert (found.layers, found.regions) == (["attn"], ["foreground", "background", "boundary"])
    assert found.best["foreground"] == [pytest.approx(2 / 5)]
    assert found.heads["foreground"] == [0]
    assert found.per_head["foreground"][0] == [pytest.approx(2 / 5), 0.0]
    # Background: 12 pixels; head 0 has one of them (union 14), head 1 four (union 12).
    assert found.per_head["background"][0] == pytest.approx([1 / 14, 4 / 12])
    assert found.heads["background"] == [1]
    # Boundary: within a pixel of the edge: 3 of the object (not its corner) and 5 around it.
    assert found.per_head["boundary"][0] == pytest.approx([2 / 9, 0])
    assert found.thresholds["foreground"] == [0.6]
    assert (found.images, found.images_with["boundary"]) == (1, 1)


@pytest.mark.parametrize(
    ("rule", "threshold", "expected"),
    [
        *(("mass", share, iou) for share, iou in ((0.5, 1 / 4), (0.51, 2 / 5), (0.9, 2 / 5), (1.0, 3 / 5))),
        *(("range", share, iou) for share, iou in ((1.0, 1 / 4), (0.4, 2 / 5), (0.2, 3 / 5), (0.01, 3 / 5))),
    ],
)
def test_shares_of_mass_and_range(painted, rule, threshold, expected):
    options = {"rule": rule, "thresholds": [threshold - 1e-6], "regions": ["foreground"]}
    found = interpret.zero_shot_iou(painted, [pair()], **options)
    assert found.per_head["foreground"][0][0] == pytest.approx(expected)


def test_several_thresholds_take_the_best(painted):
    found = interpret.zero_shot_iou(painted, [pair()], thresholds=(0.4, 0.999999), regions=["foreground"])
    assert found.best["foreground"] == [pytest.approx(3 / 5)]
    assert found.thresholds["foreground"] == [0.999999]


def test_the_head_is_chosen_for_the_data_set(painted):
    """Head 0 is right on two images and wrong on one, head 1 the other way round."""
    on, off = FOUR.double(), (~FOUR).double()
    pairs = [(torch.stack(maps), FOUR) for maps in ((on, off), (on, off), (off, on))]
    found = interpret.zero_shot_iou(painted, pairs, thresholds=[1.0], regions=["foreground"], batch_size=2)
    assert found.heads["foreground"] == [0]
    assert found.best["foreground"] == [pytest.approx(2 / 3)]
    assert found.best_per_image["foreground"] == [pytest.approx(1)]


def test_void_is_not_there(painted):
    image, mask = pair()
    valid = torch.ones(4, 4, dtype=torch.bool)
    valid[0, 0] = valid[1, 1] = valid[3] = False  # .5 of head 0, and all of head 1
    found = interpret.zero_shot_iou(painted, [(image, mask, valid)], regions=["foreground", "background"])
    # Left to head 0: .2, .2, .1; 60 % of .5 are the two .2, one of them on the object, of which 2 are left.
    assert found.per_head["foreground"][0][0] == pytest.approx(1 / 3)
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="no mask has any foreground"):
        interpret.zero_shot_iou(painted, [(image, mask, nothing)])


def test_images_without_a_region_are_left_out(painted):
    image, mask = pair()
    empty = torch.zeros(4, 4, dtype=torch.bool)
    found = interpret.zero_shot_iou(painted, [(image, mask), (image, empty)], boundary_width=1)
    assert (found.images, found.images_with) == (2, {"foreground": 1, "background": 2, "boundary": 1})
    assert found.best["foreground"] == [pytest.approx(2 / 5)]
    with pytest.raises(ValueError, match="no mask has any foreground; leave it out of regions"):
        interpret.zero_shot_iou(painted, [(image, empty)])
    assert interpret.zero_shot_iou(painted, [(image, empty)], regions=["background"]).images == 1


def test_masks_of_another_size_are_asked_for(painted):
    """A map laid over a mask of twice the size, linearly: 60 % lie inside the object."""
    mask = FOUR.repeat_interleave(2, 0).repeat_interleave(2, 1)
    image = torch.stack([FOUR.double(), (~FOUR).double()])
    with pytest.raises(ValueError, match=r"pairs\[0\]: mask must have the image's size \(4, 4\), got \(8, 8\)"):
        interpret.zero_shot_iou(painted, [(image, mask)])
    found = interpret.zero_shot_iou(painted, [(image, mask)], resized=True, regions=["foreground"])
    up = interpret.upsample_maps(FOUR.double(), (8, 8)).flatten().sort(descending=True).values
    least = up[int((up.cumsum(0) < 0.6 * up.sum() - 1e-9).sum())]
    hot = interpret.upsample_maps(FOUR.double(), (8, 8)) >= least - 1e-9
    expected = (hot & mask).sum() / (hot | mask).sum()
    assert found.per_head["foreground"][0][0] == pytest.approx(expected.item())


def test_the_boundary_is_a_band_on_both_sides(painted):
    """Checked pixel by pixel against distances, for the default width and others."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(13, 17, generator=generator) > 0.8
    here = torch.stack(torch.meshgrid(torch.arange(13), torch.arange(17), indexing="ij"), -1).flatten(0, 1)
    distance = (here[:, None] - here[None]).abs().amax(-1)
    for width in (1, 2, 5):
        other = mask.flatten()[:, None] != mask.flatten()[None]
        expected = (other & (distance <= width)).any(-1).view(13, 17)
        assert torch.equal(_region("boundary", mask, None, width), expected)
    wide = torch.zeros(300, 400, dtype=torch.bool)
    wide[:, :200] = True  # diagonal 500: a band of 10 on either side, all the way to the image's border
    band = _region("boundary", wide, None, None)
    assert band.all(0).nonzero().flatten().tolist() == list(range(190, 210))
    assert band.any(0).sum() == 20
    valid = torch.ones_like(wide)
    valid[:, 200:] = False  # the whole background is void, and void is on neither side
    assert not _region("boundary", wide, valid, None).any()


@pytest.mark.parametrize("kind", ["cbt", "tost", "vit"])
def test_real_models_whatever_the_batches(kind):
    if kind == "vit":
        model = VisionTransformer(img_size=8, patch_size=2, in_chans=1, embed_dim=12, num_heads=3, depth=2)
    else:
        model = timm.create_model(f"{kind}_pico_patch1_8", embed_dim=16, depth=2, num_heads=2)
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(1, 8, 8, generator=generator), torch.rand(8, 8, generator=generator) > 0.5)] * 2
    pairs += [(torch.randn(1, 8, 8, generator=generator), FOUR.repeat(2, 2)) for _ in range(3)]
    options = {"thresholds": (0.3, 0.6, 0.9)}
    one = interpret.zero_shot_iou(model.eval(), pairs, batch_size=1, **options)
    three = interpret.zero_shot_iou(model, iter(pairs), batch_size=3, **options)
    assert one.images == three.images == 5
    for region in one.regions:
        assert one.best[region] == pytest.approx(three.best[region], abs=1e-4)
        for best, per_image, heads in zip(
            one.best[region], one.best_per_image[region], one.per_head[region], strict=True
        ):
            assert 0 <= best <= per_image <= 1
            assert best == max(heads)
    last = interpret.zero_shot_iou(model, pairs, layers=[-1], **options)
    assert last.layers == one.layers[-1:]
    assert last.best["foreground"] == pytest.approx(one.best["foreground"][-1:], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"pairs": []}, ValueError, "pairs must hold at least one"),
        ({"pairs": [torch.ones(2, 4, 4)]}, TypeError, r"pairs\[0\] must be \(image, mask\)"),
        ({"pairs": [(torch.ones(4, 4), FOUR)]}, ValueError, r"image must be \(C, height, width\)"),
        ({"pairs": [(torch.ones(2, 4, 4), FOUR.long())]}, TypeError, "mask must have dtype torch.bool"),
        ({"pairs": [(torch.ones(2, 4, 4), FOUR[0])]}, ValueError, "mask must have shape"),
        ({"pairs": [(torch.ones(2, 4, 4), FOUR, FOUR[:2])]}, ValueError, "valid must have shape"),
        ({"pairs": [(torch.full((2, 4, 4), torch.nan), FOUR)]}, ValueError, "maps of attn hold NaN"),
        ({"rule": "otsu"}, ValueError, "rule must be one of 'mass', 'range'"),
        ({"thresholds": ()}, ValueError, "thresholds must be one or more"),
        ({"thresholds": (0.0,)}, ValueError, r"in \(0, 1\], got \[0.0\]"),
        ({"regions": ("forground",)}, ValueError, "did you mean 'foreground'"),
        ({"regions": "foreground"}, ValueError, "regions must be some of"),
        ({"boundary_width": 0}, ValueError, "boundary_width must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"layers": [1]}, IndexError, "no attention layer 1"),
        ({"token": 17}, IndexError, "one of 17 tokens"),
    ],
)
def test_bad_arguments_are_named(painted, change, kind, message):
    pairs = change.pop("pairs", [pair()])
    with pytest.raises(kind, match=message):
        interpret.zero_shot_iou(painted, pairs, **change)
