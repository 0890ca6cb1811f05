"""The certified step: its theorem on random problems, its limit, and the same step over tiles."""

import math
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cbsa_torch import CBSA, ops
from cbsa_torch.ops import GridPooling, Representatives
from cbsa_torch.ops.cbsa import api, tiles
from cbsa_torch.ops.cbsa.certified import MARGIN, largest_eigenvalue_bound, limit
from cbsa_torch.ops.cbsa.driver import Problem, backward, forward
from cbsa_torch.ops.cbsa.inputs import certified_inputs
from cbsa_torch.ops.cbsa.library import cbsa_op
from tests.helpers.compare import assert_close
from tests.helpers.memory import Largest, saved_sizes
from tests.helpers.mixers import mean_and_first
from tests.helpers.operator import assert_same

KINDS = ("pool", "learned", "tokens", "principal", "basis", "constant", "weights")
SLACK = 1
"""Times min(M, P) u cond^1/2: what rounding may take from a fall, for cond = 1 + alpha |X|^2."""


class Weighted(torch.nn.Module):
    """A strategy of one's own that tells its weights: random ones, of either sign."""

    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, tokens, grid_size, token_mask):
        weights = torch.randn(tokens.shape[0], self.m, tokens.shape[2], dtype=tokens.dtype)
        if token_mask is not None:
            weights = weights.masked_fill(~token_mask[:, None], 0.0)
        real = tokens if token_mask is None else tokens.masked_fill(~token_mask[:, None, :, None], 0.0)
        exists = torch.rand(tokens.shape[0], self.m) > 0.2
        values = (weights[:, None] @ real + 0.3).masked_fill(~exists[:, None, :, None], 0.0)
        return Representatives(values, exists, token_weights=weights)


def rate(x, count, eps):
    """R of Eq. 1 by singular values, ``(B, H)``; ``count`` ``(B, 1)`` of the rows exist, the others are zero."""
    alpha = x.shape[-1] / (count.double() * eps**2)
    return torch.log1p(alpha[..., None] * torch.linalg.svdvals(x) ** 2).sum(-1) / 2


def certificate(stages, eps, kappa):
    """The fall of the rate by a step of ``kappa`` ``(B, H)``, what is guaranteed, and what rounding may take."""
    x, c, b = (t.double() for t in (stages.extracted, stages.contracted, stages.broadcast_attention))
    m, p = x.shape[-2:]
    mask = stages.representative_mask
    count = torch.tensor([[m]]) if mask is None else mask.sum(-1, keepdim=True).clamp(min=1)
    alpha = p / (count.double() * eps**2)
    gram = b.mT @ b
    norm = torch.linalg.matrix_norm(gram, 2)
    after = x - kappa[..., None, None] * (b.mT @ (b @ c))
    fall = rate(x, count, eps) - rate(after, count, eps)
    guaranteed = alpha * kappa * (1 - kappa * norm / 2) * (c * (gram @ c)).sum((-2, -1))
    unit = torch.finfo(stages.extracted.dtype).eps
    tolerance = SLACK * min(m, p) * unit * (1 + alpha * torch.linalg.matrix_norm(x, 2) ** 2).sqrt()
    return fall, guaranteed, tolerance, norm


def random_problem(draw, dtype=torch.float64):
    """A layer of random sizes and parameters, and the arguments it is called with."""
    kind, p, h = draw.choice(KINDS), draw.randint(2, 9), draw.randint(1, 3)
    grid = draw.choice([(draw.randint(1, 20),), (draw.randint(1, 5), draw.randint(1, 6)), (2, 3, 2)])
    prefix = draw.choice([0, 0, 1, 2])
    own = {"constant": mean_and_first, "weights": Weighted(draw.randint(1, 12))}
    options = {"num_representatives": draw.randint(1, 12)} if kind in ("pool", "learned") else {}
    layer = CBSA(
        h * p + draw.randint(0, 3), h, head_dim=p, step="certified", representatives=own.get(kind, kind),
        eps=10 ** draw.uniform(-2, 1), num_prefix_tokens=prefix, dtype=dtype, **options,
    )  # fmt: skip
    with torch.no_grad():
        layer.step_logit.uniform_(-5, 5)
    n = prefix + math.prod(grid)
    x = torch.randn(2, n, layer.dim, dtype=dtype) * 10 ** draw.uniform(-3, 3)
    mask = torch.rand(2, n) > 0.4 if draw.random() < 0.4 else None
    return kind, layer, (x, grid, mask)


