"""The operators of torch.library: their contracts, derivatives of both orders, compilers, counted products."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cbsa_torch.ops.cbsa.flops  # noqa: F401  (registers the formulas)
from cbsa_torch import CBSA, ops
from cbsa_torch.ops.cbsa import api, tiles
from cbsa_torch.ops.cbsa.driver import Problem
from cbsa_torch.ops.cbsa.library import _PROBLEM, _TENSORS, cbsa_op
from tests.helpers.compare import relative_error
from tests.helpers.operator import CONTRACTIONS, apply, draw


@pytest.fixture
def always_folded(monkeypatch):
    monkeypatch.setattr(api, "folds", lambda *_: True)


def test_the_schema_lists_the_fields_of_a_problem_tensors_first():
    arguments = (argument.split("=")[0].split() for argument in _PROBLEM.split(", "))
    kinds, names = zip(*arguments, strict=True)
    assert names == Problem._fields
    assert all(kind.startswith("Tensor") == (i < _TENSORS) for i, kind in enumerate(kinds))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of opcheck itself
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize(("dtype", "separate"), [(torch.float64, True), (torch.bfloat16, False)])
def test_opcheck(dtype, separate, channels):
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    values = leaf(2, 2, 5, 4) if separate else None
    mask = torch.tensor([[True] * 5, [True, False] * 2 + [True]])
    projection = (None, None) if channels is None else (leaf(channels, 8), None if separate else leaf(channels))
    problem = Problem(
        leaf(2, 2, 3, 4), leaf(2, 2, 5, 4), values, leaf(2), leaf(2), mask, None, *projection, *[None] * 4,
        "softmax", 0.5, 0.1, "tiled",
    )  # fmt: skip
    torch.library.opcheck(cbsa_op, tuple(problem))


@pytest.mark.usefixtures("always_folded")
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_gradcheck(contraction, channels, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 3)
    tensors = draw(2, 1, 3, 7, 2, channels=channels)
    mask = torch.tensor([[True] * 5 + [False] * 2, [False, True] * 3 + [True]])

    def run(*leaves):
        named = dict(zip(tensors, leaves, strict=True))
        return apply("tiled", named, contraction=contraction, token_mask=mask, eps=0.5)

    torch.autograd.gradcheck(run, [t.requires_grad_() for t in tensors.values()])


@pytest.mark.usefixtures("always_folded")
@pytest.mark.parametrize("channels", [None, 3])
def test_gradients_can_be_differentiated(channels):
    tensors = draw(2, 1, 2, 4, 2, channels=channels)

    def run(*leaves):
        return apply("tiled", dict(zip(tensors, leaves, strict=True)))

    torch.autograd.gradgradcheck(run, [t.requires_grad_() for t in tensors.values()])


def test_compiles_and_exports():
    layer = CBSA(12, 3, num_representatives=4, impl="tiled").eval()
    x = torch.randn(2, 35, 12)
    expected = layer(x, grid_size=(5, 7))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x, grid_size=(5, 7)), expected) < 1e-5
    exported = torch.export.export(layer, (x,), {"grid_size": (5, 7)})
    assert relative_error(exported.module()(x, grid_size=(5, 7)), expected) < 1e-5


def test_lengths_may_stay_open_in_an_export():
    layer = CBSA(8, 2, num_representatives=4, representatives="learned", impl="tiled").eval()
    length = torch.export.Dim("length", min=2, max=100_000)
    program = torch.export.export(layer, (torch.randn(1, 50, 8),), dynamic_shapes=({1: length},))
    for n in (3, 2048, 5000):
        x = torch.randn(1, n, 8)
        assert relative_error(program.module()(x), layer(x)) < 1e-5


def test_numbers_may_become_symbols():
    compiled = torch.compile(ops.cbsa, fullgraph=True, dynamic=True, backend="aot_eager")
    tokens, rep = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 3, 4)
    assert relative_error(compiled(tokens, rep, step_tokens=0.7), ops.cbsa(tokens, rep, step_tokens=0.7)) < 1e-5


@pytest.mark.parametrize("contraction", CONTRACTIONS)
@pytest.mark.parametrize("channels", [None, 7])
def test_the_counter_of_torch_sees_the_products_of_the_equations(contraction, channels):
    tensors = {name: t.requires_grad_() for name, t in draw(1, 3, 4, 9, 5, channels=channels).items()}
    tensors.pop("out_bias", None)
    counts = []
    for impl in ("tiled", "eager"):
        with FlopCounterMode(display=False) as counter:
            out = apply(impl, tensors, contraction=contraction)
            if contraction != "exact":  # torch differentiates the solution of a system by products of its own
                torch.autograd.grad(out.sum(), list(tensors.values()))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
