import importlib
import math
import signal
import threading

import pytest
import timm
import torch
from torch import nn

import cbsa_torch.models  # noqa: F401
from cbsa_torch import CBSA, MSSA, interpret
from cbsa_torch.nn import ISTA


@pytest.fixture
def model():
    options = {"embed_dim": 16, "depth": 3, "num_heads": 2, "num_representatives": 9}
    return timm.create_model("cbt_pico_patch1_8", **options).eval()


def bits(model):
    """The bytes of all parameters and buffers: tells -0.0 from 0.0, and NaN from NaN."""
    return {
        name: bytes(t.detach().contiguous().view(-1).view(torch.uint8))
        for name, t in model.state_dict().items()
    }


def changed(before, after):
    return {name for name in before if before[name] != after[name]}


def test_noise_is_on_every_parameter_of_the_layers_and_nowhere_else(model):
    before = bits(model)
    with interpret.parameter_noise(model, 0.1):
        inside = bits(model)
    expected = {name for name, _ in model.named_parameters() if ".attn." in name}
    assert changed(before, inside) == expected
    assert len(expected) == 15  # qkv, the projection and its bias, both steps, three times
    assert bits(model) == before


@pytest.mark.parametrize("layers", [["blocks.1.attn"], [1], [-2], [1, "blocks.1.attn"]])
def test_noise_on_chosen_layers(model, layers):
    before = bits(model)
    with interpret.parameter_noise(model, 0.1, layers=layers):
        assert {name.split(".attn")[0] for name in changed(before, bits(model))} == {"blocks.1"}


def test_noise_is_gaussian_of_the_given_size():
    layer = MSSA(128, 4)
    before = layer.qkv.weight.detach().clone()
    with interpret.parameter_noise(layer, 0.3, seed=3):
        noise = (layer.qkv.weight - before).detach()
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    within = (noise.abs() < 0.3).float().mean().item()  # one standard deviation
    assert within == pytest.approx(0.6827, abs=0.01)


def test_noise_is_that_of_the_seed_scaled_and_leaves_the_global_generator_alone(model):
    weight = model.blocks[0].attn.qkv.weight
    before, state = weight.detach().clone(), torch.get_rng_state()
    noises = []
    for sigma, seed in ((0.1, 0), (0.1, 0), (0.2, 0), (0.1, 1)):
        with interpret.parameter_noise(model, sigma, seed=seed):
            noises.append((weight - before).detach())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(noises[0], noises[1])
    assert torch.allclose(noises[2], 2 * noises[0], atol=1e-6)
    assert not torch.allclose(noises[3], noises[0], atol=1e-2)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_weights_are_restored_to_the_bit(model, error):
    with torch.no_grad():
        weight = model.blocks[0].attn.qkv.weight
        weight[0, :3] = torch.tensor([-0.0, math.nan, math.inf])
    before, identities = bits(model), [id(p) for p in model.parameters()]
    with pytest.raises(error), interpret.parameter_noise(model, 1.0):
        raise error
    assert bits(model) == before
    with interpret.parameter_noise(model, 1.0), torch.no_grad():
        weight.zero_()  # what the block writes is undone too
    assert bits(model) == before
    assert [id(p) for p in model.parameters()] == identities
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["_disturb", "_restore"])
def test_weights_are_restored_when_ctrl_c_comes_between_parameters(model, monkeypatch, name):
    module = importlib.import_module(
        "cbsa_torch.interpret.robustness"
    )  # the package has a function of that name
    original, calls = getattr(module, name), []

    def interrupted(items, *args):
        calls.append(name)
        if len(calls) > 1:
            return original(items, *args)
        original(items[:4], *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, name, interrupted)
    before = bits(model)
    with pytest.raises(KeyboardInterrupt), interpret.parameter_noise(model, 1.0):
        pass
    assert bits(model) == before


def by_hand():
    raise KeyboardInterrupt


