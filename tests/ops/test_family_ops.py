"""What every operator of the family keeps: gradients, masks, strides, dtypes, and its error messages."""

import math
from functools import partial
from typing import NamedTuple

import pytest
import torch

from cbsa_torch import ops
from tests.helpers.compare import assert_close


class Case(NamedTuple):
    """An operator as ``run(*inputs, mask)``."""

    run: object
    lengths: str = "n"
    """Of each input: n (tokens that the mask may hide), q (queries, never hidden), m (agents)."""


def on_tokens(function, **options):
    return Case(lambda tokens, mask: function(tokens, token_mask=mask, **options))


TEMPERATURE = torch.tensor([0.5, -1.5]).double()
BASIS = torch.linalg.qr(torch.arange(9.0).reshape(3, 3).double().cos()).Q
CASES = {
    "mssa": on_tokens(ops.mssa),
    "mssa scaled": on_tokens(ops.mssa, scale=1.5),
    "tssa": on_tokens(ops.tssa, temperature=TEMPERATURE),
    "channel": on_tokens(ops.channel_attention, eps=0.8),
    "channel mean": on_tokens(ops.channel_attention, basis=BASIS, average=True, eps=0.8),
    "linear": on_tokens(ops.linear_cbsa, eps=0.8),
    "linear mean": on_tokens(ops.linear_cbsa, eps=0.8, average=True),
    "linear eigh": on_tokens(ops.linear_cbsa, eps=0.8, solver="eigh"),
    "linear eigh mean": on_tokens(ops.linear_cbsa, eps=0.8, average=True, solver="eigh"),
    "softmax": Case(lambda q, k, v, mask: ops.softmax_attention(q, k, v, key_mask=mask), "qnn"),
    "agent": Case(lambda q, a, k, v, mask: ops.agent_attention(q, a, k, v, key_mask=mask), "qmnn"),
    "features": Case(lambda q, k, v, mask: ops.linear_attention(q, k, v, key_mask=mask), "qnn"),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def draw(case, b=2, h=2, n=5, m=2, p=3, dtype=torch.float64):
    sizes = {"n": n, "q": n, "m": m}
    return [torch.randn(b, h, sizes[length], p).to(dtype) for length in case.lengths]


@each_case
@pytest.mark.parametrize(("b", "n"), [(2, 5), (1, 1), (2, 2)], ids=["N > P", "one token", "N < P"])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_gradcheck(case, b, n, masked):
    inputs = [t.requires_grad_() for t in draw(case, b=b, n=n)]
    mask = torch.arange(n) < 2 * torch.arange(b)[:, None] if masked else None  # the first item has no token
    assert torch.autograd.gradcheck(lambda *inputs: case.run(*inputs, mask), inputs)


def test_gradcheck_of_the_temperature():
    (tokens,) = draw(CASES["tssa"])
    temperature = TEMPERATURE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: ops.tssa(tokens, temperature=t), temperature)


@each_case
@pytest.mark.parametrize("padding", [math.nan, math.inf, 1e300])
def test_a_padded_batch_is_each_item_alone(case, padding):
    lengths = [7, 3, 1, 0]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    full = draw(case, b=4, n=7)
    padded = [
        (t.masked_fill(~mask[:, None, :, None], padding) if kind == "n" else t.clone()).requires_grad_()
        for t, kind in zip(full, case.lengths, strict=True)
    ]
    out = case.run(*padded, mask)
    out.square().sum().backward()
    assert torch.isfinite(out).all()
    for b, length in enumerate(lengths[:3]):
        alone = [
            (t[b : b + 1, :, :length] if kind == "n" else t[b : b + 1]).clone().requires_grad_()
            for t, kind in zip(full, case.lengths, strict=True)
        ]
        expected = case.run(*alone, None)
        expected.square().sum().backward()
        rows = expected.shape[2]
        assert_close(out[b : b + 1, :, :rows], expected, 1e-12)
        assert (out[b, :, rows:] == 0).all()
        for batched, own in zip(padded, alone, strict=True):
            size = own.shape[2]
            assert_close(batched.grad[b : b + 1, :, :size], own.grad, 1e-11)
            assert (batched.grad[b, :, size:] == 0).all()
    assert (out[3] == 0).all()
    for batched in padded:
        assert (batched.grad[3] == 0).all()


