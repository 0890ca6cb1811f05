"""The page about several models."""

import math
import re

import numpy as np
import pytest
import torch

from cbsa_torch import interpret
from cbsa_torch.interpret import figures, overlays
from cbsa_torch.interpret.report import maps, measure, side_by_side
from tests.helpers.pages import (
    BLACK_BOX,
    CBSA_ONLY,
    HISTORY,
    ODD,
    build,
    compared,
    headings,
    strict,
    vit,
)


@pytest.fixture
def inputs():
    return torch.randn(4, 1, 8, 8)


@pytest.fixture
def images():
    return np.random.default_rng(0).random((4, 8, 8))


def test_models_side_by_side(inputs, images, tmp_path):
    runs = [
        compared("ours", build(), inputs, images, history=HISTORY),
        compared("vit", vit(), inputs, images, accuracy=None),
        compared("hybrid", build("crate_cbt", depth=4), inputs, images, history=HISTORY),
    ]
    files = interpret.compare(runs, tmp_path, title="three", shown=2)
    page = files.page.read_text()
    assert headings(page) == [
        "Learning curves",
        "Compression, layer by layer",
        "Contracting a few compresses all?",
        "Step sizes: which heads compress",
        "Sparsity",
        "Coherence of the subspaces",
        "Rank of the extraction attention",
        "Where models look",
        "Robustness to noise on the parameters",
        "Left out",
    ]
    assert page.count('<div class="maps">') == 3
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    numbers = strict(files.numbers)
    assert [len(run["coding_rate"]["rate"]) for run in numbers["runs"]] == [2, 2, 4]
    assert [run["reduced"] is None for run in numbers["runs"]] == [False, True, False]
    assert numbers["runs"][0]["history"] == HISTORY
    shared = "learning_curves coding_rate gap ranks coherence sparsity robustness"
    own = "reduced_rates step_sizes compressing_heads coherence attention_maps receptive_fields"
    expected = {*shared.split(), *(f"{name}_{i}" for name in own.split() for i in (1, 3)), "attention_maps_2"}
    assert {path.stem for path in files.figures} == {f"compare_{name}" for name in expected}


def test_what_is_left_out_of_each_run_is_listed_with_the_reason(inputs, images, tmp_path):
    runs = [
        compared("ours", build(), inputs, images, history=HISTORY),
        compared("vit", vit(), inputs, images, history=HISTORY),
        compared("crate", build("crate"), inputs, images),
    ]
    page = interpret.compare(runs, tmp_path, title="", robustness_images=0).page.read_text()
    listed = re.findall(
        r'<h3><span class="key"[^>]*></span>(\w+)</h3>\s*<ul class="left-out">(.*?)</ul>', page, re.DOTALL
    )
    left_out = {name: dict(re.findall("<li>(.*?): (.*?)[.]</li>", text)) for name, text in listed}
    assert {name: set(reasons) for name, reasons in left_out.items()} == {
        "ours": {"Robustness"},
        "vit": {"Robustness", *BLACK_BOX},
        "crate": {"Robustness", "Learning curves", *CBSA_ONLY, "Step sizes"},
    }
    assert left_out["vit"]["Sparsity"] == "the model has no ISTA"
    assert left_out["ours"]["Robustness"] == "switched off"


