"""The page about one model: what it says, holds and writes."""

import math
import re

import pytest
import torch

import cbsa_torch
from cbsa_torch import interpret
from cbsa_torch.interpret.pages.report import best_epoch
from tests.helpers.pages import (
    CBSA_ONLY,
    EVALUATION,
    NOT_OF_A_VIT,
    ODD_NAMES,
    build,
    headings,
    maps_of,
    strict,
    vit,
)

FAMILIES = {"tost": {*CBSA_ONLY, "Step sizes"}, "vit": NOT_OF_A_VIT}
"""What a report leaves out; see test_measures.py for other families."""
SECTIONS = {
    "Reduced rates": "Contracting a few",
    "Rank of the extraction attention": "Rank of the extraction",
    "Step sizes": "Step sizes: which",
    "Coherence of the subspaces": "Coherence of the subspaces",
    "Sparsity": "Sparsity",
}


def test_everything_is_on_one_page_that_loads_nothing(full_report):
    files = full_report
    page = files.page.read_text()
    assert "&lt;cat&gt;" in page
    assert "<b>model</b>" not in page
    assert page.count("</script>") == page.count("<script") == 2  # a title ends no script
    assert "90.00 %" in page
    assert all(heading in page for heading in SECTIONS.values())
    assert "Left out" not in headings(page)
    assert "Best validation accuracy: 83.33 % in epoch 3" in page
    assert re.findall(r"""\b(?:src|href)=["'](?!data:|#)([^"']+)""", page) == []  # nothing outside the file
    assert "@import" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))  # figures share no ids, or one would take the other's clip paths
    assert {a or b for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)} <= set(ids)
    names = (
        "learning_curves coding_rate reduced_rates gap step_sizes compressing_heads ranks coherence sparsity "
        "robustness attention_maps receptive_fields"
    )
    expected = {f"{name}{suffix}" for name in names.split() for suffix in (".png", ".svg")}
    assert {path.name for path in files.figures} == expected
    assert all(path.stat().st_size > 1000 for path in files.figures)
    numbers = strict(files.numbers)
    assert numbers["coding_rate"]["layers"] == [f"blocks.{i}.attn" for i in range(3)]
    assert numbers["statements"]["together"].replace("'", "&#39;") in page
    assert numbers["robustness"]["clean"] in (0, 0.25, 0.5, 0.75, 1)
    assert numbers["robustness_metric"] == "accuracy"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_page_has_the_sections_that_there_are_and_reasons_for_the_others(family, reported):
    (model, files), missing = reported(family), FAMILIES[family]
    page = files.page.read_text()
    left_out = dict(re.findall(r"<li>(.*?): (.*?)\.</li>", page))
    assert set(left_out) == {*missing, "Learning curves"}
    assert left_out["Learning curves"] == "no history was given"
    shown = " ".join(headings(page))
    assert {name for name, heading in SECTIONS.items() if heading not in shown} == missing
    assert "Where the class token looks" in shown
    assert "Learning curves" not in shown
    assert page.count("the rates are of the queries.") == (family == "vit")
    assert page.count("TSSA compares no token with another") == (family == "tost")
    numbers = strict(files.numbers)
    assert numbers["robustness_metric"] == "share of predictions that stay the same"
    assert numbers["title"] == numbers["facts"]["model"] == type(model).__name__
    assert int(numbers["facts"]["parameters"].replace(",", "")) == sum(p.numel() for p in model.parameters())


def test_a_certified_model_leads_with_its_certificate(images, reported, tmp_path):
    files = interpret.report(build(step="certified"), images, tmp_path, robustness_images=0)
    page, numbers = files.page.read_text(), strict(files.numbers)
    assert headings(page)[0] == "Certificate"
    assert "In every head of every attention layer and for any input, the step cannot raise" in page
    assert "it holds in 16 of 16 cases" in page
    assert (numbers["certificate"]["holding"], numbers["certificate"]["cases"]) == (16, 16)
    assert (tmp_path / "figures" / "certificate.svg").stat().st_size > 1000
    _, free = reported("cbt")
    assert "ertificate" not in free.page.read_text()
    assert "cannot raise" not in free.page.read_text()
    assert strict(free.numbers)["certificate"] is None


