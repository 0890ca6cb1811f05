"""Everything measured of one model."""

import pytest
import torch

import cbsa_torch
from cbsa_torch.interpret.pages import measures
from tests.helpers.pages import build, vit

CBSA_ALONE = {"reduced", "ranks"}
OF_NO_VIT = {*CBSA_ALONE, "steps", "coherence", "sparsity"}


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("crate_cbt", set()),
        ("crate", {*CBSA_ALONE, "steps"}),
        ("agent", {*CBSA_ALONE, "steps"}),
        ("linear_cbt", CBSA_ALONE),
        ("stem_vit", OF_NO_VIT),
    ],
)
def test_what_a_family_does_not_have_is_missing_with_a_reason(family, missing, images):
    found = measures.measure_model(build(family), images, robustness_images=1)
    assert set(found.missing) == missing
    assert all(found.missing.values())


def test_certified_steps_are_means_over_images(images):
    model = build(step="certified", num_representatives=4)
    model.blocks[1].attn = cbsa_torch.CBSA(8, 2, num_representatives=4).eval()
    found = measures.measure_model(model, images, robustness_images=0)
    assert [layer.step for layer in found.certificate.layers] == ["certified", "free"]
    assert list(found.steps) == ["blocks.0.attn", "blocks.1.attn"]
    layer = found.certificate.layers[0]
    kappa = 2 * layer.share / layer.norm
    assert found.steps["blocks.0.attn"] == pytest.approx((-kappa).mean(0).tolist(), rel=1e-4)
    assert found.steps["blocks.1.attn"] == model.blocks[1].attn.step_tokens.tolist()
    assert measures.measure_model(build(), images, robustness_images=0).certificate is None


@pytest.mark.parametrize("family", ["cbt", "stem_vit", "vit", "mixed"])
def test_notes_say_what_the_rates_of_separate_projections_are_of(family, images):
    model = vit() if family == "vit" else build("cbt" if family == "mixed" else family)
    if family == "mixed":
        model.blocks[1].attn = cbsa_torch.CBSA(8, 2, num_representatives=16, qkv="separate").eval()
    notes = measures.measure_model(model, images, robustness_images=0).notes
    if family == "cbt":
        assert notes == []
    else:
        which = "Layer 2 projects" if family == "mixed" else "The layers of this model project"
        assert [note.startswith(which) and note.endswith("of the queries.") for note in notes] == [True]


def test_measures_call_layers_the_same_compiled_or_not(images):
    plain = measures.measure_model(build("crate_cbt"), images, robustness_images=0)
    model = build("crate_cbt")
    for block in model.blocks:
        block.attn = torch.compile(block.attn, backend="eager")
        block.ista = torch.compile(block.ista, backend="eager")
    compiled = measures.measure_model(model, images, robustness_images=1)
    assert compiled.rates.layers == plain.rates.layers == ["blocks.0.attn", "blocks.1.attn"]
    assert compiled.robustness.layers == compiled.rates.layers
    assert compiled.sparsity.layers == plain.sparsity.layers == ["blocks.0.ista", "blocks.1.ista"]
    for name in (compiled.reduced.layers, compiled.ranks.layers, list(compiled.steps)):
        assert name == ["blocks.1.attn"]
    assert list(compiled.coherence) == compiled.rates.layers
