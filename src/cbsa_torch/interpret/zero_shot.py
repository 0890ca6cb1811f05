"""Zero-shot segmentation (the paper's Tables 5 and 6): attention maps, thresholded, against object masks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cbsa_torch._core.checks import check_bool, check_choice, check_floating, check_mask, check_positive_int
from cbsa_torch.interpret.attention_maps import cls_attention_maps, upsample_maps
from cbsa_torch.interpret.capture import capture
from cbsa_torch.interpret.foreground import SegmentedImage

REGIONS = ("foreground", "background", "boundary")
Rule = Literal["mass", "range"]
RULES: tuple[str, ...] = get_args(Rule)

DINO_SHARE = 0.6
"""The share of the attention mass that DINO (Caron et al., 2021) keeps."""

BOUNDARY_SHARE = 0.02
"""Half the width of the boundary band over the mask's diagonal, as in Boundary IoU (Cheng et al., 2021)."""

_EQUAL = 1e-6
"""Values that differ by no more than this, relatively, are equal: maps are rounded to float32."""


class ZeroShot(NamedTuple):
    """IoU of attention maps with regions of the masks; outer lists run over layers, dicts over regions.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import zero_shot_iou
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> pairs = [(torch.randn(1, 8, 8), torch.eye(8, dtype=torch.bool))]
        >>> found = zero_shot_iou(model, pairs, thresholds=[0.4, 0.6])
        >>> found.regions, found.thresholds["foreground"][0] in (0.4, 0.6)
        (['foreground', 'background', 'boundary'], True)
    """

    layers: list[str]
    regions: list[str]
    best: dict[str, list[float]]
    """IoU of the best head, at its best threshold: one for the data set, chosen by the mean over images."""
    heads: dict[str, list[int]]
    """That head."""
    thresholds: dict[str, list[float]]
    """Its threshold."""
    per_head: dict[str, list[list[float]]]
    """``[layer][head]``: the mean over images at the head's best threshold."""
    best_per_image: dict[str, list[float]]
    """Mean over images of the best IoU of each image, head and threshold chosen anew: an upper bound."""
    images: int
    """How many were measured."""
    images_with: dict[str, int]
    """Images that have the region at all; the others are left out of its means."""


