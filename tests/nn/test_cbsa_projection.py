"""CBSA layers that hand their output projection to the operator, and what they keep in memory."""

import copy

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
    results = []
    for impl, kind in (("tiled", dtype), ("eager", dtype), ("eager", torch.float64)):
        layer = copy.deepcopy(exact).to(dtype).to(kind)  # all get the rounded weights
        layer.impl = impl
        inputs = x.to(dtype).to(kind).requires_grad_()
        out = layer(inputs)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), [inputs, *layer.parameters()])])
    for fast, eager, oracle in zip(*results, strict=True):
        error, allowed = (relative_error(t.double(), oracle) for t in (fast, eager))
        assert error <= 2 * allowed + 1e-3


class Counting(torch.nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("how", ["hook", "global hook", "forward", "subclass"])
@pytest.mark.usefixtures("always_folded")
def test_a_projection_that_was_changed_is_called(how):
    x, calls = torch.randn(1, 49, 16), []
    layer = CBSA(16, 2, num_representatives=4, impl="tiled")
    expected, proj = layer(x), layer.proj
    if how == "hook":
        proj.register_forward_hook(lambda *_: calls.append("hook"))
    elif how == "global hook":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(m))
    elif how == "forward":
        proj.forward = lambda t: (calls.append("forward"), torch.nn.Linear.forward(proj, t))[1]
    else:
        layer.proj = Counting(16, 16)
        layer.proj.load_state_dict(proj.state_dict())
    assert relative_error(layer(x), expected) < 1e-5
    if how == "global hook":
        handle.remove()
        assert proj in calls
    else:
        assert calls == [how] or layer.proj.calls == 1


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
