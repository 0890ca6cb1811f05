"""Pages of the model families: one for each, in the menu, and the numbers on them are those of code and records."""

import json

import pytest
import yaml
from scripts import family_pages

from cbsa_torch.models.registry import FAMILIES
from cbsa_torch.models.shipped import SHIPPED
from tests.helpers.doc_pages import ROOT

FOLDER = ROOT / "docs/reference/families"


def test_every_family_has_a_page_and_a_place_in_the_menu():
    pages = {path.stem for path in FOLDER.glob("*.md")}
    assert pages == {*FAMILIES, "index", "token_set"}
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"reference/families/{page}.md" in menu for page in pages)


def cells(page, first):
    """The row of a generated table that begins with a cell."""
    line = next(line for line in page.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("family", "model", "counts"),
    [
        # parameters and GFLOPs of the paper's Table 3; similarities: of its Table 4, and 12 layers x heads x 197²
        ("cbt", "cbt_small_patch16_224", (6.7e6, 4.03, 1.1e6)),
        ("crate_original", "crate_original_base_patch16_224", (22.8e6, 12.8, 5.6e6)),
    ],
)
def test_counts_are_those_of_the_paper(family, model, counts, monkeypatch):
    name, spec = next(
        (size, spec)
        for size, spec in family_pages.sizes_of(family).items()
        if family_pages.model_name(family, size) == model
    )
    monkeypatch.setattr(family_pages, "sizes_of", lambda _: {name: spec})
    monkeypatch.setattr(family_pages, "model_name", lambda *_: model)
    row = cells(family_pages.sizes(family), f"`{model}`")
    found = [float(cell.replace(",", "")) for cell in row[3:]]
    assert (found[0], found[1], found[3]) == pytest.approx(counts, rel=0.04)
    assert found[2] < found[1]  # fused


def test_speed_is_that_of_the_records():
    page = family_pages.speed("cbt")
    rows = json.loads((ROOT / "benchmarks/results/models.json").read_text())["rows"]
    first = next(row for row in rows if row["name"] == "cbt_small_patch16_224 fused")
    column = cells(page, "").index("`cbt_small_patch16_224 fused`")
    size = f"{first['batch']} x {first['image_size']}²"
    assert cells(page, size)[column] == f"{first['images_per_second']:.3g}"
    assert "| 13,782 / 3,640 |" in page
    assert "not been timed" in family_pages.speed("linear_cbt")


def test_weights_of_the_package_are_on_their_page_alone():
    (name,) = SHIPPED
    record = json.loads((SHIPPED[name].folder / "eval_test.json").read_text())
    row = cells(family_pages.weights("cbt"), f"`{name}`")
    assert row[-1] == f"{100 * record['top1']:.2f} % of 360"
    assert family_pages.weights("tost") == ""


def test_options_are_those_of_the_layer_with_the_defaults_of_the_family():
    assert cells(family_pages.options(FAMILIES["agent"]), "`qkv`")[1] == "`'shared'`"
    assert cells(family_pages.options(FAMILIES["cbt"]), "`step`")[1:] == ["`'free'`", "`CBSA`"]
    assert "`qk_norm`" not in family_pages.options(FAMILIES["tost"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_paper_behind_a_family_is_cited(family):
    papers = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    titles = {entry["title"] for entry in [papers["preferred-citation"], *papers["references"]]}
    entry = " ".join(family_pages.citation(FAMILIES[family].paper).split())
    assert sum(f"title = {{{title}}}" in entry for title in titles) == 1
    assert f"arXiv:{FAMILIES[family].paper}" in entry