def test_the_rate_of_the_representatives_falls_by_what_is_guaranteed():
    draw, seen = random.Random(0), set()
    for _ in range(400):
        kind, layer, arguments = random_problem(draw)
        seen.add(kind)
        stages = layer.stages(*arguments)
        share = torch.empty(stages.step.shape).uniform_(0.01, 0.999).double()
        norm = certificate(stages, layer.eps, share)[-1]
        for kappa in (-stages.step, share * 2 / norm.clamp(min=1e-300)):
            fall, guaranteed, tolerance, _ = certificate(stages, layer.eps, kappa)
            assert (guaranteed >= 0).all(), kind
            assert (fall >= guaranteed - tolerance).all(), kind
        assert (-stages.step * norm <= 2 + 1e-9).all(), kind
    assert seen == set(KINDS)


def test_it_falls_in_float32():
    draw = random.Random(1)
    for _ in range(100):
        _, layer, arguments = random_problem(draw, torch.float32)
        stages = layer.stages(*arguments)
        fall, guaranteed, tolerance, _ = certificate(stages, layer.eps, -stages.step.double())
        assert (fall >= guaranteed - tolerance).all()


def test_the_limit_cannot_be_raised():
    """Of one representative of small tokens a step beyond 2 / |G| overshoots."""
    tokens = 0.01 * torch.randn(1, 1, 9, 4).double()
    inputs = certified_inputs(tokens, ops.pool_representatives(tokens, (3, 3), 1), fraction=0.5, eps=1.0)
    stages = ops.cbsa_stages(inputs)
    norm = certificate(stages, 1.0, stages.step)[-1]
    assert (certificate(stages, 1.0, 1.99 / norm)[0] > 0).all()
    assert (certificate(stages, 1.0, 2.01 / norm)[0] < 0).all()


def test_a_free_step_of_either_sign_may_raise_the_rate():
    raised = {True: 0, False: 0}
    for _ in range(10):
        layer = CBSA(24, 4, num_representatives=4).double()
        stages = layer.stages(torch.randn(8, 16, 24).double())
        eta = layer.step_representatives[:, None, None]
        weights = (
            eta * stages.attention
            + ops.pool_representatives(torch.eye(16).double()[None, None], (4, 4), 4).values
        )
        after = stages.extracted + weights @ stages.output
        count = torch.tensor([[4]])
        rises = rate(after, count, 1.0) > rate(stages.extracted, count, 1.0)
        for positive in raised:
            raised[positive] += rises[:, (layer.step_tokens > 0) == positive].sum().item()
    assert min(raised.values()) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_step_against_the_gradient_of_the_rate(kind):
    """-kappa / alpha times the gradient of R with respect to the tokens, the weights B held."""
    own = {"constant": mean_and_first, "weights": Weighted(5)}
    layer = CBSA(12, 3, step="certified", representatives=own.get(kind, kind), num_prefix_tokens=1).double()
    stages = layer.stages(torch.randn(2, 10, 12).double(), (3, 3))
    weights, tokens = stages.broadcast_attention.detach().mT, stages.tokens.detach().requires_grad_()
    constant = (stages.extracted - weights @ tokens).detach()
    mask = stages.representative_mask
    m, p = stages.extracted.shape[-2:]
    count = torch.tensor([[m]]) if mask is None else mask.sum(-1, keepdim=True)
    alpha = p / (count.double() * layer.eps**2)
    x = constant + weights @ tokens
    identity = torch.eye(p).double()
    objective = torch.logdet(identity + alpha[..., None, None] * (x.mT @ x)).sum() / 2
    (gradient,) = torch.autograd.grad(objective, tokens)
    assert_close(stages.output, (stages.step / alpha)[..., None, None] * gradient, 1e-10)


def test_weights_hold_what_the_representatives_are_made_of():
    """Where nothing else is in them, X = B W. (Along a basis that is not principal there is.)"""
    for kind in ("pool", "tokens", "principal"):
        layer = CBSA(12, 3, step="certified", representatives=kind, num_prefix_tokens=1).double()
        stages = layer.stages(torch.randn(2, 10, 12).double(), (3, 3), torch.rand(2, 10) > 0.3)
        assert_close(stages.broadcast_attention.mT @ stages.tokens, stages.extracted, 1e-10)


