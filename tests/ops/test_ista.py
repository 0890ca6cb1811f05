import pytest
import torch

from cbsa_torch import ops
from tests.helpers import golden
from tests.helpers.compare import assert_close


def test_parity_with_the_official_layer():
    data, _ = golden.load("layer_ista")
    x, weight = data["input"].requires_grad_(), data["param.weight"].requires_grad_()
    out = ops.ista_step(x, weight)
    out.backward(data["grad_output"])
    assert_close(out, data["output"], 1e-10)
    assert_close(x.grad, data["grad_input"], 1e-10)
    assert_close(weight.grad, data["grad.weight"], 1e-10)


def test_is_a_proximal_gradient_step():
    """The smooth part's gradient is autograd's; the rest is the proximal map of the non-negative l1 term."""
    x, d = torch.randn(7, 4).double(), torch.randn(4, 4).double()
    code = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(0.5 * ((x - code @ d.T) ** 2).sum(), code)
    expected = (x - 0.2 * gradient - 0.2 * 0.3).clamp(min=0)
    assert_close(ops.ista_step(x, d, step_size=0.2, sparsity=0.3), expected, 1e-12)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"dictionary must have shape \(D, D\) = \(4, 4\), got \(4, 5\)"):
        ops.ista_step(torch.zeros(3, 4), torch.zeros(4, 5))
    with pytest.raises(TypeError, match="tokens must have a floating"):
        ops.ista_step(torch.zeros(3, 4, dtype=torch.long), torch.zeros(4, 4))