def test_a_run_has_one_colour_everywhere(inputs, images):
    names = ["vit", "a", "b"]
    colors = dict(zip(names, ["#111111", "#222222", "#333333"], strict=True))
    looked = []
    for name, model in zip(names, (vit(), build(), build("crate_cbt", depth=4)), strict=True):
        run = compared(name, model, inputs, images, history=HISTORY if name == "b" else ())
        measured = measure.measure(model, inputs, labels=run.labels, robustness_images=2)
        pictures = maps.Pictures(inputs, images, list("abcd"))
        looked.append(side_by_side.Looked(run, measured, maps.measure_maps(model, pictures), pictures))
    drawn = side_by_side.overlaid(looked, colors)
    shown = {
        name: {line.get_label(): line.get_color() for line in figure.axes[0].lines if line.get_label() in names}
        for name, figure in drawn.items()
    }
    assert all(color == colors[name] for lines in shown.values() for name, color in lines.items())
    assert {name: set(lines) for name, lines in shown.items()} == {
        "learning_curves": {"b"},
        "coding_rate": set(names),
        "gap": {"a", "b"},
        "sparsity": {"a", "b"},
        "coherence": {"a", "b"},
        "ranks": {"a", "b"},
        "robustness": set(names),
    }
    (line,) = [line for line in drawn["gap"].axes[0].lines if line.get_label() == "b"]
    assert list(line.get_xdata()) == [3, 4]  # CBSA's places among all layers
    np.testing.assert_allclose(line.get_ydata(), np.mean(looked[2].measures.reduced.gap, 1))
    rows = dict(side_by_side.table(looked))
    assert rows["model"] == names
    assert rows["correlation, κ = 1"][0] == "\N{EN DASH}"
    assert rows["attention layers"] == ["2", "2", "4"]


def test_mean_coherence_leaves_a_head_with_itself_out():
    assert side_by_side.mean_coherence(torch.tensor([[1.0, 0.25], [0.75, 1.0]])) == 0.5
    assert math.isnan(side_by_side.mean_coherence(torch.ones(1, 1)))


def test_comparisons_that_compare_nothing_are_refused(inputs, images, tmp_path):
    one = compared("one", build(), inputs, images)
    with pytest.raises(ValueError, match="two or more with different names"):
        interpret.compare([one], tmp_path, title="")
    with pytest.raises(ValueError, match="two or more with different names"):
        interpret.compare([one, one], tmp_path, title="")
    other = one._replace(name="two", inputs=inputs[:2], images=images[:2])
    with pytest.raises(ValueError, match=r"same images, got \[2, 4\]"):
        interpret.compare([one, other], tmp_path, title="")
    two = one._replace(name="two")
    with pytest.raises(ValueError, match=r"all have labels or none, .*\['two'\] have none"):
        interpret.compare([one, two._replace(labels=None)], tmp_path, title="")
    with pytest.raises(ValueError, match="same labels: those of one and two differ"):
        interpret.compare([one, two._replace(labels=[0, 1, 2, 1])], tmp_path, title="")
    with pytest.raises(ValueError, match="robustness_images must be at least 0, got -1"):
        interpret.compare([one, two], tmp_path, title="", robustness_images=-1)
    assert not [*tmp_path.iterdir()]


def test_many_runs_with_long_names_leave_room_for_the_lines():
    names = [f"/a/folder/with/a/very/long/name/{'x' * 60}/run{i}" for i in range(8)]
    curves = {name: overlays.Curve([1, 2], [3.0, 2.0]) for name in names}
    figure = overlays.layer_curves({"rate": curves, "other": curves}, dict.fromkeys(names, "red"))
    figures.draw(figure, "r", "r")
    assert all(axis.get_window_extent().height > 60 for axis in figure.axes)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert all(label.endswith(f"run{i}") and len(label) <= 30 for i, label in enumerate(labels))


def test_names_of_the_reader_break_nothing(inputs, images, tmp_path):
    runs = [compared(name, vit(), inputs, images, image_titles=ODD, history=HISTORY) for name in ODD[1:3]]
    page = interpret.compare(runs, tmp_path, title=ODD[1], robustness_images=0).page.read_text()
    assert ODD[2] in page
    assert "<b>" not in page
    assert page.count("</script>") == page.count("<script")


def test_runs_that_diverged_are_drawn_and_valid_json(inputs, images, tmp_path):
    history = [{"epoch": 1, "train_loss": math.nan, "val_loss": math.inf, "val_top1": None}]
    runs = [compared(name, vit(), inputs, images, history=history) for name in ("a", "b")]
    numbers = strict(interpret.compare(runs, tmp_path, title="", robustness_images=0).numbers)
    assert numbers["runs"][1]["history"][0]["train_loss"] is None