def test_bound_of_the_largest_eigenvalue():
    for m in (1, 2, 7):
        root = torch.randn(100, m, 5).double() * torch.rand(100, m, 1).double() ** 8
        gram = root @ root.mT
        largest, bound = torch.linalg.eigvalsh(gram)[:, -1], largest_eigenvalue_bound(gram)
        assert (bound >= largest * (1 - 1e-12)).all()
        assert (bound <= gram.diagonal(dim1=-2, dim2=-1).sum(-1) * (1 + 1e-12)).all()
    column = torch.randn(9, 6, 1).double()
    assert_close(largest_eigenvalue_bound(column @ column.mT), column.square().sum((-2, -1)), 1e-12)
    diagonal = torch.rand(9, 6).double()
    assert_close(largest_eigenvalue_bound(diagonal.diag_embed()), diagonal.amax(-1), 1e-12)
    gram = torch.diag(torch.tensor([4.0, 0.0, 1.0]))[None, None]
    assert limit(gram, 0 * gram).item() == pytest.approx(0.5 * (1 - MARGIN))
    assert limit(gram, 1000 * gram).item() == pytest.approx(0.05 * (1 - MARGIN))
    assert limit(0 * gram, 0 * gram).item() == 0
    assert limit(math.inf * gram, gram).item() == 0


@pytest.mark.parametrize("options", [{"representatives": "tokens"}, {"num_representatives": 1}], ids=str)
def test_a_saturated_step_stays_below_the_limit(options):
    """The sigmoid is 1 in float32; the bound is the eigenvalue itself where there is one representative."""
    layer = CBSA(12, 3, step="certified", **options)
    nn.init.constant_(layer.step_logit, 20.0)
    for _ in range(20):
        stages = layer.stages(torch.randn(2, 9, 12))
        weights = stages.broadcast_attention.double()
        norm = torch.linalg.matrix_norm(weights.mT @ weights, 2)
        assert (-stages.step * norm < 2).all()
        fall, guaranteed, tolerance, _ = certificate(stages, layer.eps, -stages.step.double())
        assert (guaranteed > 0).all()
        assert (fall >= guaranteed - tolerance).all()


@pytest.mark.parametrize("impl", ["eager", "tiled"])
@pytest.mark.parametrize("kind", ["pool", "learned"])
def test_no_step_is_taken_where_the_limit_overflows(kind, impl):
    layer = CBSA(12, 3, step="certified", representatives=kind, num_representatives=1, impl=impl)
    nn.init.constant_(layer.step_representatives, 1e20)
    assert (layer(torch.randn(2, 9, 12)) == 0).all()


def problem(kind, sizes, prefix, masked):
    """A function of the implementation and leaves, and these: tokens, eta, fractions, and what ``kind`` has."""
    b, h, grid, m, p = sizes
    n = prefix + math.prod(grid)
    mask = torch.rand(b, n) > 0.4 if masked else None
    exists = torch.rand(b, m) > 0.3 if masked else None
    leaves = [torch.randn(b, h, n, p), torch.randn(h), 0.05 + 0.9 * torch.rand(h)]
    if kind == "weights":
        leaves.append(torch.randn(b, m, n - prefix))
    if kind == "learned":
        leaves.append(torch.randn(b, h, m, p))
    leaves = [t.double().requires_grad_() for t in leaves]

    def run(impl, tokens, eta, fraction, *others):
        pooled, cells = tokens[:, :, prefix:], None if mask is None else mask[:, prefix:]
        if kind == "pool":
            chosen = ops.pool_representatives(pooled, grid, m, token_mask=cells)
        elif kind == "weights":
            real = pooled if cells is None else pooled.masked_fill(~cells[:, None, :, None], 0.0)
            chosen = Representatives(others[0][:, None] @ real, exists, token_weights=others[0])
        else:
            chosen = Representatives(others[0], exists)
        return ops.certified_cbsa(
            tokens, chosen, fraction=fraction, step_representatives=eta, eps=1.0, token_mask=mask,
            num_prefix_tokens=0 if kind == "learned" else prefix, impl=impl,
        )  # fmt: skip

    return run, leaves


def evaluate(run, leaves, impl):
    output = run(impl, *leaves)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    found = torch.autograd.grad(output, leaves, cotangent, allow_unused=True, materialize_grads=True)
    return dict(zip(["output", *map(str, range(len(leaves)))], [output.detach(), *found], strict=True))