@torch.no_grad()
def zero_shot_iou(
    model: nn.Module,
    pairs: Iterable[tuple[Tensor, ...]],
    *,
    layers: Sequence[str | int] | None = None,
    token: int = 0,
    rule: Rule = "mass",
    thresholds: Sequence[float] = (DINO_SHARE,),
    regions: Sequence[str] = REGIONS,
    boundary_width: int | None = None,
    resized: bool = False,
    batch_size: int = 16,
) -> ZeroShot:
    """Measure how well single attention heads segment objects, without any training to do so.

    Each head's map of ``token`` (:func:`cls_attention_maps`) is upsampled linearly to the mask's size, and the
    pixels above a threshold are compared with each region by intersection over union. For each layer and
    region the best head counts. The default is one fixed threshold, DINO's: the pixels of largest attention
    that hold 60 % of the map's mass. With several ``thresholds``, each head takes its best for the data set.
    The paper does not state its protocol: compare only figures that were measured with the same options.

    Negative entries (only LinearCBSA, TSSA's channel form and representatives by directions have them) count
    as none, and pixels without any attention are never kept. Void pixels are treated as if they were not there.

    Args:
        model: a model with attention layers on a 2-D grid; it is run as it is (call ``.eval()`` first).
        pairs: ``(image, mask)`` or ``(image, mask, valid)``: the image ``(C, height, width)`` as the model
            wants it; the mask ``(height, width)`` bool, True = foreground; valid like the mask, False = void.
        layers: which layers, as for :func:`capture`. Default: all.
        token: whose map, as for :func:`cls_attention_maps`. Default: the class token.
        rule: ``"mass"``: keep the fewest pixels that hold the share ``threshold`` of the map's sum (equal
            values are kept together); ``"range"``: keep the pixels at or above ``threshold``, between the
            map's least value, 0, and its largest, 1.
        thresholds: one or more, in (0, 1].
        regions: of ``"foreground"`` (the mask), ``"background"`` (the rest), ``"boundary"`` (pixels within
            ``boundary_width`` of a pixel on the other side of the mask's edge, rows and columns counted; the
            image's border is no edge).
        boundary_width: in pixels. Default: 2 % of the mask's diagonal, at least 1.
        resized: images may have another size than their masks, as the same picture at another size.
        batch_size: at most so many images in a forward pass, which takes images of one size in succession.

    Raises:
        ValueError: values or sizes that do not fit, no pairs, a region that no mask has, maps with NaN.
        TypeError: wrong types.

    Examples:
        >>> import timm
        >>> from cbsa_torch.interpret import zero_shot_iou
        >>> model = timm.create_model("cbt_pico_patch1_8", depth=1).eval()
        >>> mask = torch.zeros(8, 8, dtype=torch.bool)
        >>> mask[2:5, 2:5] = True
        >>> found = zero_shot_iou(model, [(torch.randn(1, 8, 8), mask)], regions=["foreground"])
        >>> len(found.best["foreground"]), found.images
        (1, 1)
    """
    check_choice("rule", rule, RULES)
    check_bool("resized", resized)
    check_positive_int("batch_size", batch_size)
    if boundary_width is not None:
        check_positive_int("boundary_width", boundary_width)
    if isinstance(regions, str) or not regions:
        raise ValueError(f"regions must be some of {', '.join(REGIONS)}, got {regions!r}")
    for region in regions:
        check_choice("regions", region, REGIONS)
    levels = [float(threshold) for threshold in thresholds]
    if not levels or not all(0 < level <= 1 for level in levels):
        raise ValueError(f"thresholds must be one or more numbers in (0, 1], got {list(thresholds)}")

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    scores: dict[str, list[Tensor]] = {}  # per layer, per image: (regions, H, thresholds)
    for batch in _batches(pairs, batch_size, resized):
        with capture(model, layers) as records:
            model(torch.stack([pair.image for pair in batch]).to(device))
        for name, record in records.items():
            maps = cls_attention_maps(record, token).cpu()  # (B, H, rows, columns)
            if maps.ndim != 4:
                raise ValueError(f"{name} has a grid {record.grid_size}, which is not that of an image")
            if not maps.isfinite().all():
                raise ValueError(f"the maps of {name} hold NaN or infinite values")
            for pair, of_image in zip(batch, maps, strict=True):
                truths = torch.stack(
                    [_region(region, pair.mask, pair.valid, boundary_width) for region in regions]
                )
                hot = threshold_maps(upsample_maps(of_image, tuple(pair.mask.shape)), pair.valid, rule, levels)
                scores.setdefault(name, []).append(region_iou(hot, truths, pair.valid))
        records.clear()  # before the next batch is recorded
    if not scores:
        raise ValueError("pairs must hold at least one image with its mask")
    return _summarise({name: torch.stack(values) for name, values in scores.items()}, list(regions), levels)


