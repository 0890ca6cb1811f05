"""CBSA layers that hand their output projection to the operator, and what they keep in memory."""

import pytest
import torch

from cbsa_torch import CBSA
from cbsa_torch.bench import measure
from cbsa_torch.bench.baselines import NaiveCBSA
from cbsa_torch.ops.cbsa import api
from tests.helpers.compare import relative_error


@pytest.fixture
def always_folded(monkeypatch):
    monkeypatch.setattr(api, "folds", lambda *_: True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_low_precision_is_as_good_as_eager(dtype):
    torch.manual_seed(0)
    exact = CBSA(32, 2, num_representatives=16, num_prefix_tokens=0, impl="eager").double()
    x = torch.randn(2, 900, 32)
    results = {}
    for impl, layer in (("tiled", exact), ("eager", exact), ("oracle", exact)):
        kind = torch.float64 if impl == "oracle" else dtype
        copy = CBSA(
            32, 2, num_representatives=16, num_prefix_tokens=0, impl="eager" if impl == "oracle" else impl
        )
        copy.load_state_dict(layer.state_dict())
        copy.to(dtype).to(kind)  # the oracle gets the rounded weights, too
        inputs = x.to(dtype).to(kind).requires_grad_()
        out = copy(inputs)
        grads = torch.autograd.grad(out.float().square().sum(), [inputs, *copy.parameters()])
        results[impl] = [out, *grads]
    for fast, eager, oracle in zip(*results.values(), strict=True):
        error, allowed = (relative_error(t.double(), oracle) for t in (fast, eager))
        assert error <= 2 * allowed + 1e-3


@pytest.mark.usefixtures("always_folded")
def test_hooks_and_subclasses_of_the_projection_still_run():
    x = torch.randn(1, 49, 16)
    layer = CBSA(16, 2, num_representatives=4, impl="tiled")
    expected, calls = layer(x), []
    handle = layer.proj.register_forward_hook(lambda *_: calls.append("hook"))
    assert relative_error(layer(x), expected) < 1e-5
    assert calls == ["hook"]
    handle.remove()

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            calls.append("subclass")
            return super().forward(x)

    adapted = Adapted(16, 16)
    adapted.load_state_dict(layer.proj.state_dict())
    layer.proj = adapted
    assert relative_error(layer(x), expected) < 1e-5
    assert calls == ["hook", "subclass"]


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"recompute": True}, {"qkv": "separate"}], ids=str)
@pytest.mark.usefixtures("always_folded")
def test_derivatives_of_layers_agree_whatever_computes_them(options):
    """Pooled representatives are functions of the keys: nothing may count twice."""
    layer = CBSA(8, 2, num_representatives=4, **options).double()
    x = torch.randn(2, 17, 8, dtype=torch.float64)  # a class token and 4 x 4
    results = []
    for layer.impl in ("eager", "tiled"):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        once = torch.autograd.grad(out.square().sum(), [leaf, *layer.parameters()])
        (first,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        results.append([out, *once, first, second])
        assert relative_error(first, once[0]) < 1e-12
    for a, b in zip(*results, strict=True):
        assert relative_error(b, a) < 1e-10


def test_second_gradients_after_autocast():
    layer = CBSA(16, 2, num_representatives=4, impl="tiled")
    x = torch.randn(1, 901, 16)
    results = []
    for layer.impl in ("tiled", "eager"):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(leaf)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), leaf)[0])
    assert relative_error(*results) < 0.05


def test_replaced_and_globally_hooked_projections_run(monkeypatch):
    layer, x, calls = CBSA(16, 2, num_representatives=4, impl="tiled"), torch.randn(1, 49, 16), []
    forward = layer.proj.forward
    layer.proj.forward = lambda t: (calls.append("replaced"), forward(t))[1]
    layer(x)
    assert calls == ["replaced"]
    del layer.proj.forward
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(m))
    try:
        layer(x)
    finally:
        handle.remove()
    assert layer.proj in calls


def memory(layer, x):
    """What a layer keeps for its backward pass and what a training step allocates, in units of the input."""
    gradient, unit = torch.ones_like(x), x.numel() * x.element_size()
    measure.step(layer, x, gradient)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    kept = measure.memory(lambda: layer(x), "cpu").left / unit  # the output is not kept, the input is
    return kept, measure.memory(lambda: measure.step(layer, x, gradient), "cpu").peak / unit


def test_what_a_layer_keeps_and_allocates():
    x = torch.randn(1, 1 + 64**2, 384, requires_grad=True)
    options = {"num_prefix_tokens": 1}
    kept, peak = memory(CBSA(384, 6, **options), x)  # "auto"
    kept_again, peak_again = memory(CBSA(384, 6, **options, recompute=True), x)
    kept_plain, peak_plain = memory(NaiveCBSA(384, 6), x)
    assert kept < 2.1
    assert kept_again < 1.1
    assert kept_plain > 5
    assert peak < 0.6 * peak_plain
    assert peak_again < 0.65 * peak_plain


@pytest.mark.parametrize("tied", [False, True])
def test_recomputing_changes_nothing(tied):
    x = torch.randn(2, 17, 8, dtype=torch.float64)
    mask = torch.rand(2, 17) > 0.2
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer = CBSA(
            8, 2, num_representatives=4, tied=tied, orthogonal=tied, proj_drop=0.5, recompute=recompute
        )
        layer.double()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        out = layer(leaf, token_mask=mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_recomputing_compiles():
    layer = CBSA(8, 2, num_representatives=4, recompute=True)
    x = torch.randn(1, 17, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    layer(x).sum().backward()
    expected = layer.qkv.weight.grad.clone()
    layer.zero_grad()
    compiled(x).sum().backward()
    assert relative_error(layer.qkv.weight.grad, expected) < 1e-5
