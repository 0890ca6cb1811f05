"""The page about one model and the page about several: what they say, hold and write."""

import base64
import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure

import cbsa_torch.models
from cbsa_torch import interpret
from cbsa_torch.interpret import figures
from cbsa_torch.interpret.rates import LayerRates, reduced_rates
from cbsa_torch.interpret.report import maps, statements
from cbsa_torch.interpret.report.measure import as_numbers, measure

CBSA_ONLY = {"Reduced rates", "Rank of the extraction attention"}
BLACK_BOX = {*CBSA_ONLY, "Step sizes", "Coherence of the subspaces", "Sparsity"}
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


def build(family="cbt", **options):
    options = {"embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3, **options}
    return timm.create_model(f"{family}_pico_patch1_8", **options).eval()


def vit():
    options = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 12, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **options).eval()


@pytest.fixture
def inputs():
    return torch.randn(4, 1, 8, 8)


@pytest.fixture
def images():
    return np.random.default_rng(0).random((4, 8, 8))


def headings(page):
    return re.findall(r"<h2>(?:<span[^>]*></span>)?(.*?)</h2>", page)


def strict(path):
    """JSON as it is defined: without NaN."""
    return json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} in {path}"))


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
    expected = "learning_curves coding_rate reduced_rates step_sizes compressing_heads ranks coherence sparsity"
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
    assert set(left_out) == missing
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
    model = build()
    plain = interpret.report(model, inputs, images, tmp_path / "a", title="t", facts={}, shown=1)
    further = interpret.Pictures(torch.randn(1, 1, 8, 8), np.ones((1, 8, 8)), ["mine.png"])
    with_it = interpret.report(
        model, inputs, images, tmp_path / "b", title="t", facts={}, shown=1, further=further
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
        ({"model": torch.nn.Flatten()}, "Flatten has no CBSA layer"),
    ],
)
def test_bad_arguments_are_named(inputs, images, tmp_path, changes, message):
    arguments = {"model": build(), "inputs": inputs, "images": images, "folder": tmp_path, **changes}
    with pytest.raises(ValueError, match=message):
        interpret.report(**arguments, title="", facts={})


# ---- sentences


def rates(*values):
    zeros = [0.0] * len(values)
    return LayerRates([str(i) for i in range(len(values))], list(values), zeros, list(values), zeros, 1, [], [])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            (1, 9, 8, 7),
            "compresses, layer by layer, as in the paper: from layer 2 to layer 4 the term changes by -22.2 %",
        ),
        ((1, 9, 9.5, 7), "compresses, though not in every layer"),
        (
            (9, 7, 8, 9),
            "does not compress here, unlike in the paper: from layer 2 to layer 4 the term changes by +28.6 %",
        ),
        ((9, 100, 99.8, 99.5), "hardly changes here"),
        ((5,), "one layer"),
        ((1, 9, math.nan, 7), "cannot be said: the rate of layer 3 is not a finite number"),
        ((1, 9, 8, math.inf), "cannot be said: the rate of layer 4 is not a finite number"),
        ((1, 0, 8, 7), "cannot be said: the rate of layer 2 is zero"),
        ((math.nan, 9, 8, 7), "compresses, layer by layer"),
    ],
)
def test_whether_the_later_half_compresses(values, said):
    assert said in statements.later_half_sentence(rates(*values))


def test_a_normalised_rate_that_is_no_number_is_not_printed():
    said = statements.later_half_sentence(rates(9, 8, 7)._replace(normalized=[1.0, math.nan, 1.0]))
    assert said.endswith("changes by -12.5 % (normalised: cannot be said).")


@pytest.mark.parametrize(
    ("correlation", "said"),
    [
        (
            0.8,
            "move together, as the paper observes: Spearman's rank correlation is +0.80 over 4 heads of 2 layers",
        ),
        (0.3, "only weakly"),
        (-0.1, "do not move together here"),
        (-0.7, "against each other"),
        (math.nan, "cannot be said: Spearman's rank correlation is undefined over"),
    ],
)
def test_whether_the_two_move_together(inputs, correlation, said):
    reduced = reduced_rates(build(), [inputs])
    sentence = statements.together_sentence(
        reduced._replace(
            correlation=correlation,
            correlation_learned=0.11,
            correlation_output=math.nan,
            correlation_added=-0.33,
        )
    )
    assert said in sentence
    assert "+0.11 at the learned κ, W + κ A C; undefined for CBSA's output" in sentence
    assert "-0.33 for a step against Eq. 6, W + A C." in sentence
    assert "nan" not in sentence


def test_heads_that_compress_are_counted(inputs):
    reduced = reduced_rates(build(), [inputs])
    reduced = reduced._replace(
        tokens_learned=[[1.0, -1.0], [2.0, 3.0]], step_tokens=[[1.0, -1.0], [-2.0, -3.0]]
    )
    said = statements.heads_sentence(reduced)
    assert "3 of 4 heads lower" in said
    assert "1 raise" in said
    assert "positive in 1." in said
    assert "cannot be said" not in said
    said = statements.heads_sentence(reduced._replace(tokens_learned=[[1.0, math.nan], [-2.0, 3.0]]))
    assert "2 of 4 heads lower" in said
    assert "of 1 it cannot be said" in said


