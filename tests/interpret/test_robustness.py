import math

import pytest
import timm
import torch
from torch import nn

import cbsa_torch.models  # noqa: F401
from cbsa_torch import CBSA, MSSA, interpret
from cbsa_torch.nn import ISTA


def state(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_noise_is_on_every_parameter_of_the_layers_and_nowhere_else(model):
    before = state(model)
    noisy = interpret.noisy_copy(model, 0.1)
    expected = {name for name, _ in model.named_parameters() if ".attn." in name}
    assert changed(before, state(noisy)) == expected
    assert len(expected) == 15  # qkv, the projection and its bias, both steps, three times
    assert changed(before, state(model)) == set()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_noise_is_gaussian_of_the_given_size(dtype):
    layer = MSSA(128, 4).to(dtype)
    noisy = interpret.noisy_copy(layer, 0.3, seed=3)
    assert noisy.qkv.weight.dtype == dtype
    noise = (noisy.qkv.weight.double() - layer.qkv.weight.double()).detach()
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    within = (noise.abs() < 0.3).float().mean().item()  # one standard deviation
    assert within == pytest.approx(0.6827, abs=0.01)


def test_noise_is_that_of_the_seed_scaled_and_leaves_the_global_generator_alone():
    layer, before = MSSA(16, 2), torch.get_rng_state()
    with torch.no_grad():
        layer.qkv.weight.zero_()
    copies = [
        interpret.noisy_copy(layer, s, seed=seed).qkv.weight for s, seed in ((0.1, 7), (0.2, 7), (0.1, 8))
    ]
    assert torch.equal(torch.get_rng_state(), before)
    expected = torch.randn(16, 16, generator=torch.Generator().manual_seed(7))  # of the first parameter
    assert torch.equal(copies[0], 0.1 * expected)
    assert torch.equal(copies[1], 0.2 * expected)
    assert not torch.allclose(copies[2], copies[0], atol=1e-2)


def test_shared_parameters_get_noise_once_and_stay_shared():
    first, second = MSSA(16, 2), MSSA(16, 2)
    second.qkv.weight = first.qkv.weight
    noisy = interpret.noisy_copy(nn.Sequential(first, second), 0.5)
    assert noisy[0].qkv.weight is noisy[1].qkv.weight
    assert (noisy[0].qkv.weight - first.qkv.weight).std().item() == pytest.approx(0.5, rel=0.15)


def test_orthogonal_layers_stay_orthogonal():
    layer = CBSA(16, 2, orthogonal=True)
    noisy = interpret.noisy_copy(layer, 0.5).qkv.weight.detach()
    assert not torch.allclose(noisy, layer.qkv.weight, atol=1e-2)
    assert torch.allclose(noisy @ noisy.T, torch.eye(16), atol=1e-5)


def test_noise_on_chosen_layers_of_timm():
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=12, num_heads=2, img_size=32)
    noisy = interpret.noisy_copy(vit, 0.1, layers=[1])
    assert {name.split(".attn")[0] for name in changed(state(vit), state(noisy))} == {"blocks.1"}


def test_robustness_is_the_metric_under_each_noise(model):
    def metric(m):
        return m.blocks[0].attn.step_tokens.sum() + m.blocks[2].attn.qkv.weight.sum()

    before = state(model)
    result = interpret.robustness(model, metric, sigmas=(0, 0.5), seeds=(4, 5), layers=["blocks.0.attn", 2])
    assert changed(before, state(model)) == set()
    assert (result.sigmas, result.layers) == ([0.0, 0.5], ["blocks.0.attn", "blocks.2.attn"])
    assert result.clean == metric(model).item()
    assert result.values[0] == [result.clean] * 2
    noisy = [metric(interpret.noisy_copy(model, 0.5, layers=[0, 2], seed=seed)).item() for seed in (4, 5)]
    assert result.values[1] == noisy
    everything = interpret.robustness(model, metric, sigmas=[0.1], seeds=[0])
    assert everything.layers == [f"blocks.{i}.attn" for i in range(3)]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: interpret.noisy_copy(m, -0.1), ValueError, "sigma must not be negative, got -0.1"),
        (lambda m: interpret.noisy_copy(m, math.nan), ValueError, "sigma must be finite"),
        (lambda m: interpret.noisy_copy(m, "1"), TypeError, "sigma must be a number"),
        (lambda m: interpret.noisy_copy(m, 1.0, seed=0.5), TypeError, "seed must be an int"),
        (lambda m: interpret.noisy_copy(m, 1.0, layers=[3]), IndexError, "no attention layer 3; there are 3"),
        (lambda m: interpret.noisy_copy(ISTA(4), 1.0), ValueError, "ISTA has no CBSA layer"),
        (lambda m: interpret.robustness(m, None), TypeError, "metric must be callable"),
        (lambda m: interpret.robustness(m, lambda m: "a"), TypeError, "metric must return a number"),
        (lambda m: interpret.robustness(m, len, sigmas=[]), ValueError, "sigmas must hold at least one"),
        (lambda m: interpret.robustness(m, len, sigmas=[1, -1]), ValueError, "sigmas must not be negative"),
        (lambda m: interpret.robustness(m, len, seeds=[]), ValueError, "seeds must hold at least one"),
        (lambda m: interpret.robustness(m, len, seeds=["a"]), TypeError, "seeds must be an int"),
    ],
)
def test_bad_arguments_are_named(model, call, kind, message):
    with pytest.raises(kind, match=message):
        call(model)