@pytest.mark.parametrize("interrupt", [by_hand, lambda: signal.raise_signal(signal.SIGINT)])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("reached", [1, 3, 15])
def test_weights_are_restored_when_ctrl_c_comes_at_every_copy(model, monkeypatch, interrupt, after, reached):
    """Once at every parameter's restoring, and (from the ``reached``-th on) while the noise is written."""
    copy, seen, restoring = torch.Tensor.copy_, {}, []

    def interrupted(self, other):
        key = id(self), len(restoring)
        seen[key] = seen.get(key, 0) + 1
        due = seen[key] == 1 and (restoring or len(seen) >= reached)
        if due and not restoring:
            restoring.append(True)
            raise KeyboardInterrupt
        if due and not after:
            interrupt()
        result = copy(self, other)
        if due and after:
            interrupt()
        return result

    before, handler = bits(model), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt), interpret.parameter_noise(model, 1.0):
        pytest.fail("the noise was interrupted")
    monkeypatch.undo()
    assert sum(phase for _, phase in seen) == 15  # every parameter was restored, each interrupted
    assert bits(model) == before
    assert signal.getsignal(signal.SIGINT) is handler


def test_ctrl_c_while_weights_are_restored_is_heard_after(model, monkeypatch):
    copy, states, inside = torch.Tensor.copy_, [], []

    def interrupted(self, other):
        result = copy(self, other)
        if inside:
            signal.raise_signal(signal.SIGINT)
        return result

    def heard(number, frame):
        states.append(bits(model))

    before = bits(model)
    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    usual = signal.signal(signal.SIGINT, heard)
    try:
        with interpret.parameter_noise(model, 1.0):
            inside.append(True)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert states == [before]  # once, when all was restored


def test_one_parameter_that_cannot_be_restored_does_not_keep_the_others(model, monkeypatch):
    copy, inside = torch.Tensor.copy_, []
    broken = model.blocks[1].attn.step_tokens

    def failing(self, other):
        if inside and self is broken:
            raise RuntimeError("no device")
        return copy(self, other)

    before = bits(model)
    monkeypatch.setattr(torch.Tensor, "copy_", failing)
    with pytest.raises(RuntimeError, match="no device"), interpret.parameter_noise(model, 1.0):
        inside.append(True)
    assert changed(before, bits(model)) == {"blocks.1.attn.step_tokens"}


def test_in_another_thread(model):
    before, inside = bits(model), []

    def work():
        with interpret.parameter_noise(model, 1.0):
            inside.append(bits(model))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside[0] != before
    assert bits(model) == before


def test_no_noise_at_sigma_zero(model):
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0] = -0.0  # -0.0 + 0.0 is 0.0
    before = bits(model)
    with interpret.parameter_noise(model, 0):
        assert bits(model) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    layer = MSSA(64, 2).to(dtype)
    before, values = bits(layer), layer.qkv.weight.detach().double().clone()
    with interpret.parameter_noise(layer, 0.5):
        assert layer.qkv.weight.dtype == dtype
        assert (layer.qkv.weight.double() - values).std().item() == pytest.approx(0.5, rel=0.1)
    assert bits(layer) == before


def test_shared_parameters_get_noise_once():
    first, second, third = MSSA(16, 2), MSSA(16, 2), MSSA(16, 2)
    second.qkv.weight = first.qkv.weight
    third.qkv.weight = nn.Parameter(first.qkv.weight.data)  # another parameter in the same memory
    model = nn.Sequential(first, second, third)
    before, values = bits(model), first.qkv.weight.detach().clone()
    with interpret.parameter_noise(model, 0.5, layers=[0, 1]):
        assert (first.qkv.weight - values).std().item() == pytest.approx(0.5, rel=0.15)
    assert bits(model) == before
    with interpret.parameter_noise(model, 0.5):
        pass
    assert bits(model) == before


