"""Random inputs of CBSA, and its value and gradients by one implementation."""

import torch

from cbsa_torch import ops
from cbsa_torch.ops.cbsa.api import run_and_project
from tests.helpers.compare import relative_error

CONTRACTIONS = ("softmax", "exact", "none")


def draw(b, h, m, n, p, *, separate=False, channels=None, dtype=torch.float64):
    """Tensors by name; with ``channels`` also an output projection."""

    def rand(*shape):
        return torch.randn(*shape, dtype=dtype)

    tensors = {"tokens": rand(b, h, n, p), "representatives": rand(b, h, m, p)}
    if separate:
        tensors |= {"keys": rand(b, h, n, p), "values": rand(b, h, n, p)}
    tensors |= {"step_representatives": rand(h), "step_tokens": rand(h)}
    if channels is not None:
        tensors |= {"out_weight": rand(channels, h * p), "out_bias": rand(channels)}
    return tensors


def apply(impl, tensors, **options):
    """CBSA of what :func:`draw` returns, projected out if it has a projection."""
    inputs = {name: t for name, t in tensors.items() if not name.startswith("out_")}
    if "out_weight" not in tensors:
        return ops.cbsa(**inputs, **options, impl=impl)
    bias = tensors.get("out_bias")
    return run_and_project(ops.cbsa_inputs(**inputs, **options), tensors["out_weight"], bias, impl)


def evaluate(impl, tensors, gradient=None, **options):
    """The output and the gradients of all tensors, by name; default for the output's: always the same numbers."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    output = apply(impl, leaves, **options)
    if gradient is None:
        generator = torch.Generator().manual_seed(7)
        gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    found = torch.autograd.grad(
        output, list(leaves.values()), gradient.expand_as(output), allow_unused=True, materialize_grads=True
    )
    return {"output": output.detach(), **dict(zip(leaves, found, strict=True))}


def assert_same(found, expected, tolerance):
    """All by name within ``tolerance``, relative to the largest entry or absolute, and finite."""
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.isfinite(found[name]).all(), name
        difference = (found[name] - value).abs().max() if value.numel() else 0.0
        close = difference <= tolerance or relative_error(found[name], value) <= tolerance
        assert close, f"{name}: relative error {relative_error(found[name], value):.3g}"