def _summarise(scores: dict[str, Tensor], regions: list[str], levels: list[float]) -> ZeroShot:
    """From IoUs ``(images, regions, H, thresholds)`` per layer; NaN where an image lacks a region."""
    some = next(iter(scores.values()))
    result = ZeroShot(list(scores), regions, {}, {}, {}, {}, {}, len(some), {})
    for index, region in enumerate(regions):
        having = ~some[:, index, 0, 0].isnan()
        if not having.any():
            raise ValueError(f"no mask has any {region}; leave it out of regions")
        result.images_with[region] = int(having.sum())
        values = [score[having, index] for score in scores.values()]  # (images, H, thresholds)
        means = [value.mean(0) for value in values]
        flat = [int(mean.argmax()) for mean in means]
        result.best[region] = [mean.max().item() for mean in means]
        result.heads[region] = [place // len(levels) for place in flat]
        result.thresholds[region] = [levels[place % len(levels)] for place in flat]
        result.per_head[region] = [mean.amax(-1).tolist() for mean in means]
        result.best_per_image[region] = [value.flatten(1).amax(-1).mean().item() for value in values]
    return result


def _batches(
    pairs: Iterable[tuple[Tensor, ...]], batch_size: int, resized: bool
) -> Iterator[list[SegmentedImage]]:
    batch: list[SegmentedImage] = []
    for index, given in enumerate(pairs):
        pair = _read(given, f"pairs[{index}]", resized)
        if batch and (len(batch) == batch_size or batch[0].image.shape != pair.image.shape):
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch


def _read(given: Any, name: str, resized: bool) -> SegmentedImage:
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        raise TypeError(f"{name} must be (image, mask) or (image, mask, valid), got {type(given).__name__}")
    pair = SegmentedImage(*given)
    check_floating(f"{name}: image", pair.image)
    if pair.image.ndim != 3 or 0 in pair.image.shape:
        raise ValueError(f"{name}: image must be (C, height, width), got shape {tuple(pair.image.shape)}")
    size = tuple(pair.image.shape[1:])
    check_mask(f"{name}: mask", pair.mask, (None, None), "(height, width)", "foreground")
    if tuple(pair.mask.shape) != size and not resized:
        raise ValueError(
            f"{name}: mask must have the image's size {size}, got {tuple(pair.mask.shape)}; "
            "pass resized=True if the image is the mask's, whole, at another size"
        )
    if pair.valid is not None:
        check_mask(f"{name}: valid", pair.valid, pair.mask.shape, "(height, width)", "not void")
    return SegmentedImage(pair.image, pair.mask.cpu(), None if pair.valid is None else pair.valid.cpu())


def _region(region: str, mask: Tensor, valid: Tensor | None, boundary_width: int | None) -> Tensor:
    """A boundary is where both sides are near; what is void is on neither."""
    if region != "boundary":
        return mask if region == "foreground" else ~mask
    width = boundary_width or max(1, round(BOUNDARY_SHARE * math.hypot(*mask.shape)))
    seen = torch.ones_like(mask) if valid is None else valid
    return _near(mask & seen, width) & _near(~mask & seen, width)


def _near(mask: Tensor, width: int) -> Tensor:
    """Pixels within ``width`` rows and columns of one in ``mask``."""
    tall = F.max_pool2d(mask[None].float(), (2 * width + 1, 1), 1, (width, 0))
    return F.max_pool2d(tall, (1, 2 * width + 1), 1, (0, width))[0] > 0


def threshold_maps(maps: Tensor, valid: Tensor | None, rule: str, levels: Sequence[float]) -> Tensor:
    """``(H, thresholds, pixels)`` bool from maps ``(H, height, width)``, as in :func:`zero_shot_iou`."""
    flat = maps.double().flatten(1).clamp(min=0)  # (H, pixels)
    seen = flat if valid is None else flat[:, valid.flatten()]
    share = torch.tensor(levels, dtype=flat.dtype)
    if seen.shape[1] == 0:  # all void
        return torch.zeros(len(flat), len(levels), flat.shape[1], dtype=torch.bool)
    if rule == "mass":
        ordered = seen.sort(-1, descending=True).values
        mass = ordered.cumsum(-1)
        # The first place where the mass reaches the share; rounding must not push it one further.
        wanted = share * mass[:, -1:] * (1 - 1e-12)  # (H, thresholds)
        least = ordered.gather(-1, torch.searchsorted(mass, wanted))
    else:
        low, high = seen.amin(-1, keepdim=True), seen.amax(-1, keepdim=True)
        least = low + share * (high - low)
    least = least * (1 - _EQUAL)
    return (flat[:, None] >= least[..., None]) & (flat > 0)[:, None]


def region_iou(hot: Tensor, truths: Tensor, valid: Tensor | None) -> Tensor:
    """``(regions, H, thresholds)`` of what :func:`threshold_maps` gives; NaN for a region that is empty."""
    truth = truths.flatten(1)
    if valid is not None:
        keep = valid.flatten()
        truth, hot = truth[:, keep], hot[..., keep]
    inside = torch.einsum("rp,htp->rht", truth.float(), hot.float())
    size = truth.sum(-1)[:, None, None]
    union = size + hot.sum(-1) - inside
    return torch.where(size > 0, inside / union, math.nan)