def test_orthogonal_layers_stay_orthogonal():
    layer = CBSA(16, 2, orthogonal=True)
    before, basis = bits(layer), layer.qkv.weight.detach().clone()
    with interpret.parameter_noise(layer, 0.5):
        noisy = layer.qkv.weight.detach()
        assert not torch.allclose(noisy, basis, atol=1e-2)
        assert torch.allclose(noisy @ noisy.T, torch.eye(16), atol=1e-5)
    assert bits(layer) == before
    assert torch.equal(layer.qkv.weight, basis)


def test_attention_of_timm_is_found():
    vit = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=12, num_heads=2, img_size=32)
    before = bits(vit)
    with interpret.parameter_noise(vit, 0.1, layers=[1]):
        assert {name.split(".attn")[0] for name in changed(before, bits(vit))} == {"blocks.1"}


def test_robustness_is_the_metric_under_each_noise(model):
    def metric(m):
        return m.blocks[0].attn.step_tokens.sum()

    before = bits(model)
    result = interpret.robustness(model, metric, sigmas=(0, 0.5), seeds=(4, 5), layers=["blocks.0.attn"])
    assert bits(model) == before
    assert (result.sigmas, result.layers) == ([0.0, 0.5], ["blocks.0.attn"])
    assert result.clean == metric(model).item()
    assert result.values[0] == [result.clean] * 2
    for value, seed in zip(result.values[1], (4, 5), strict=True):
        with interpret.parameter_noise(model, 0.5, layers=[0], seed=seed):
            assert value == metric(model).item()
    everything = interpret.robustness(model, metric, sigmas=[0.1], seeds=[0])
    assert everything.layers == [f"blocks.{i}.attn" for i in range(3)]


def test_robustness_restores_weights_when_the_metric_fails(model):
    before, calls = bits(model), []

    def metric(m):
        calls.append(m)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        interpret.robustness(model, metric)
    assert bits(model) == before


def enter(model, sigma, **options):
    with interpret.parameter_noise(model, sigma, **options):
        pass


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: enter(m, -0.1), ValueError, "sigma must not be negative, got -0.1"),
        (lambda m: enter(m, math.nan), ValueError, "sigma must be finite"),
        (lambda m: enter(m, math.inf), ValueError, "sigma must be finite"),
        (lambda m: enter(m, "1"), TypeError, "sigma must be a number"),
        (lambda m: enter(m, 1.0, seed=0.5), TypeError, "seed must be an int"),
        (
            lambda m: enter(m, 1.0, layers=["blocks.9.attn"]),
            ValueError,
            "no attention layer 'blocks.9.attn'; did you mean",
        ),
        (lambda m: enter(m, 1.0, layers=[3]), IndexError, "no attention layer 3; there are 3"),
        (lambda m: enter(m, 1.0, layers=[]), ValueError, "at least one name or index"),
        (lambda m: enter(m, 1.0, layers="blocks.0.attn"), TypeError, "layers must be a sequence"),
        (lambda m: enter(m, 1.0, layers=[1.5]), TypeError, "names and indices, got 1.5"),
        (lambda m: enter(ISTA(4), 1.0), ValueError, "ISTA has no CBSA layer"),
        (lambda m: interpret.robustness(m, None), TypeError, "metric must be callable"),
        (lambda m: interpret.robustness(m, lambda m: "a"), TypeError, "metric must return a number"),
        (
            lambda m: interpret.robustness(m, lambda m: 1, sigmas=[]),
            ValueError,
            "sigmas must hold at least one",
        ),
        (
            lambda m: interpret.robustness(m, lambda m: 1, sigmas=[1, -1]),
            ValueError,
            "sigmas must not be negative",
        ),
        (lambda m: interpret.robustness(m, lambda m: 1, seeds=[]), ValueError, "seeds must hold at least one"),
        (lambda m: interpret.robustness(m, lambda m: 1, seeds=["a"]), TypeError, "seeds must be an int"),
    ],
)
def test_bad_arguments_are_named(model, call, kind, message):
    before = bits(model)
    with pytest.raises(kind, match=message):
        call(model)
    assert bits(model) == before