def test_agents_that_do_not_exist():
    case = CASES["agent"]
    queries, agents, keys, values = draw(case, b=3, m=4)
    mask = torch.tensor([[True] * 4, [False, True, True, False], [False] * 4])
    poisoned = agents.masked_fill(~mask[:, None, :, None], math.nan).requires_grad_()
    out = ops.agent_attention(queries, poisoned, keys, values, agent_mask=mask)
    out.square().sum().backward()
    assert_close(out[:1], ops.agent_attention(queries[:1], agents[:1], keys[:1], values[:1]), 1e-12)
    alone = ops.agent_attention(queries[1:2], agents[1:2, :, 1:3], keys[1:2], values[1:2])
    assert_close(out[1:2], alone, 1e-12)
    assert (out[2] == 0).all()
    assert torch.isfinite(poisoned.grad).all()
    assert (poisoned.grad.masked_select(~mask[:, None, :, None]) == 0).all()


@each_case
def test_the_order_of_tokens_and_of_items_does_not_matter(case):
    inputs, order = draw(case, n=7), torch.randperm(7)
    moved = [t if kind == "m" else t[:, :, order].flip(0) for t, kind in zip(inputs, case.lengths, strict=True)]
    if "m" in case.lengths:
        moved[1] = moved[1].flip(0)
    assert_close(case.run(*moved, None), case.run(*inputs, None)[:, :, order].flip(0), 1e-12)


@each_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_low_precision(case, dtype, masked):
    inputs = [t.requires_grad_() for t in draw(case, n=33, p=3, dtype=dtype)]
    mask = torch.arange(33) < torch.tensor([[33], [9]]) if masked else None
    out = case.run(*inputs, mask)
    assert out.dtype == dtype
    out.sum().backward()
    assert all(t.grad.dtype == dtype and torch.isfinite(t.grad).all() for t in inputs)
    exact = case.run(*(t.detach().double() for t in inputs), mask)
    assert_close(out.double(), exact, 1e-5 if dtype == torch.float32 else 2e-2)


@each_case
def test_values_and_gradients_of_zeros_are_finite(case):
    for dtype in (torch.float32, torch.float64):
        inputs = [torch.zeros_like(t).requires_grad_() for t in draw(case, dtype=dtype)]
        out = case.run(*inputs, None)
        out.sum().backward()
        assert (out == 0).all()
        assert all(torch.isfinite(t.grad).all() for t in inputs)


@pytest.mark.parametrize("name", CASES)
def test_nan_in_a_real_token_shows_in_its_item_only(name):
    inputs = draw(CASES[name])
    inputs[-1][0, :, 2, 1] = math.nan
    out = CASES[name].run(*inputs, torch.ones(2, 5, dtype=torch.bool))
    assert out[0].isnan().any()
    assert torch.isfinite(out[1]).all()


