"""The page about one model and the page about several: what they say, hold and write."""

import base64
import json
import math
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import cbsa_torch
from cbsa_torch import interpret
from cbsa_torch.interpret import figures
from cbsa_torch.interpret.report import maps, measure, page
from tests.helpers.pages import BLACK_BOX, CBSA_ONLY, ODD, build, compared, headings, strict, vit

FAMILIES = {
    "cbt": set(),
    "crate_cbt": set(),
    "crate": {*CBSA_ONLY, "Step sizes"},
    "tost": {*CBSA_ONLY, "Step sizes"},
    "agent": {*CBSA_ONLY, "Step sizes"},
    "linear_cbt": CBSA_ONLY,
    "stem_vit": BLACK_BOX,
}
SECTIONS = {
    "Reduced rates": "Contracting a few",
    "Rank of the extraction attention": "Rank of the extraction",
    "Step sizes": "Step sizes: which",
    "Coherence of the subspaces": "Coherence of the subspaces",
    "Sparsity": "Sparsity",
}


@pytest.fixture
def inputs():
    return torch.randn(4, 1, 8, 8)


@pytest.fixture
def images():
    return np.random.default_rng(0).random((4, 8, 8))


def test_everything_is_on_one_page_that_loads_nothing(inputs, images, tmp_path):
    history = [{"epoch": e, "train_loss": 1 / e, "val_loss": 1 / e, "val_top1": 1 - 0.5 / e} for e in (1, 2, 3)]
    evaluation = {
        "top1": 0.9,
        "loss": 0.3,
        "images": 10,
        "confusion": [[5, 0], [1, 4]],
        "class_names": ["<cat>", "dog"],
        "split": "test",
    }
    files = interpret.report(
        build(),
        inputs,
        images,
        tmp_path,
        title="A <b>model</b>",
        facts={"data": "5 & more"},
        history=history,
        evaluation=evaluation,
        image_titles=["</script>", "b", "c", "d"],
        labels=[0, 1, 2, 0],
        shown=2,
    )
    page = files.page.read_text()
    assert "&lt;cat&gt;" in page
    assert "<b>model</b>" not in page
    assert page.count("</script>") == page.count("<script") == 2  # a title ends no script
    assert "90.00 %" in page
    assert re.findall(r"""\b(?:src|href)=["'](?!data:|#)([^"']+)""", page) == []  # nothing outside the file
    assert "@import" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))  # figures share no ids, or one would take the other's clip paths
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)) <= {(i, "") for i in ids} | {
        ("", i) for i in ids
    }
    names = {path.name for path in files.figures}
    assert names == {f"{path.stem}{suffix}" for path in files.figures for suffix in (".png", ".svg")}
    expected = (
        "learning_curves coding_rate reduced_rates gap step_sizes compressing_heads ranks coherence sparsity"
    )
    assert {path.stem for path in files.figures} == {
        *expected.split(),
        "robustness",
        "attention_maps",
        "receptive_fields",
    }
    assert all(path.stat().st_size > 1000 for path in files.figures)
    numbers = strict(files.numbers)
    assert numbers["coding_rate"]["layers"] == ["blocks.0.attn", "blocks.1.attn"]
    assert numbers["statements"]["together"].replace("'", "&#39;") in page
    assert numbers["robustness"]["clean"] in (0, 0.25, 0.5, 0.75, 1)
    assert numbers["robustness_metric"] == "accuracy"


@pytest.mark.parametrize("family", [*FAMILIES, "vit"])
def test_every_family_gets_the_sections_it_has_and_reasons_for_the_others(family, inputs, images, tmp_path):
    model, missing = (vit(), BLACK_BOX) if family == "vit" else (build(family), FAMILIES[family])
    files = interpret.report(model, inputs, images, tmp_path, title=family, facts={}, robustness_images=2)
    page = files.page.read_text()
    left_out = dict(re.findall(r"<li>(.*?): (.*?)\.</li>", page))
    assert set(left_out) == {*missing, "Learning curves"}
    assert left_out["Learning curves"] == "no history was given"
    shown = " ".join(headings(page))
    assert {name for name, heading in SECTIONS.items() if heading not in shown} == missing
    assert "Where the class token looks" in shown
    assert "Learning curves" not in shown
    assert strict(files.numbers)["robustness_metric"] == "share of predictions that stay the same"


def test_without_robustness_or_a_grid_the_page_says_so(tmp_path):
    layers = torch.nn.Sequential(cbsa_torch.CBSA(8, 2, representatives="learned", num_representatives=4))
    images = np.zeros((2, 3, 3))
    files = interpret.report(layers, torch.randn(2, 7, 8), images, tmp_path, title="t", facts={})
    page = files.page.read_text()
    assert "Attention maps of 0: its tokens have no grid." in page
    assert "Robustness: the model&#39;s output is not (images, classes)." in page
    assert "maps" not in headings(page)
    assert '<div class="maps">' not in page