def test_without_robustness_or_a_grid_the_page_says_so(images, tmp_path):
    layers = torch.nn.Sequential(cbsa_torch.CBSA(8, 2, representatives="learned", num_representatives=4))
    tokens = torch.randn(2, 7, 8)
    pictures = interpret.Pictures.of(images[:2])._replace(inputs=tokens)
    page = interpret.report(layers, tokens, tmp_path, pictures=pictures).page.read_text()
    assert "Attention maps of 0: its tokens have no grid." in page
    assert "Robustness: the model&#39;s output is not (images, classes)." in page
    assert '<div class="maps">' not in page


def test_pictures_may_be_others_than_what_is_measured(images, reported, tmp_path):
    model, plain = reported("vit")
    odd = interpret.Pictures.of(torch.randn(4, 1, 8, 8), ODD_NAMES)
    facts = {ODD_NAMES[1]: ODD_NAMES[2]}
    options = {"title": ODD_NAMES[0], "facts": facts, "pictures": odd, "robustness_images": 0}
    other = interpret.report(model, images, tmp_path, **options)
    assert strict(plain.numbers)["coding_rate"] == strict(other.numbers)["coding_rate"]
    titles = [[image["title"] for image in maps_of(files.page)[0]["images"]] for files in (plain, other)]
    assert titles == [["image 1", "image 2", "image 3", "image 4"], ODD_NAMES]
    page = other.page.read_text()
    assert "<b>" not in page
    assert ODD_NAMES[2] in page
    assert "Robustness: switched off." in page


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.randn(4, 2, 8, 8)}, r"images must be \(B, 1 or 3, height, width\) to be shown"),
        ({"pictures": interpret.Pictures.of(torch.ones(2, 1, 8, 8), ["a"])}, "2 inputs, 2 images and 1 titles"),
        ({"pictures": interpret.Pictures.of(torch.ones(0, 1, 8, 8))}, "at least one; got 0 inputs"),
        ({"labels": [1]}, "1 labels and 4 images"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"robustness_images": -1}, "robustness_images must be at least 0"),
        ({"robustness_images": 2.5}, "robustness_images must be an int"),
        ({"model": torch.nn.Flatten()}, "Flatten has no CBSA layer"),
    ],
)
def test_bad_arguments_are_named(images, tmp_path, changes, message):
    arguments = {"model": build(), "images": images, "folder": tmp_path, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        interpret.report(**arguments)


DIVERGED = [
    {"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "val_top1": 0.4},
    {"epoch": 2, "train_loss": math.nan, "val_loss": math.inf, "val_top1": math.nan},
    {"epoch": 3, "train_loss": None, "val_loss": None, "val_top1": None},
]


def test_a_history_that_diverged_is_drawn_and_valid_json(images, tmp_path):
    model = vit(class_token=False, global_pool="avg")
    files = interpret.report(model, images, tmp_path, history=DIVERGED, robustness_images=0)
    page = files.page.read_text()
    assert "40.00 % in epoch 1" in page
    gap = {"epoch": 2, "train_loss": None, "val_loss": None, "val_top1": None}
    assert gap in strict(files.numbers)["history"]
    assert "Where the first patch looks" in headings(page)
    assert "There is no class token" in page


def test_without_a_finite_score_no_epoch_is_the_best():
    assert best_epoch(DIVERGED, "val_top1") == (1, 0.4)
    assert best_epoch(DIVERGED[1:], "val_top1") is None


def test_a_score_of_any_name_is_shown_under_its_title(images, tmp_path):
    history = [{"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "val_f1": 0.25}]
    options = {"score": "val_f1", "score_title": "mean F1", "history": history, "evaluation": EVALUATION}
    page = interpret.report(vit(), images, tmp_path, robustness_images=0, **options).page.read_text()
    assert "mean F1 on the 10 images" in page
    assert "Best validation mean F1: 25.00 % in epoch 1" in page