@pytest.mark.parametrize("name", ["tssa", "channel", "linear", "linear eigh"])
def test_autocast_is_ignored(name):
    inputs = draw(CASES[name], dtype=torch.float32)
    expected = CASES[name].run(*inputs, None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = CASES[name].run(*inputs, None)
    assert out.dtype == torch.float32
    assert_close(out, expected, 0)


REPEATED_EIGENVALUES = {
    "all equal": lambda columns: 3 * columns,
    "two pairs": lambda columns: columns * torch.tensor([0.5, 2.0, 0.5, 2.0]).double(),
    "one direction": lambda columns: columns[..., :1] @ columns[..., :1, :],
    "zeros": torch.zeros_like,
}


@pytest.mark.parametrize("of_orthonormal", REPEATED_EIGENVALUES.values(), ids=REPEATED_EIGENVALUES)
@pytest.mark.parametrize("average", [False, True])
def test_both_solvers_agree_at_repeated_eigenvalues(of_orthonormal, average):
    tokens = of_orthonormal(torch.linalg.qr(torch.randn(2, 2, 7, 4).double()).Q)
    cotangent = torch.randn_like(tokens)
    squared = 0.6**2 * (7 if average else 1)

    def run(solver):
        w = tokens.clone().requires_grad_()
        if solver == "inverse":
            out = w @ torch.linalg.inv(torch.eye(4).double() + w.mT @ w / squared)
        else:
            out = ops.linear_cbsa(w, eps=0.6, average=average, solver=solver)
        return out.detach(), torch.autograd.grad(out, w, cotangent)[0]

    expected, gradient = run("inverse")
    for solver in ("cholesky", "eigh"):
        out, own = run(solver)
        assert_close(out, expected, 1e-12)
        assert_close(own, gradient, 1e-12)


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


def ones(*shape):
    return torch.ones(*shape, dtype=torch.bool)


GOOD = zeros(2, 3, 4, 5)
TOKEN_OPS = {
    "mssa": ops.mssa,
    "tssa": ops.tssa,
    "channel": ops.channel_attention,
    "linear": ops.linear_cbsa,
    "eigh": partial(ops.linear_cbsa, solver="eigh"),
    "principal": ops.principal_directions,
    "basis": ops.basis_directions,
}
BAD_TOKENS = [
    (zeros(2, 3, 5), None, ValueError, r"tokens must have shape \(B, H, N, P\), got \(2, 3, 5\) with 3 axes"),
    (zeros(2, 3, 0, 5), None, ValueError, r"tokens must not be empty, got shape \(2, 3, 0, 5\)"),
    (zeros(2, 3, 4, 5, dtype=torch.long), None, TypeError, "tokens must have a floating-point dtype.*int64"),
    (zeros(2, 3, 4, 5, dtype=torch.complex64), None, TypeError, "tokens must have a floating-point dtype"),
    ([1.0], None, TypeError, "tokens must be a torch.Tensor, got list"),
    (GOOD, ones(2, 5), ValueError, r"token_mask must have shape \(B, N\) = \(2, 4\), got \(2, 5\)"),
    (GOOD, ones(2, 3, 4), ValueError, r"token_mask must have shape \(B, N\), got \(2, 3, 4\)"),
    (GOOD, zeros(2, 4), TypeError, r"token_mask must have dtype torch.bool \(True = a real token\)"),
    (GOOD, [True], TypeError, "token_mask must be a torch.Tensor, got list"),
]


@pytest.mark.parametrize("function", TOKEN_OPS.values(), ids=TOKEN_OPS)
@pytest.mark.parametrize(("tokens", "mask", "kind", "message"), BAD_TOKENS, ids=range(len(BAD_TOKENS)))
def test_bad_tokens_are_named(function, tokens, mask, kind, message):
    with pytest.raises(kind, match=message):
        function(tokens, token_mask=mask)


BAD_OPTIONS = [
    (ops.mssa, {"scale": "a"}, TypeError, "scale must be a number, got 'a'"),
    (ops.tssa, {"temperature": None}, TypeError, "temperature must be a number, got None"),
    (ops.tssa, {"temperature": zeros(2)}, ValueError, r"temperature must have shape \(H,\) = \(3\), got"),
    (ops.tssa, {"temperature": zeros(3, 1)}, ValueError, r"temperature must have shape \(H,\)"),
    (ops.tssa, {"temperature": zeros(3, dtype=torch.long)}, TypeError, "temperature must have a floating"),
    (ops.tssa, {"temperature": zeros(3).to("meta")}, ValueError, "temperature must be on the device of tokens"),
    (ops.tssa, {"token_mask": ones(2, 4).to("meta")}, ValueError, "token_mask must be on the device of tokens"),
    (ops.mssa, {"attn_mask": ones(4, 4).to("meta")}, ValueError, "attn_mask must be on the device of queries"),
    (partial(ops.linear_attention, GOOD, GOOD), {"temperature": "a"}, TypeError, "temperature must be a num"),
    (ops.channel_attention, {"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
    (ops.channel_attention, {"eps": math.nan}, ValueError, "eps must be positive and finite, got nan"),
    (ops.channel_attention, {"basis": zeros(4, 4)}, ValueError, r"\(P, P\) or \(H, P, P\) for H=3, P=5"),
    (ops.channel_attention, {"basis": zeros(2, 5, 5)}, ValueError, r"basis must have shape.*got \(2, 5, 5\)"),
    (ops.channel_attention, {"basis": zeros(5, 5, dtype=torch.long)}, TypeError, "basis must have a floating"),
    (ops.channel_attention, {"basis": zeros(5, 5).to("meta")}, ValueError, "basis must be on the device of"),
    (ops.basis_directions, {"basis": zeros(5)}, ValueError, r"basis must have shape.*got \(5,\)"),
    (ops.basis_directions, {"basis": "identity"}, TypeError, "basis must be a torch.Tensor, got str"),
    (ops.linear_cbsa, {"eps": -1.0}, ValueError, "eps must be positive and finite, got -1.0"),
    (ops.linear_cbsa, {"eps": "a"}, TypeError, "eps must be a number, got 'a'"),
    (ops.linear_cbsa, {"eps": 1e-200}, ValueError, "eps must be positive"),
    (ops.linear_cbsa, {"solver": "choleski"}, ValueError, "solver must be one of .*did you mean 'cholesky'"),
]


@pytest.mark.parametrize(("function", "options", "kind", "message"), BAD_OPTIONS)
def test_bad_options_are_named(function, options, kind, message):
    with pytest.raises(kind, match=message):
        function(GOOD, **options)


BAD_ATTENTION = [
    ({"queries": zeros(2, 3, 5)}, ValueError, r"queries must have shape \(B, H, N, P\)"),
    ({"queries": [1.0]}, TypeError, "queries must be a torch.Tensor"),
    ({"keys": zeros(2, 3, 4, 6)}, ValueError, r"keys must have shape \(B, H, K, P\) = \(2, 3, any, 5\)"),
    ({"keys": zeros(2, 3, 4, 5).double()}, TypeError, "keys must have the dtype of queries"),
    ({"values": zeros(2, 3, 7, 5)}, ValueError, r"values must have shape \(B, H, K, V\) = \(2, 3, 4, any\)"),
    ({"values": zeros(2, 3, 4, 5).to("meta")}, ValueError, "values must be on the device of queries"),
    ({"key_mask": ones(2, 5)}, ValueError, r"key_mask must have shape \(B, K\) = \(2, 4\)"),
    ({"key_mask": zeros(2, 4)}, TypeError, r"key_mask must have dtype torch.bool \(True = a real key\)"),
]
AGENTS = zeros(2, 3, 2, 5)
BAD_AGENTS = [
    ({"agents": zeros(2, 3, 2, 6)}, ValueError, "agents must have shape"),
    ({"agents": [1], "agent_mask": ones(2, 1)}, TypeError, "agents must be a torch.Tensor"),
    ({"agents": zeros(2, 3, 2, 5).double()}, TypeError, "agents must have the dtype of queries"),
    ({"agent_mask": ones(2, 4)}, ValueError, r"agent_mask must have shape \(B, M\) = \(2, 2\), got \(2, 4\)"),
    ({"agent_mask": ones(2, 2).to("meta")}, ValueError, "agent_mask must be on the device of agents"),
    ({"agent_mask": zeros(2, 2)}, TypeError, "agent_mask must have dtype torch.bool"),
    ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
    ({"scale": "a"}, TypeError, "scale must be a number"),
]


@pytest.mark.parametrize(
    ("function", "change", "kind", "message"),
    [
        *((ops.softmax_attention, *bad) for bad in [*BAD_ATTENTION, *BAD_AGENTS[-2:]]),
        *((ops.linear_attention, *bad) for bad in BAD_ATTENTION),
        *((partial(ops.agent_attention, agents=AGENTS), *bad) for bad in [*BAD_ATTENTION, *BAD_AGENTS]),
    ],
)
def test_bad_attention_inputs_are_named(function, change, kind, message):
    with pytest.raises(kind, match=message):
        function(**{"queries": GOOD, "keys": GOOD, "values": GOOD, **change})


def test_values_may_have_another_size():
    """Each channel of the values is mixed alone."""
    queries, keys = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 6, 5).double()
    values = torch.randn(2, 3, 6, 7).double()
    for mix in (ops.softmax_attention, partial(ops.agent_attention, queries, queries[:, :, :2])):
        run = partial(mix, queries, keys) if mix is ops.softmax_attention else partial(mix, keys)
        assert_close(run(values), torch.cat([run(values[..., :5]), run(values[..., 2:])[..., 3:]], -1), 1e-12)
