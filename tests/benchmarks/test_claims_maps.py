"""Maps against the classes of a made-up CamVid, with an adapted ViT of random weights."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
from benchmarks.claims import inside, street_maps
from benchmarks.claims.adapted import recovered
from benchmarks.claims.runs import Folders
from benchmarks.claims.vit import NAME

from cbsa_torch.models import adapt_vit

CLASSES = 3
LABELS = torch.full((36, 48), -1)
LABELS[:10], LABELS[10:30] = 0, 1  # the rest has no class, and class 2 is nowhere


def test_each_class_has_the_candidate_that_is_best_on_validation():
    val = torch.tensor([[[0.1, 0.9], [0.8, 0.2]], [[0.3, 0.5], [math.nan, math.nan]]])
    test = torch.tensor([[[0.7, 0.3], [0.5, 0.1]], [[math.nan, math.nan], [0.3, 0.9]]])
    scores, best, lines = street_maps.judged(val, test)
    assert [int(index) for index in best] == [1, 0]
    assert scores["iou"] == pytest.approx([0.3, 0.4])
    assert scores["mean_iou"] == pytest.approx(0.35)
    assert (scores["val_images"], scores["test_images"]) == (2, 2)
    assert lines.shape == (2, 2)
    found = {"val": val[..., None, None], "test": test[..., None, None]}  # two layers with a head each
    assert street_maps.mean_iou(found, [0, 1]) == pytest.approx(0.35)
    assert street_maps.mean_iou(found, [1]) == pytest.approx((0.3 + 0.5) / 2)


def test_a_map_of_a_class_finds_it():
    maps = torch.stack([(LABELS == 0).double(), torch.ones(36, 48, dtype=torch.float64)])
    found = street_maps.ious_of(maps, LABELS, CLASSES)  # (classes, maps, shares)
    assert found.shape == (3, 2, len(street_maps.SHARES))
    assert (found[0, 0] == 1).all()  # equal values are kept together
    assert (found[1, 0] == 0).all()
    assert found[0, 1, 0].item() == pytest.approx(1 / 3)  # pixels without a class do not count
    assert found[2].isnan().all()


@pytest.mark.parametrize("layers", [None, "latter_half"])
def test_maps_of_street_scenes(monkeypatch, layers):
    monkeypatch.setattr(street_maps, "SIZE", (56, 84))
    torch.manual_seed(0)
    model = timm.create_model(NAME, img_size=112, embed_dim=24, depth=2, num_heads=2, num_classes=5)
    if layers:
        model = adapt_vit(model, layers=layers, num_representatives=16).model
    model = street_maps.at_street_size(model)
    ious = street_maps.map_ious(model, torch.randn(3, 56, 84), LABELS, CLASSES)
    assert ious.shape == (CLASSES, 2, 2, len(street_maps.SHARES))
    assert ((ious[:2] >= 0) & (ious[:2] <= 1)).all()
    if layers:
        assert model.blocks[1].attn.representatives.num_representatives == (2, 3)


def test_images_and_masks_are_thinned_alike():
    images = [(torch.full((3, 4, 6), float(i)), torch.arange(24).view(4, 6)) for i in range(5)]
    splits = SimpleNamespace(parts=lambda: {"train": SimpleNamespace(images=images), "test": images})
    for split in ("train", "test"):
        some = list(street_maps.some_of(splits, split))
        assert [image[0, 0, 0].item() for image, _ in some] == [0, 2, 4]
        assert some[0][1].tolist() == [[0, 2, 4], [12, 14, 16]]


def test_each_seed_needs_its_recovered_vit():
    plan = {run.name: run for run in street_maps.runs(Folders())}
    assert plan["inside_street_hybrid_seed1"].needs == (recovered(street_maps.FORMS["hybrid"], 1),)
    assert plan["inside_street_hybrid_seed1"].needs == ("adapted_cbsa_latter_half_plain_112_seed1",)
    assert plan["inside_street_hybrid_untrained"].needs == ()


def test_heads_for_outlines_are_chosen_on_validation(monkeypatch):
    found = {
        "val": {"foreground": [[0.1, 0.6], [0.5, 0.2]]},
        "test": {"foreground": [[0.9, 0.3], [0.4, 0.8]]},
    }
    monkeypatch.setattr(inside, "emoji_pairs", lambda _, root, split: split)
    monkeypatch.setattr(
        inside.interpret,
        "zero_shot_iou",
        lambda model, split: SimpleNamespace(per_head=found[split], images=3, best={}, heads={}),
    )
    chosen = inside.zero_shot(SimpleNamespace(model=None), None)["chosen"]
    assert chosen == {"foreground": {"layer": 0, "head": 1, "iou": 0.3}}
