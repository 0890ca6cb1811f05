"""Everything measured of one model."""

import json
import math

import pytest
import torch

import cbsa_torch
from cbsa_torch.interpret.report import measure
from tests.helpers.pages import build, vit


@pytest.fixture
def inputs():
    return torch.randn(4, 1, 8, 8)


@pytest.mark.parametrize("family", ["cbt", "stem_vit", "vit", "mixed"])
def test_notes_say_what_the_rates_of_separate_projections_are_of(family, inputs):
    model = vit() if family == "vit" else build("cbt" if family == "mixed" else family)
    if family == "mixed":
        model.blocks[1].attn = cbsa_torch.CBSA(8, 2, num_representatives=16, qkv="separate").eval()
    notes = measure.measure(model, inputs, robustness_images=0).notes
    if family == "cbt":
        assert notes == []
    else:
        which = "Layer 2 projects" if family == "mixed" else "The layers of this model project"
        assert [note.startswith(which) and note.endswith("of the queries.") for note in notes] == [True]


def test_measures_call_layers_the_same_compiled_or_not(inputs):
    plain = measure.measure(build("crate_cbt"), inputs, robustness_images=0)
    model = build("crate_cbt")
    for block in model.blocks:
        block.attn = torch.compile(block.attn, backend="eager")
        block.ista = torch.compile(block.ista, backend="eager")
    compiled = measure.measure(model, inputs, robustness_images=1)
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
    numbers = measure.as_numbers(measure.measure(model, inputs, robustness_images=0))
    assert numbers["reduced"]["tokens_learned"][1][0] is None
    assert numbers["steps"]["blocks.1.attn"][0] is None
    assert "NaN" not in json.dumps(numbers)
