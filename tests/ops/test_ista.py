import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cbsa_torch import ops
from cbsa_torch.ops.ista import ista_equation
from tests.helpers import golden
from tests.helpers.compare import assert_close

MANY, FEW = (3, 7, 5), (2, 5)
"""Shapes of tokens for one product (21 tokens of 5 channels) and for two."""


def _problem(shape, dtype=torch.float64):
    x, d = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], shape[-1], dtype=dtype)
    return x.requires_grad_(), d.requires_grad_()


def _flops(x, d):
    with FlopCounterMode(display=False) as counter:
        ops.ista_step(x, d)
    return counter.get_total_flops()


def test_parity_with_the_official_layer():
    data, _ = golden.load("layer_ista")
    x, weight = data["input"].requires_grad_(), data["param.weight"].requires_grad_()
    out = ops.ista_step(x, weight)
    out.backward(data["grad_output"])
    assert_close(out, data["output"], 1e-10)
    assert_close(x.grad, data["grad_input"], 1e-10)
    assert_close(weight.grad, data["grad.weight"], 1e-10)


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_is_a_proximal_gradient_step(shape):
    """The smooth part's gradient is autograd's; the rest is the proximal map of the non-negative l1 term."""
    x, d = _problem(shape)
    code = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(0.5 * ((x - code @ d.T) ** 2).sum(), code)
    expected = (x - 0.2 * gradient - 0.2 * 0.3).clamp(min=0)
    assert_close(ops.ista_step(x, d, step_size=0.2, sparsity=0.3), expected, 1e-12)


@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x.transpose(0, 1), lambda x: x[:, ::2], lambda x: x[0, 0]]
)
def test_one_product_equals_the_equation_with_gradients(view):
    x, d = _problem((6, 9, 5))
    found, expected = ops.ista_step(view(x), d), ista_equation(view(x), d, 0.1, 0.1)
    assert_close(found, expected, 1e-12)
    weight = torch.randn_like(found)
    for one, two in zip(
        torch.autograd.grad(found, (x, d), weight), torch.autograd.grad(expected, (x, d), weight), strict=True
    ):
        assert_close(one, two, 1e-12)


def test_number_of_products_follows_the_number_of_tokens():
    x, d = torch.randn(5, 2, 6), torch.randn(6, 6)
    assert _flops(x, d) == 2 * (6**3 + 10 * 6**2)  # D^T D, and one with the tokens
    assert _flops(x[:, :1], d) == 2 * (2 * 5 * 6**2)  # two with the tokens
    assert _kept(x[:, :1], d) == 3  # x, the residual and the code
    assert _kept(x, d) == 2  # x and the code


def _kept(x, d):
    """How many tensors of the size of the tokens are kept for the backward pass."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        ops.ista_step(x.clone().requires_grad_(), d.clone().requires_grad_())
    return len({t.data_ptr() for t in saved if t.numel() == x.numel()})


@pytest.mark.parametrize("shape", [MANY, FEW])
def test_derivatives(shape):
    x, d = _problem(shape)
    assert torch.autograd.gradcheck(ops.ista_step, (x, d))
    assert torch.autograd.gradgradcheck(ops.ista_step, (x, d))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # of torch's own forward-mode formulas
def test_torch_func():
    x, d = _problem((4, 8, 5))
    x, d = x.detach(), torch.stack([d, 2 * d]).detach()
    expected = torch.stack([ista_equation(x, one, 0.1, 0.1) for one in d])
    assert_close(torch.func.vmap(ops.ista_step, (None, 0))(x, d), expected, 1e-12)
    assert_close(torch.func.vmap(ops.ista_step, (0, None))(x, d[0]), expected[0], 1e-12)
    per_item = torch.func.vmap(torch.func.grad(lambda x, d: ops.ista_step(x, d).sum()), (0, None))(x, d[0])
    whole = x.clone().requires_grad_()
    ista_equation(whole, d[0], 0.1, 0.1).sum().backward()
    assert_close(per_item, whole.grad, 1e-12)
    _, found = torch.func.jvp(lambda x: ops.ista_step(x, d[0]), (x,), (x,))
    _, tangent = torch.func.jvp(lambda x: ista_equation(x, d[0], 0.1, 0.1), (x,), (x,))
    assert_close(found, tangent, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_is_as_near_as_two_products(dtype, autocast):
    given = [torch.randn(8, 50, 48), torch.randn(48, 48) / 48**0.5]
    given = [(t if autocast else t.to(dtype)).requires_grad_() for t in given]
    wide = [t.detach().double().requires_grad_() for t in given]
    # Outputs that rounding may take across the kink of the relu have no part in the gradients.
    before_relu = ista_equation(*wide, 0.1, -100.0) - 0.1 * 100.1
    weight = torch.randn(8, 50, 48) * (before_relu.detach().abs() > 0.06)

    def derive(form, tensors):
        code = form(*tensors, 0.1, 0.1)
        return code, *torch.autograd.grad(code, tensors, weight.to(code.dtype))

    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        found = derive(lambda x, d, *_: ops.ista_step(x, d), given)
        two = derive(ista_equation, given)
    for one, other, exact in zip(found, two, derive(ista_equation, wide), strict=True):
        assert one.dtype == other.dtype
        assert (one - exact).norm() <= 2 * (other - exact).norm()
        assert (one - exact).abs().max() <= 2 * (other - exact).abs().max()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"dictionary must have shape \(D, D\) = \(4, 4\), got \(4, 5\)"):
        ops.ista_step(torch.zeros(3, 4), torch.zeros(4, 5))
    with pytest.raises(TypeError, match="tokens must have a floating"):
        ops.ista_step(torch.zeros(3, 4, dtype=torch.long), torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"dictionary must have shape \(D, D\) = \(5, 5\), got \(1, 5\)"):
        ops.ista_matrix(torch.zeros(1, 5))
    with pytest.raises(TypeError, match="dictionary must have a floating"):
        ops.ista_matrix(torch.zeros(4, 4, dtype=torch.long))
