import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cbsa_torch import interpret
from cbsa_torch.interpret.pages import measures, render
from tests.helpers.pages import build, compared, vit


def test_figures_of_a_hybrid_number_layers_as_the_model_does(images):
    measured = measures.measure_model(build("crate_cbt", depth=4), images, robustness_images=0)
    figures = render.measure_figures(measured)
    for name in ("reduced_rates", "gap", "ranks"):
        assert list(figures[name].axes[0].lines[0].get_xdata()) == [3, 4]
    assert [text.get_text() for text in figures["step_sizes"].axes[0].get_xticklabels()] == ["3", "4"]
    titles = [axis.get_title() for axis in figures["coherence"].axes]
    assert titles[:4] == ["layer 1", "layer 2", "layer 3", "layer 4"]
    assert render.layer_numbers(measured, ["blocks.2.attn"]) == [3]
    assert render.layer_numbers(measured, ["blocks.1.ista", "blocks.3.ista"]) == [2, 4]  # of the block
    assert render.layer_numbers(measured, ["x", "y"]) == [1, 2]


def test_figures_of_an_earlier_page_go_and_no_others(images, tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    stale = {"reduced_rates.png", "sparsity.svg"}
    of_comparison = {"compare_ranks.svg", "compare_attention_maps_7.png"}
    others = {"mine.png", "sparsity.pdf", "sparsity_1.png", "my_reduced_rates.png", "compare_mine.png"}
    for name in stale | of_comparison | others:
        (folder / name).write_text("old")
    written = interpret.report(vit(), images, tmp_path, robustness_images=0).figures
    names = {path.name for path in written}
    assert {path.name for path in folder.iterdir()} == names | of_comparison | others
    runs = [compared(name, vit(), images) for name in ("a", "b")]
    names |= {path.name for path in interpret.compare(runs, tmp_path, robustness_images=0).figures}
    assert {path.name for path in folder.iterdir()} == names | others


def test_a_page_that_cannot_be_finished_leaves_the_old_one(images, tmp_path, monkeypatch):
    old = {"report.html": "old page", "report.json": "old numbers"}
    for name, text in old.items():
        (tmp_path / name).write_text(text)

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        interpret.report(vit(), images, tmp_path, robustness_images=0)
    assert {name: (tmp_path / name).read_text() for name in old} == old
    assert [path.name for path in (tmp_path / "figures").iterdir()] == []


class Pair(NamedTuple):
    first: float
    second: list[float]


def test_what_is_not_finite_becomes_none_however_deep():
    nested = {
        "pair": Pair(math.nan, [1.0, math.inf]),
        "tensor": torch.tensor([[1.0, -math.inf], [0.5, 2.0]]),
        "array": np.array([math.nan, 3.0]),
        "single": np.float32("nan"),
        "others": (True, 3, "nan", None),
    }
    expected = {
        "pair": {"first": None, "second": [1.0, None]},
        "tensor": [[1.0, None], [0.5, 2.0]],
        "array": [None, 3.0],
        "single": None,
        "others": [True, 3, "nan", None],
    }
    assert render.finite(nested) == expected