def test_maps_on_the_page_are_those_measured(inputs, images):
    model = build()
    pictures = maps.Pictures(inputs, images, list("abcd"))
    measured = maps.measure_maps(model, pictures)
    with interpret.capture(model) as records:
        model(inputs)
    expected = interpret.cls_attention_maps(records["blocks.1.attn"])
    layer = maps.page_data(measured, pictures)["layers"][1]
    drawn = np.frombuffer(base64.b64decode(layer["maps"]), np.uint8).reshape(4, 3, 8, 8)
    own = torch.cat([expected.mean(1, keepdim=True), expected], 1).numpy()
    low, high = own.min((2, 3), keepdims=True), own.max((2, 3), keepdims=True)
    np.testing.assert_allclose(drawn / 255, (own - low) / (high - low), atol=0.51 / 255)
    fields = np.frombuffer(base64.b64decode(layer["fields"]), np.uint8).reshape(3, 16, 8, 8)
    attention = records["blocks.1.attn"].stages.attention[0, 1, 5, 1:].view(8, 8)  # head 2, representative 6
    assert fields[2, 5].argmax() == attention.argmax().item()


def test_images_of_the_reader_come_first_and_measure_nothing(inputs, images, tmp_path):
    model = vit()
    plain = interpret.report(
        model, inputs, images, tmp_path / "a", title="t", facts={}, shown=1, robustness_images=0
    )
    further = interpret.Pictures(torch.randn(1, 1, 8, 8), np.ones((1, 8, 8)), ["mine.png"])
    with_it = interpret.report(
        model,
        inputs,
        images,
        tmp_path / "b",
        title="t",
        facts={},
        shown=1,
        robustness_images=0,
        further=further,
    )
    assert strict(plain.numbers)["coding_rate"] == strict(with_it.numbers)["coding_rate"]
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', with_it.page.read_text())[1])
    assert [image["title"] for image in data["images"]] == ["mine.png", "image 1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((3, 8, 8))}, "3 images and 4 inputs"),
        ({"shown": 0}, "shown must be at least 1"),
        ({"image_titles": ["a"]}, "image_titles must be at least 4"),
        ({"labels": [1]}, "1 labels and 4 inputs"),
        ({"robustness_images": -1}, "robustness_images must be at least 0"),
        ({"robustness_images": 2.5}, "robustness_images must be an int"),
        ({"model": torch.nn.Flatten()}, "Flatten has no CBSA layer"),
    ],
)
def test_bad_arguments_are_named(inputs, images, tmp_path, changes, message):
    arguments = {"model": build(), "inputs": inputs, "images": images, "folder": tmp_path, **changes}
    with pytest.raises((ValueError, TypeError), match=message):
        interpret.report(**arguments, title="", facts={})


# ---- figures


def test_figures_are_cut_into_their_panels():
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([1, 2], label="a line")
    image = right.imshow(np.eye(2))
    figure.colorbar(image, ax=right)
    drawn = figures.draw(figure, "both", "two panels")
    assert [len(row) for row in drawn.rows] == [2]  # the colour bar belongs to its image
    assert drawn.heat
    widths = [int(width) for width in re.findall(r"width:(\d+)px", "".join(drawn.rows[0]))]
    assert all(200 < width < 400 for width in widths)
    assert all(axis.get_visible() for axis in figure.axes)
    assert figures.draw(_line(), "one", "one").rows == figures.draw(_line(), "one", "one").rows  # the same file


def _line():
    figure = Figure(figsize=(8, 3), layout="constrained")
    figure.subplots().plot([1, 2])
    return figure


def test_spread_takes_first_and_last():
    assert maps.spread(3, 6) == [0, 1, 2]
    assert maps.spread(12, 6) == [0, 2, 4, 7, 9, 11]
    assert maps.spread(5, 1) == [0]


def test_figures_of_a_hybrid_number_layers_as_the_model_does(inputs):
    measured = measure.measure(build("crate_cbt", depth=4), inputs, robustness_images=0)
    drawn = page.measure_figures(measured)
    for name in ("reduced_rates", "gap", "ranks"):
        assert list(drawn[name].axes[0].lines[0].get_xdata()) == [3, 4]
    assert [text.get_text() for text in drawn["step_sizes"].axes[0].get_xticklabels()] == ["3", "4"]
    titles = [axis.get_title() for axis in drawn["coherence"].axes]
    assert titles[:4] == ["layer 1", "layer 2", "layer 3", "layer 4"]
    places = page.numbers(measured)
    assert places(["blocks.2.attn"]) == [3]
    assert places(["blocks.1.ista", "blocks.3.ista"]) == [2, 4]  # of the block
    assert places(["x", "y"]) == [1, 2]


