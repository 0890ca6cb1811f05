import dataclasses
import math

import pytest
import torch
from torch.nn.utils import parametrize

from cbsa_torch import interpret
from cbsa_torch.interpret.pages import sentences
from cbsa_torch.interpret.rates import LayerRates, reduced_rates
from tests.helpers.pages import build


@pytest.fixture(scope="module")
def reduced(images):
    return reduced_rates(build(), [images])


def rates(*values):
    zeros = [0.0] * len(values)
    return LayerRates([str(i) for i in range(len(values))], list(values), zeros, list(values), zeros, 1, [], [])


@pytest.mark.parametrize(
    ("values", "expected"),
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
def test_whether_the_later_half_compresses(values, expected):
    assert expected in sentences.later_half_sentence(rates(*values))


def test_a_normalised_rate_that_is_no_number_is_not_printed():
    sentence = sentences.later_half_sentence(rates(9, 8, 7)._replace(normalized=[1.0, math.nan, 1.0]))
    assert sentence.endswith("changes by -12.5 % (normalised: cannot be said).")


@pytest.mark.parametrize(
    ("correlation", "expected"),
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
def test_whether_the_two_move_together(reduced, correlation, expected):
    others = {"correlation_learned": 0.11, "correlation_output": math.nan, "correlation_added": -0.33}
    sentence = sentences.together_sentence(reduced._replace(correlation=correlation, **others))
    assert expected in sentence
    assert "+0.11 at the learned κ, W + κ A C; undefined for CBSA's output" in sentence
    assert "-0.33 for a step against Eq. 6, W + A C." in sentence
    assert "nan" not in sentence


def test_heads_that_compress_are_counted(reduced):
    reduced = reduced._replace(
        tokens_learned=[[1.0, -1.0], [2.0, 3.0]], step_tokens=[[1.0, -1.0], [-2.0, -3.0]]
    )
    sentence = sentences.heads_sentence(reduced)
    assert "3 of 4 heads lower" in sentence
    assert "1 raise" in sentence
    assert "positive in 1." in sentence
    assert "cannot be said" not in sentence
    sentence = sentences.heads_sentence(reduced._replace(tokens_learned=[[1.0, math.nan], [-2.0, 3.0]]))
    assert "2 of 4 heads lower" in sentence
    assert "of 1 it cannot be said" in sentence


def test_the_theorem_is_claimed_of_layers_with_a_certificate_alone(images):
    model = build(depth=3, step="certified")
    model.blocks[1].attn = build().blocks[0].attn
    layers = [f"blocks.{i}.attn" for i in range(3)]
    found = interpret.certificate(model, images)
    assert sentences.certificate_sentence(found, layers).startswith("In every head of attention layer 1, 3 and")
    assert "it holds in 16 of 16 cases" in sentences.cases_sentence(found)
    parametrize.remove_parametrizations(model.blocks[2].attn.qkv, "weight")
    model.blocks[2].attn.qkv.weight.data *= 1.01
    found = interpret.certificate(model, images)
    sentence = sentences.certificate_sentence(found, layers)
    assert sentence.startswith("In every head of attention layer 1 and")
    assert "Layer 3 has no certificate: its bases are not orthonormal" in sentence
    cases = sentences.cases_sentence(found)
    assert "it holds in 8 of 8 cases" in cases
    assert cases.endswith("of all 16. 8 cases more are of layers without a certificate.")
    assert "rounding" not in cases
    found = dataclasses.replace(found, layers=found.layers[1:])
    assert sentences.certificate_sentence(found, layers).startswith("Layer 3 has no certificate")


def test_the_gap_is_the_largest_of_any_image_and_the_mean(images):
    model = build()
    reduced = reduced_rates(model, [images])
    gaps = torch.stack([layer.gap for layer in interpret.image_rates(model, [images]).values()])
    sentence = sentences.gap_sentence(reduced)
    assert f"from τ = {gaps.max():.1f} nats on" in sentence
    assert f"the mean gap is {gaps.mean():.1f} nats" in sentence
    assert gaps.max() > gaps.mean() + 0.1  # the two are told apart
    for broken in (reduced._replace(gap_max=[[math.nan]]), reduced._replace(gap=[[math.inf]])):
        assert "cannot be said" in sentences.gap_sentence(broken)