def test_the_gap_is_the_largest_of_any_image_and_the_mean(inputs):
    model = build()
    reduced = reduced_rates(model, [inputs])
    gaps = torch.stack([layer.gap for layer in interpret.image_rates(model, [inputs]).values()])
    said = statements.gap_sentence(reduced)
    assert f"from τ = {gaps.max():.1f} nats on" in said
    assert f"the mean gap is {gaps.mean():.1f} nats" in said
    assert gaps.max() > gaps.mean() + 0.1  # the two are told apart
    for broken in (reduced._replace(gap_max=[[math.nan]]), reduced._replace(gap=[[math.inf]])):
        assert "cannot be said" in statements.gap_sentence(broken)


# ---- measures


@pytest.mark.parametrize("family", ["cbt", "stem_vit", "vit", "mixed"])
def test_notes_say_what_the_rates_of_separate_projections_are_of(family, inputs):
    model = vit() if family == "vit" else build("cbt" if family == "mixed" else family)
    if family == "mixed":
        model.blocks[1].attn = cbsa_torch.CBSA(8, 2, num_representatives=16, qkv="separate").eval()
    notes = measure(model, inputs, robustness_images=0).notes
    if family == "cbt":
        assert notes == []
    else:
        which = "Layer 2 projects" if family == "mixed" else "The layers of this model project"
        assert [note.startswith(which) and note.endswith("of the queries.") for note in notes] == [True]


def test_measures_call_layers_the_same_compiled_or_not(inputs):
    plain = measure(build("crate_cbt"), inputs, robustness_images=0)
    model = build("crate_cbt")
    for block in model.blocks:
        block.attn = torch.compile(block.attn, backend="eager")
        block.ista = torch.compile(block.ista, backend="eager")
    compiled = measure(model, inputs, robustness_images=1)
    assert compiled.rates.layers == plain.rates.layers == ["blocks.0.attn", "blocks.1.attn"]
    assert compiled.robustness.layers == compiled.rates.layers
    assert compiled.sparsity.layers == plain.sparsity.layers == ["blocks.0.ista", "blocks.1.ista"]
    for name in (compiled.reduced.layers, compiled.ranks.layers, list(compiled.steps)):
        assert name == ["blocks.1.attn"]
    assert list(compiled.coherence) == compiled.rates.layers


def test_numbers_of_a_model_that_went_wrong_are_none(inputs):
    model = build()
    with torch.no_grad():
        model.blocks[1].attn.step_tokens[0] = math.nan
    numbers = as_numbers(measure(model, inputs, robustness_images=0))
    assert numbers["reduced"]["tokens_learned"][1][0] is None
    assert numbers["steps"]["blocks.1.attn"][0] is None
    assert "NaN" not in json.dumps(numbers)


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


# ---- comparison


def compared(name, model, inputs, images, **changes):
    run = interpret.ComparedRun(name, model, inputs, images, [0, 1, 2, 0], name, 10, 10**9, 0.5)
    return run._replace(**changes)


def test_models_side_by_side(inputs, images, tmp_path):
    runs = [
        compared("ours", build(), inputs, images),
        compared("vit", vit(), inputs, images, accuracy=None),
        compared("crate", build("crate", depth=3), inputs, images),
    ]
    files = interpret.compare(runs, tmp_path, title="three", shown=2)
    page = files.page.read_text()
    assert headings(page)[2:] == ["ours: ours", "vit: vit", "crate: crate"]
    assert page.count('<div class="maps">') == 3
    assert page.count("<th>correlation</th>") == 1
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    numbers = strict(files.numbers)
    assert [len(run["coding_rate"]["rate"]) for run in numbers["runs"]] == [2, 2, 3]
    assert [run["reduced"] is None for run in numbers["runs"]] == [False, True, True]
    names = {path.stem for path in files.figures}
    assert {"coding_rate", "robustness", "reduced_rates_1", "attention_maps_2", "attention_maps_3"} <= names


def test_comparisons_that_compare_nothing_are_refused(inputs, images, tmp_path):
    one = compared("one", build(), inputs, images)
    with pytest.raises(ValueError, match="two or more with different names"):
        interpret.compare([one], tmp_path, title="")
    with pytest.raises(ValueError, match="two or more with different names"):
        interpret.compare([one, one], tmp_path, title="")
    other = one._replace(name="two", inputs=inputs[:2], images=images[:2])
    with pytest.raises(ValueError, match=r"same images, got \[2, 4\]"):
        interpret.compare([one, other], tmp_path, title="")


def test_many_runs_with_long_names_leave_room_for_the_lines():
    runs = {f"/a/folder/with/a/very/long/name/{'x' * 60}/run{i}": rates(3.0, 2.0) for i in range(8)}
    figure = figures.rates_of_runs(runs)
    figures.draw(figure, "r", "r")
    assert all(axis.get_window_extent().height > 60 for axis in figure.axes)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert all(label.endswith(f"run{i}") and len(label) <= 30 for i, label in enumerate(labels))