# ---- files


def test_figures_of_an_earlier_page_go_and_no_others(inputs, images, tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    stale = ["reduced_rates.png", "sparsity.svg", "compare_ranks.svg", "compare_attention_maps_7.png"]
    others = ["mine.png", "sparsity.pdf", "sparsity_1.png", "my_reduced_rates.png", "compare_mine.png"]
    for name in (*stale, *others):
        (folder / name).write_text("old")
    vits = [compared(name, vit(), inputs, images) for name in ("a", "b")]
    written = interpret.report(vit(), inputs, images, tmp_path, title="", facts={}, robustness_images=0).figures
    assert {path.name for path in folder.iterdir()} == {path.name for path in written} | set(stale[2:]) | set(
        others
    )
    written += interpret.compare(vits, tmp_path, title="", robustness_images=0).figures
    assert {path.name for path in folder.iterdir()} == {path.name for path in written} | set(others)


def test_a_page_that_cannot_be_finished_leaves_the_old_one(inputs, images, tmp_path, monkeypatch):
    write = {"report.html": "old page", "report.json": "old numbers"}
    for name, text in write.items():
        (tmp_path / name).write_text(text)

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        interpret.report(build(), inputs, images, tmp_path, title="", facts={}, robustness_images=0)
    assert {name: (tmp_path / name).read_text() for name in write} == write
    assert [path.name for path in (tmp_path / "figures").iterdir()] == []


DIVERGED = [
    {"epoch": 1, "train_loss": 1.0, "val_loss": 1.0, "val_top1": 0.4},
    {"epoch": 2, "train_loss": math.nan, "val_loss": math.inf, "val_top1": math.nan},
    {"epoch": 3, "train_loss": None, "val_loss": None, "val_top1": None},
]


@pytest.mark.parametrize(("rows", "best"), [(DIVERGED, "40.00 % in epoch 1"), (DIVERGED[1:], None)])
def test_a_history_that_diverged_is_drawn_and_valid_json(rows, best, inputs, images, tmp_path):
    options = {"title": "", "facts": {}, "robustness_images": 0}
    files = interpret.report(vit(), inputs, images, tmp_path, history=rows, **options)
    page = files.page.read_text()
    assert best in page if best else "Best validation accuracy" not in page
    gap = {"epoch": 2, "train_loss": None, "val_loss": None, "val_top1": None}
    assert gap in strict(files.numbers)["history"]


def test_names_of_the_reader_break_nothing(inputs, images, tmp_path):
    files = interpret.report(
        vit(), inputs, images, tmp_path, title=ODD[0], facts={ODD[1]: ODD[2]}, image_titles=ODD
    )
    page = files.page.read_text()
    assert "<b>" not in page
    assert "\u732b" in page


@pytest.mark.parametrize(
    ("options", "heading"),
    [
        ({}, "class token"),
        ({"class_token": False, "global_pool": "avg"}, "first patch"),
        ({"class_token": False, "global_pool": "avg", "reg_tokens": 2}, "first token"),
    ],
)
def test_maps_are_headed_by_whose_they_are(options, heading, inputs, images, tmp_path):
    files = interpret.report(vit(**options), inputs, images, tmp_path, title="", facts={}, robustness_images=0)
    page = files.page.read_text()
    assert f"Where the {heading} looks" in headings(page)
    assert ("There is no class token" in page) == (heading == "first patch")


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("cbt", None),
        ("crate", None),
        ("tost", "TSSA compares no token with another"),
        ("linear_cbt", "LinearCBSA forms no attention matrix"),
        ("agent", "The matrix of AgentAttention is the product"),
    ],
)
def test_maps_that_are_no_row_of_an_attention_matrix_say_what_they_are(family, said, inputs, images, tmp_path):
    model = build(family)
    notes = maps.measure_maps(model, maps.Pictures(inputs, images, list("abcd"))).notes
    assert len(notes) == (said is not None)
    if said:
        files = interpret.report(model, inputs, images, tmp_path, title="", facts={}, robustness_images=0)
        both = [compared("a", model, inputs, images), compared("b", model, inputs, images)]
        compare = interpret.compare(both, tmp_path, title="", robustness_images=0)
        assert files.page.read_text().count(said) == 1
        assert compare.page.read_text().count(said) == 2


def test_notes_are_printed(inputs, images, tmp_path, monkeypatch):
    from cbsa_torch.interpret.report import build as module

    def noted(*args, **options):
        return measure.measure(*args, **options)._replace(notes=["Mind the <gap>."])

    monkeypatch.setattr(module, "measure", noted)
    files = interpret.report(build(), inputs, images, tmp_path, title="", facts={}, robustness_images=0)
    assert "Mind the &lt;gap&gt;." in files.page.read_text()
