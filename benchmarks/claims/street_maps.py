"""Block 4, street scenes: class-token maps of the adapted ViTs against CamVid's classes (Tables 5 and 6).

The ViTs are those of the block ``adapted``: the original, CBSA* in all layers, and the hybrid, whose first half
of the layers keeps softmax attention. Nothing is trained for the maps. Of each class the head (of any layer)
and the share of the attention mass that is kept are those of best IoU on validation images; figures are of
test images: means over the images that have the class, and the mean of these over classes. Beside them a map
that ignores the image: how often each place has the class in training masks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.adapted import ORIGINAL, SEEDS, Recovery, open_recovered, open_untrained, recovered
from benchmarks.claims.decoders import PATCH, SIZE, open_images
from benchmarks.claims.runs import Folders, Measured, Run
from cbsa_torch import interpret
from cbsa_torch.interpret.capture import capture
from cbsa_torch.interpret.zero_shot import region_iou, threshold_maps
from cbsa_torch.models.resize import set_image_size
from cbsa_torch.nn.representatives import PooledRepresentatives
from cbsa_torch.train.data import Splits

FORMS = {
    "original": Recovery(ORIGINAL),
    "hybrid": Recovery("cbsa", "latter_half"),
    "cbsa": Recovery("cbsa"),
}
PLACES = "inside_street_places"
"""The run of the map that ignores the image."""
SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)
"""Of the attention mass, that the pixels of a mask may hold."""
EVERY = 2
"""Of the images of a split, and of the rows and columns of a mask, every second one is looked at."""
MINUTES = 4.0


def runs(folders: Folders) -> list[Run]:
    """The map that ignores the image, the ViTs as they were adapted, and after recovery with each seed."""
    return [
        Run(PLACES, 1, partial(measure_places, folders)),
        *(
            Run(f"inside_street_{form}_untrained", MINUTES, partial(measure_form, folders, form))
            for form in FORMS
        ),
        *(
            Run(
                f"inside_street_{form}_seed{seed}",
                MINUTES,
                partial(measure_form, folders, form, seed),
                seed,
                needs=(recovered(FORMS[form], seed),),
            )
            for seed in SEEDS
            for form in FORMS
        ),
    ]


def measure_form(folders: Folders, form: str, seed: int | None = None) -> Measured:
    """The maps of a ViT, trained with a seed or as it was adapted."""
    what = FORMS[form]
    opened = open_untrained(folders, what) if seed is None else open_recovered(folders, what, seed)
    model = at_street_size(opened.model)
    splits = open_images(folders)
    classes = len(splits.class_names)
    found = {
        split: torch.stack([map_ious(model, *pair, classes) for pair in some_of(splits, split)])
        for split in ("val", "test")
    }  # (images, classes, layers, heads, shares)
    heads = found["val"].shape[2:]
    values: dict[str, Any] = {"form": form, "recovery": "plain" if seed is not None else "untrained"}
    values["mean_iou_of_layers"] = [mean_iou(found, [layer]) for layer in range(heads[0])]
    values["mean_iou_latter_half"] = mean_iou(found, range(heads[0] // 2, heads[0]))
    scores, best, lines = judged(*(found[split].flatten(2) for split in ("val", "test")))
    chosen = [[int(place) for place in torch.unravel_index(index, heads)] for index in best]
    values["chosen"] = [[layer, head, SHARES[share]] for layer, head, share in chosen]
    name = f"inside_street_{form}_" + ("untrained" if seed is None else f"seed{seed}")
    return recorded(folders, name, splits, {**values, **scores}, lines)


def mean_iou(found: dict[str, Tensor], layers: Sequence[int]) -> float:
    """That of test images, if heads are chosen from these layers alone."""
    scores, _, _ = judged(*(found[split][:, :, list(layers)].flatten(2) for split in ("val", "test")))
    return float(scores["mean_iou"])


def measure_places(folders: Folders) -> Measured:
    """The same of how often each place has the class in training masks."""
    splits = open_images(folders)
    classes = len(splits.class_names)
    masks = torch.stack([labels for _, labels in some_of(splits, "train")])
    often = torch.stack([(masks == label).double().mean(0) for label in range(classes)])
    found = {}
    for split in ("val", "test"):
        ious = [ious_of(often, labels, classes) for _, labels in some_of(splits, split)]
        found[split] = torch.stack(ious).diagonal(dim1=1, dim2=2).mT  # (images, classes, shares)
    scores, best, lines = judged(found["val"], found["test"])
    return recorded(folders, PLACES, splits, {"shares": [SHARES[i] for i in best], **scores}, lines)


def at_street_size(model: Any) -> Any:
    """The model for images of this size, with one representative for four patches, as it was trained."""
    set_image_size(model, SIZE)
    for module in model.modules():
        if isinstance(module, PooledRepresentatives):
            module.num_representatives = (SIZE[0] // PATCH // 2, SIZE[1] // PATCH // 2)
    return model.eval()


def some_of(splits: Splits, split: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Every second image of a split, without mirror images, and every second row and column of its labels."""
    part: Any = splits.parts()[split]
    dataset = part.images if split == "train" else part
    for index in range(0, len(dataset), EVERY):
        image, labels = dataset[index]
        yield image, labels[::EVERY, ::EVERY]


@torch.no_grad()
def map_ious(model: Any, image: Tensor, labels: Tensor, classes: int) -> Tensor:
    """IoU of each map with each class, ``(classes, layers, heads, shares)``; NaN of classes that are absent."""
    with capture(model) as records:
        model(image[None])
    maps = torch.cat([interpret.cls_attention_maps(record) for record in records.values()])
    found = ious_of(interpret.upsample_maps(maps.flatten(0, 1), tuple(labels.shape)), labels, classes)
    return found.unflatten(1, maps.shape[:2])


def ious_of(maps: Tensor, labels: Tensor, classes: int) -> Tensor:
    """``(classes, maps, shares)`` of maps ``(maps, height, width)``; pixels without a class do not count."""
    truths = torch.stack([labels == label for label in range(classes)])
    valid = labels >= 0
    return region_iou(threshold_maps(maps, valid, "mass", SHARES), truths, valid)


def judged(val: Tensor, test: Tensor) -> tuple[dict[str, Any], list[Tensor], Tensor]:
    """IoU on test images of what is best on validation images, of each class.

    Args:
        val, test: ``(images, classes, candidates)``, NaN where an image lacks the class.

    Returns:
        The scores; of each class the index of its candidate; its IoU for each test image.
    """
    best = val.nanmean(0).nan_to_num(-1).argmax(-1)  # (classes,)
    chosen = test.gather(2, best[None, :, None].expand(len(test), -1, 1))[..., 0]  # (images, classes)
    of_class = chosen.nanmean(0)
    scores = {
        "iou": of_class.tolist(),
        "mean_iou": of_class.nanmean().item(),
        "val_images": len(val),
        "test_images": len(test),
    }
    return scores, list(best), chosen


def recorded(folders: Folders, name: str, splits: Splits, values: dict[str, Any], lines: Tensor) -> Measured:
    """The record, and a log of the IoU of every test image."""
    log = folders.runs / f"{name}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines.tolist()))
    return Measured({"size": SIZE, "class_names": splits.class_names, **values}, log)
