"""The page about several models."""

import math
import re

import numpy as np
import pytest
import torch

from cbsa_torch import interpret
from cbsa_torch.interpret.pages.compare import mean_coherence, measure_run, shared_figures, summary_table
from tests.helpers.pages import (
    HISTORY,
    LONG_NAME,
    NOT_OF_A_VIT,
    ODD_NAMES,
    build,
    compared,
    headings,
    strict,
    vit,
)


def test_models_side_by_side(full_comparison):
    files = full_comparison
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
    assert [len(run["coding_rate"]["rate"]) for run in numbers["runs"]] == [3, 3, 3]
    assert [run["reduced"] is None for run in numbers["runs"]] == [False, True, False]
    assert numbers["runs"][0]["history"] == HISTORY
    shared = "learning_curves coding_rate gap ranks coherence sparsity robustness"
    own = "reduced_rates step_sizes compressing_heads coherence attention_maps receptive_fields"
    expected = {*shared.split(), *(f"{name}_{i}" for name in own.split() for i in (1, 3))}
    expected.add("attention_maps_2")
    assert {path.stem for path in files.figures} == {f"compare_{name}" for name in expected}
    listed = re.findall(
        r'<h3><span class="key"[^>]*></span>(\w+)</h3>\s*<ul class="left-out">(.*?)</ul>', page, re.DOTALL
    )
    left_out = {name: dict(re.findall("<li>(.*?): (.*?)[.]</li>", text)) for name, text in listed}
    assert {name: set(reasons) for name, reasons in left_out.items()} == {
        "stem_vit": NOT_OF_A_VIT,
        LONG_NAME: {"Learning curves"},
    }
    assert left_out["stem_vit"]["Sparsity"] == "the model has no ISTA"


def test_a_run_has_one_colour_everywhere(images):
    names = ["vit", "a", "b"]
    colors = dict(zip(names, ["#111111", "#222222", "#333333"], strict=True))
    measured = []
    for name, model in zip(names, (vit(), build(), build("crate_cbt", depth=4)), strict=True):
        run = compared(name, model, images, history=HISTORY if name == "b" else ())
        measured.append(measure_run(run, batch_size=64, robustness_images=2))
    figures = shared_figures(measured, colors)
    shown = {
        name: {line.get_label(): line.get_color() for line in figure.axes[0].lines if line.get_label() in names}
        for name, figure in figures.items()
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
    (line,) = [line for line in figures["gap"].axes[0].lines if line.get_label() == "b"]
    assert list(line.get_xdata()) == [3, 4]  # CBSA's numbers among all layers
    np.testing.assert_allclose(line.get_ydata(), np.mean(measured[2].measures.reduced.gap, 1))
    rows = dict(summary_table(measured))
    assert rows["model"] == names
    assert rows["correlation, κ = 1"][0] == "\N{EN DASH}"
    assert rows["attention layers"] == ["2", "2", "4"]
    assert rows["zeros after ISTA, mean"][0] == "\N{EN DASH}"
    assert rows["zeros after ISTA, mean"][1] == f"{100 * np.mean(measured[1].measures.sparsity.zeros):.1f} %"
    effects = np.array(measured[1].measures.reduced.tokens_learned)
    assert rows["heads that compress"][1] == f"{(effects > 0).sum()} of 4"
    assert (
        rows["accuracy at \N{GREEK SMALL LETTER SIGMA} = 0.1"][0]
        == f"{100 * np.mean(measured[0].measures.robustness.values[2]):.1f} %"
    )


def test_the_row_of_certificates(images):
    coarse = build(step="certified", representatives="tokens", num_representatives=None, eps=1e4)
    models = {"certified": build(step="certified"), "coarse": coarse, "free": build(), "vit": vit()}
    measured = [
        measure_run(compared(n, m, images), batch_size=64, robustness_images=0) for n, m in models.items()
    ]
    assert dict(summary_table(measured))["certificate"] == [
        "16 of 16",
        "16 of 16 (0 beyond rounding)",
        "\N{EN DASH}",
        "\N{EN DASH}",
    ]


def test_a_run_needs_no_more_than_a_name_a_model_and_images(images):
    run = measure_run(interpret.ComparedRun("a", vit(), images), batch_size=2, robustness_images=0)
    rows = dict(summary_table([run]))
    assert rows["model"] == ["VisionTransformer"]
    assert rows["parameters"] == [f"{sum(p.numel() for p in run.run.model.parameters()):,}"]
    assert (
        rows["GFLOPs"]
        == rows["accuracy"]
        == rows["same predictions at \N{GREEK SMALL LETTER SIGMA} = 0.1"]
        == ["\N{EN DASH}"]
    )


def test_mean_coherence_leaves_a_head_with_itself_out():
    assert mean_coherence(torch.tensor([[1.0, 0.25], [0.75, 1.0]])) == 0.5
    assert math.isnan(mean_coherence(torch.ones(1, 1)))


def test_comparisons_that_compare_nothing_are_refused(images, tmp_path):
    one = compared("one", build(), images)
    two = one._replace(name="two")
    for runs, message in (
        ([one], "two or more with different names"),
        ([one, one], "two or more with different names"),
        ([one, two._replace(images=images[:2])], r"same images, got \[2, 4\]"),
        ([one, two._replace(labels=None)], r"all have labels or none, .*\['two'\] have none"),
        ([one, two._replace(labels=[0, 1, 2, 1])], "same labels: those of one and two differ"),
    ):
        with pytest.raises(ValueError, match=message):
            interpret.compare(runs, tmp_path)
    with pytest.raises(ValueError, match="robustness_images must be at least 0, got -1"):
        interpret.compare([one, two], tmp_path, robustness_images=-1)
    assert not [*tmp_path.iterdir()]


def test_odd_names_break_nothing(images, tmp_path):
    pictures = interpret.Pictures.of(images, ODD_NAMES)
    runs = [compared(name, vit(), images, pictures=pictures, history=HISTORY) for name in ODD_NAMES[1:3]]
    page = interpret.compare(runs, tmp_path, title=ODD_NAMES[1], robustness_images=0).page.read_text()
    assert ODD_NAMES[2] in page
    assert "<b>" not in page
    assert page.count("</script>") == page.count("<script")


def test_runs_that_diverged_are_drawn_and_valid_json(images, tmp_path):
    history = [{"epoch": 1, "train_loss": math.nan, "val_loss": math.inf, "val_top1": None}]
    runs = [compared(name, vit(), images, history=history) for name in ("a", "b")]
    numbers = strict(interpret.compare(runs, tmp_path, robustness_images=0).numbers)
    assert numbers["runs"][1]["history"][0]["train_loss"] is None