@settings(max_examples=80, deadline=None)
@given(
    kind=st.sampled_from(["pool", "learned", "weights"]),
    grid=st.sampled_from([(1,), (17,), (4, 5), (3, 2, 4), (2, 2)]),
    sizes=st.tuples(*(st.integers(1, top) for top in (3, 3, 9, 5))),
    prefix=st.integers(0, 2),
    masked=st.booleans(),
    keep=st.sampled_from([0, tiles.KEEP]),
    seed=st.integers(0, 1000),
)
def test_tiles_agree_with_the_equations(kind, grid, sizes, prefix, masked, keep, seed):
    torch.manual_seed(seed)
    b, h, m, p = sizes
    run, leaves = problem(kind, (b, h, grid, m, p), prefix, masked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", 7)
        patch.setattr(tiles, "KEEP", keep)
        assert_same(evaluate(run, leaves, "tiled"), evaluate(run, leaves, "eager"), 1e-9)


@pytest.mark.parametrize("kind", ["pool", "learned", "weights"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_both_orders_with_the_limit_held(kind, masked, monkeypatch):
    for module in ("reference", "certified"):
        held = lambda gram, own: gram.new_full(gram.shape[:2], 0.7)  # noqa: E731
        monkeypatch.setattr(sys.modules[f"cbsa_torch.ops.cbsa.{module}"], "limit", held)
    monkeypatch.setattr(tiles, "TILE", 3)
    run, leaves = problem(kind, (2, 1, (5,), 2, 2), 1, masked)
    for impl in ("eager", "tiled"):
        torch.autograd.gradcheck(lambda *tensors, impl=impl: run(impl, *tensors), leaves)
    torch.autograd.gradgradcheck(lambda *tensors: run("tiled", *tensors), leaves)


@pytest.mark.parametrize("impl", ["eager", "tiled"])
def test_the_limit_has_no_gradient(impl):
    """The output scales with the limit, and so would the gradient of eta."""
    run, leaves = problem("learned", (1, 1, (6,), 3, 4), 0, False)
    output = run(impl, *leaves)
    (d_fraction,) = torch.autograd.grad(output.sum(), leaves[2])
    assert_close(d_fraction, (output.sum() / leaves[2]).detach(), 1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of opcheck itself
@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("pooled", ["matrix", "grid", "cells"])
def test_opcheck(channels, pooled):
    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64).requires_grad_()

    mask = torch.tensor([[True] * 5, [True, False] * 2 + [True]]) if pooled == "matrix" else None
    weights = torch.randn(2, 2, 5).double() if pooled == "matrix" else None
    cells = ops.find_cells(torch.rand(2, 4, 2), 2) if pooled == "cells" else [None] * 3
    pooling = {"matrix": ([], [], 0), "grid": ([2, 2], [2, 1], 1), "cells": ([], [], 1)}[pooled]
    fraction = torch.rand(2).double().requires_grad_()
    arguments = Problem(
        leaf(2, 2, 2, 4), leaf(2, 2, 5, 4), None, leaf(2), fraction, mask, None,
        None if channels is None else leaf(channels, 8), None, weights, *cells,
        "exact", 0.5, 1.0, "tiled", True, *pooling,
    )  # fmt: skip
    torch.library.opcheck(cbsa_op, tuple(arguments))


B, H, M, N, P = 1, 2, 64, 4096, 16


@pytest.mark.parametrize("impl", ["tiled", "eager"])
def test_nothing_of_size_m_times_n_is_saved(impl):
    tokens = torch.randn(B, H, N, P, requires_grad=True)
    chosen = ops.pool_representatives(tokens, (64, 64), M)
    steps = {"fraction": torch.rand(H, requires_grad=True), "step_representatives": torch.randn(H)}
    sizes = saved_sizes(lambda: ops.certified_cbsa(tokens, chosen, **steps, impl=impl))
    assert (max(sizes) >= B * H * M * N) == (impl == "eager")
    if impl == "tiled":
        assert sum(sizes) <= 1.1 * (B * H * N * P) + 8 * B * H * M * P


@pytest.mark.parametrize("step", ["certified", "free"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_masked_layer_saves_m_times_n_once_for_all_heads(step, folded, monkeypatch):
    monkeypatch.setattr(api, "folds", lambda *_: folded)
    heads, mask = 8, torch.ones(2, N, dtype=torch.bool)
    mask[0, N - 100 :] = False
    layer = CBSA(heads * 4, heads, num_representatives=M, step=step, impl="tiled")
    x = torch.randn(2, N, layer.dim)
    sizes = saved_sizes(lambda: layer(x, (64, 64), mask))
    assert max(sizes) <= max(2 * M * N, x.numel())
    assert sum(size == 2 * M * N for size in sizes) <= 4


@pytest.mark.parametrize("channels", [None, H * P])
def test_nothing_of_size_m_times_n_is_formed(channels, monkeypatch):
    monkeypatch.setattr(tiles, "KEEP", 0)
    weight = None if channels is None else torch.randn(channels, H * P)
    arguments = Problem(
        torch.randn(B, H, M, P), torch.randn(B, H, N, P), None, torch.randn(H), torch.rand(H), None, None,
        weight, *[None] * 5, "exact", 0.25, 1.0, "tiled", True, (64, 64), (8, 8), 0,
    )  # fmt: skip
    with Largest() as seen, torch.no_grad():
        backward(*forward(arguments), arguments)
    assert seen.elements <= max(H * M * tiles.TILE, B * H * N * P)
    assert seen.elements < B * H * M * N / 3


@pytest.mark.parametrize("impl", ["eager", "tiled"])
@pytest.mark.parametrize("folded", [False, True])
def test_the_projection_out(impl, folded, monkeypatch):
    monkeypatch.setattr(api, "folds", lambda *_: folded)
    tokens, weight = torch.randn(2, 2, 9, 4).double(), torch.randn(5, 8).double()
    inputs = certified_inputs(tokens, ops.pool_representatives(tokens, (3, 3), 4), fraction=0.3, eps=1.0)
    expected = ops.cbsa_stages(inputs).output.transpose(1, 2).flatten(2) @ weight.T
    assert_close(api.run_and_project(inputs, weight, None, impl), expected, 1e-12)


def test_an_item_without_real_tokens_gets_zeros_and_zero_gradients():
    for kind in ("pool", "learned", "tokens", "principal", "basis", "constant", "weights"):
        own = {"constant": mean_and_first, "weights": Weighted(5)}
        layer = CBSA(12, 3, step="certified", representatives=own.get(kind, kind)).double()
        x = torch.full((2, 9, 12), math.nan).double()
        x[1] = torch.randn(9, 12)
        x.requires_grad_()
        out = layer(x, (3, 3), torch.tensor([[False], [True]]).expand(2, 9))
        assert (out[0] == 0).all()
        assert out[1].isfinite().all()
        out.sum().backward()
        assert (x.grad[0] == 0).all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters()), kind


def wrong(**changed):
    tokens = torch.randn(2, 3, 9, 4)
    chosen = changed.pop("chosen", ops.pool_representatives(tokens, (3, 3), 4))
    return ops.certified_cbsa(changed.pop("tokens", tokens), chosen, **{"fraction": 0.5, **changed})


VALUES = torch.randn(2, 3, 4, 4)
BAD = [
    ({"chosen": VALUES}, TypeError, "representatives must be ops.Representatives"),
    ({"tokens": [1.0]}, TypeError, "tokens must be a torch.Tensor"),
    ({"fraction": "half"}, TypeError, "fraction must be a number, got 'half'"),
    ({"fraction": 1.5}, ValueError, "fraction must be between 0 and 1, got 1.5"),
    ({"fraction": torch.tensor([0.5, 1.5, 0.5])}, ValueError, "fraction must hold values from 0 to 1, got 1.5"),
    ({"fraction": torch.tensor([0.5, 0.5, -0.5])}, ValueError, "fraction must hold values from 0 to 1, got -0.5"),
    ({"fraction": nn.Parameter(torch.full((3,), math.nan))}, ValueError, "from 0 to 1, got nan"),
    ({"fraction": torch.rand(2)}, ValueError, r"fraction must have shape \(H,\)"),
    ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens must be an int of at least 0, got -1"),
    ({"num_prefix_tokens": 1}, ValueError, "4 representatives of at most 8 tokens .* got 4 of 9"),
    ({"chosen": Representatives(VALUES, token_weights=torch.randn(3, 9))}, ValueError, "got 3 of 9"),
    ({"chosen": Representatives(VALUES, token_weights=torch.randn(3, 4, 9))}, ValueError, r"\(B, M, N\) with B=2"),
    ({"chosen": Representatives(VALUES, token_weights=torch.ones(4, 9).int())}, TypeError, "token_weights"),
    ({"chosen": Representatives(VALUES, token_weights=GridPooling((3, 3), (4,)))}, ValueError, "along the same axes"),
    ({"chosen": Representatives(VALUES, token_weights=GridPooling((3, 2), (2, 2), -1))}, ValueError, "at least 0"),
    ({"chosen": Representatives(VALUES, token_weights=GridPooling((3, 2), (2, 2), 4))}, ValueError, "got 4 of 10"),
    (
        {"chosen": Representatives(VALUES, None, torch.randn(2, 3, 4, 9), torch.randn(4, 9))},
        ValueError,
        "token_weights cannot be given beside an attention",
    ),
    ({"impl": "triton"}, ValueError, "impl='triton' does not know the limit"),
    ({"eps": 0.0}, ValueError, "eps must be positive"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "kind", "message"), BAD)
def test_bad_arguments_are_named(changed, kind, message):
    with pytest.raises(kind, match=message):
        wrong(**changed)
