"""The reference against direct evaluation of its equations, autograd and its invariants."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cbsa_torch import ops
from cbsa_torch.ops.cbsa.reference import contract_exact
from tests.helpers.compare import assert_close
from tests.helpers.operator import CONTRACTIONS


def inputs(b=2, h=3, n=11, m=4, p=5, dtype=torch.float64, grad=False):
    tokens = torch.randn(b, h, n, p, dtype=dtype)
    representatives = torch.randn(b, h, m, p, dtype=dtype)
    return tokens.requires_grad_(grad), representatives.requires_grad_(grad)


def stages_of(tokens, representatives, **options):
    return ops.cbsa_stages(ops.cbsa_inputs(tokens, representatives, **options))


def by_hand(w, q, eta, kappa, contraction, eps):
    """One head, one item, columns as tokens: the paper's equations as printed."""
    z, q = w.T, q.T  # (p, N), (p, m)
    p, m = q.shape
    a = torch.softmax(p**-0.5 * (z.T @ q), dim=0)  # (5): A, N x m, softmax over tokens
    q = q + eta * z @ a
    if contraction == "softmax":
        c = q @ torch.softmax(p**-0.5 * (q.T @ q), dim=0)  # (8)
    elif contraction == "exact":
        c = q @ torch.linalg.inv(torch.eye(m, dtype=q.dtype) + p / (m * eps**2) * q.T @ q)  # (7)
    else:
        c = q
    return (kappa * c @ a.T).T


@pytest.mark.parametrize("contraction", CONTRACTIONS)
@pytest.mark.parametrize(("m", "p"), [(4, 5), (7, 3), (1, 1), (20, 5)], ids=str)
def test_equals_the_equations_as_printed(contraction, m, p):
    tokens, representatives = inputs(m=m, p=p)
    eta, kappa = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    out = ops.cbsa(
        tokens, representatives, step_representatives=eta, step_tokens=kappa, contraction=contraction, eps=0.5
    )
    for b in range(2):
        for h in range(3):
            expected = by_hand(tokens[b, h], representatives[b, h], eta[h], kappa[h], contraction, 0.5)
            assert_close(out[b, h], expected, 1e-12)


def test_separate_keys_and_values_and_fresh_broadcast_are_two_attentions():
    tokens, representatives = inputs()
    keys, values = torch.randn(2, 3, 17, 5).double(), torch.randn(2, 3, 17, 5).double()
    out = ops.cbsa(tokens, representatives, keys=keys, values=values, contraction="none", broadcast="softmax")
    collected = representatives + F.scaled_dot_product_attention(representatives, keys, values)
    assert_close(out, F.scaled_dot_product_attention(tokens, representatives, collected), 1e-12)


def test_stages_fit_together():
    tokens, representatives = inputs()
    stages = stages_of(tokens, representatives, step_representatives=0.3, step_tokens=-2.0)
    assert_close(stages.attention.sum(-1), torch.ones(2, 3, 4).double(), 1e-12)
    assert_close(stages.extracted, representatives + 0.3 * stages.attention @ tokens, 1e-12)
    assert_close(stages.contracted, stages.contraction_attention @ stages.extracted, 1e-12)
    assert_close(stages.output, -2.0 * stages.attention.mT @ stages.contracted, 1e-12)
    assert_close(
        stages.output, ops.cbsa(tokens, representatives, step_representatives=0.3, step_tokens=-2.0), 1e-14
    )


@pytest.mark.parametrize("pooled", [False, True], ids=["fixed Q_ini", "pooled Q_ini"])
@pytest.mark.parametrize("eta", [1.0, 0.37])
def test_eq_7_is_the_gradient_of_the_compression_term(eta, pooled):
    """grad_Z sum_k R(U_k^T Q) = eta * alpha * sum_k U_k C_k A_k^T with A held constant, alpha = p/(m eps^2).

    With Q_ini = Z Pi pooled from the tokens and differentiated too, A becomes eta A + Pi.
    """
    b, h, n, m, p, eps = 2, 3, 12, 4, 5, 0.3
    bases = (
        torch.linalg.qr(torch.randn(h * p, h * p).double()).Q.unflatten(1, (h, p)).transpose(0, 1)
    )  # (H, D, P)
    z = torch.randn(b, n, h * p).double().requires_grad_()
    pi = torch.rand(m, n).double()
    pi = pi / pi.sum(-1, keepdim=True)
    tokens = z[:, None] @ bases  # (B, H, N, P)
    q_ini = pi @ tokens if pooled else (pi @ tokens).detach()
    stages = stages_of(tokens, q_ini, step_representatives=eta, contraction="exact", eps=eps)
    held = stages.attention.detach()
    objective = ops.compression_rate(q_ini + eta * held @ tokens, eps=eps).sum()
    (gradient,) = torch.autograd.grad(objective, z)

    alpha = p / (m * eps**2)
    weights = eta * held + (pi if pooled else 0)
    expected = (alpha * (weights.mT @ stages.contracted) @ bases.mT).sum(1).detach()
    assert_close(gradient, expected, 1e-9)
    if not pooled:  # then the operator itself is that gradient, up to eta * alpha
        assert_close(gradient, eta * alpha * (stages.output @ bases.mT).sum(1).detach(), 1e-9)


@given(
    m=st.integers(1, 9),
    p=st.integers(1, 9),
    eps=st.floats(0.1, 2),
    energy=st.floats(0.1, 10),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_small_step_along_the_exact_contraction_lowers_the_rate(m, p, eps, energy, seed):
    q = energy * torch.randn(1, 1, m, p, generator=torch.Generator().manual_seed(seed)).double()
    c = contract_exact(q, eps)
    before = ops.coding_rate(q, eps=eps)
    # C lies between 0 and Q in every direction, so any step in (0, 1] is small enough
    for step in (1e-3, 0.1, 1.0):
        assert (ops.coding_rate(q - step * c, eps=eps) < before).all()


@pytest.mark.parametrize("contraction", CONTRACTIONS)
@pytest.mark.parametrize("broadcast_kind", ["shared", "softmax"])
@pytest.mark.parametrize(
    ("b", "h", "m", "n", "p", "masked"), [(1, 2, 3, 5, 4, False), (2, 1, 5, 3, 4, True)], ids=str
)
def test_gradcheck(contraction, broadcast_kind, b, h, m, n, p, masked):
    tokens, representatives = inputs(b, h, n, m, p, grad=True)
    eta, kappa = (torch.randn(h).double().requires_grad_() for _ in range(2))
    options = {"contraction": contraction, "broadcast": broadcast_kind, "eps": 0.7}
    if masked:
        options["token_mask"] = torch.arange(n) < torch.arange(b)[:, None] * 2  # the first item has no token

    def f(tokens, representatives, eta, kappa):
        return ops.cbsa(tokens, representatives, step_representatives=eta, step_tokens=kappa, **options)

    assert torch.autograd.gradcheck(f, (tokens, representatives, eta, kappa))


def test_gradcheck_of_separate_keys_and_values():
    tokens, representatives = inputs(1, 2, 4, 3, 3, grad=True)
    keys, values = (torch.randn(1, 2, 6, 3).double().requires_grad_() for _ in range(2))
    key_mask = torch.tensor([[True, True, False, True, True, False]])

    def f(tokens, representatives, keys, values):
        return ops.cbsa(
            tokens, representatives, keys=keys, values=values, broadcast="softmax", key_mask=key_mask
        )

    assert torch.autograd.gradcheck(f, (tokens, representatives, keys, values))


@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_padding_changes_nothing_whatever_it_holds(contraction):
    lengths = [11, 4, 1, 0]
    tokens, representatives = inputs(b=4, grad=True)
    mask = torch.arange(11) < torch.tensor(lengths)[:, None]
    garbage = tokens.detach().masked_fill(~mask[:, None, :, None], float("nan")).requires_grad_()
    out = ops.cbsa(garbage, representatives, contraction=contraction, token_mask=mask)
    (out**2).sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(garbage.grad).all()
    assert out[3].abs().max() == garbage.grad[3].abs().max() == 0
    assert representatives.grad[3].abs().max() == 0
    for i, length in enumerate(lengths[:3]):
        alone = tokens[i : i + 1, :, :length].detach().requires_grad_()
        own = representatives[i : i + 1].detach().requires_grad_()
        expected = ops.cbsa(alone, own, contraction=contraction)
        (expected**2).sum().backward()
        assert_close(out[i : i + 1, :, :length], expected, 1e-12)
        assert out[i, :, length:].abs().sum() == 0
        assert_close(garbage.grad[i : i + 1, :, :length], alone.grad, 1e-11)
        assert_close(representatives.grad[i : i + 1], own.grad, 1e-11)


@pytest.mark.parametrize("contraction", CONTRACTIONS)
@pytest.mark.parametrize("broadcast_kind", ["shared", "softmax"])
def test_masked_representatives_do_not_exist(contraction, broadcast_kind):
    tokens, representatives = inputs(b=1, m=6)
    mask = torch.tensor([[True, False, True, True, False, False]])
    poisoned = representatives.masked_fill(~mask[:, None, :, None], float("nan"))
    options = {"contraction": contraction, "broadcast": broadcast_kind}
    out = ops.cbsa(tokens, poisoned, representative_mask=mask, **options)
    assert_close(out, ops.cbsa(tokens, representatives[:, :, mask[0]], **options), 1e-12)
    stages = stages_of(tokens, poisoned, representative_mask=mask, **options)
    for stage in (stages.attention, stages.extracted, stages.contracted, stages.broadcast_attention.mT):
        assert (stage[:, :, ~mask[0]] == 0).all() or broadcast_kind == "softmax"
    assert (stages.attention[:, :, ~mask[0]] == 0).all()


def test_invariants():
    tokens, representatives = inputs()
    out = ops.cbsa(tokens, representatives)
    stages = stages_of(tokens, representatives)
    # the shared broadcast distributes exactly the contractions
    assert_close(out.sum(2), stages.contracted.sum(2), 1e-12)
    order, rows = torch.randperm(11), torch.randperm(4)
    assert_close(ops.cbsa(tokens[:, :, order], representatives), out[:, :, order], 1e-12)
    assert_close(ops.cbsa(tokens, representatives[:, :, rows]), out, 1e-12)
    rotation = torch.linalg.qr(torch.randn(5, 5).double()).Q
    assert_close(ops.cbsa(tokens @ rotation, representatives @ rotation), out @ rotation, 1e-12)
    assert_close(ops.cbsa(tokens.repeat(1, 1, 3, 1), representatives)[:, :, :11], out / 3, 1e-12)


def test_one_token_and_more_representatives_than_tokens():
    tokens, representatives = inputs(n=1, m=9)
    stages = stages_of(tokens, representatives)
    assert_close(stages.attention, torch.ones(2, 3, 9, 1).double(), 0)
    assert_close(stages.output, stages.contracted.sum(2, keepdim=True), 1e-12)


@pytest.mark.parametrize("size", [1e4, 1e8])
def test_huge_logits_stay_finite(size):
    tokens, representatives = inputs(dtype=torch.float32, grad=True)
    out = ops.cbsa(tokens * size**0.5, representatives * size**0.5)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(tokens.grad).all()
    exact = ops.cbsa(tokens.double() * size**0.5, representatives.double() * size**0.5)
    assert_close(out.double(), exact, 1e-2)


def test_nan_in_a_real_token_shows():
    tokens, representatives = inputs()
    tokens[0, 0, 2, 1] = math.nan
    for contraction in CONTRACTIONS:
        out = ops.cbsa(tokens, representatives, contraction=contraction)
        assert out[0, 0].isnan().all()
        assert torch.isfinite(out[1]).all()


@pytest.mark.parametrize("p", [3, 8], ids=["M side", "P side"])
def test_exact_contraction_solves_its_system_even_when_ill_conditioned(p):
    m, eps = 5, 1e-3
    rep = torch.randn(2, 2, m, p)
    rep[..., 1:, :] = rep[..., :1, :] + 1e-3 * rep[..., 1:, :]  # nearly rank one
    exact = contract_exact(rep.double(), eps)
    gamma = torch.eye(m).double() + p / (m * eps**2) * rep.double() @ rep.double().mT
    assert_close(gamma @ exact, rep.double(), 1e-6)
    assert_close(contract_exact(rep, eps).double(), exact, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_float32_inside_and_autocast_is_ignored(dtype):
    tokens, representatives = (t.to(dtype) for t in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.cbsa(tokens, representatives)
    assert out.dtype == dtype
    expected = ops.cbsa(tokens.float(), representatives.float())
    assert_close(out, expected.to(dtype), 0)
    assert stages_of(tokens, representatives).attention.dtype == torch.float32


def test_stages_of_a_given_attention_fit_together():
    tokens, representatives = torch.randn(2, 3, 7, 5).double(), torch.randn(2, 3, 4, 5).double()
    attention, step = torch.randn(2, 3, 4, 7).double(), torch.randn(3).double()
    token_mask = torch.arange(7) < torch.tensor([[7], [3]])
    exists = torch.tensor([[True] * 4, [True, False, True, False]])
    attention[1, :, :, 3:] = representatives[1, :, 1] = math.nan  # hidden
    masks = {"token_mask": token_mask, "representative_mask": exists}
    stages = stages_of(tokens, representatives, attention=attention, step_tokens=step, **masks)
    assert_close(stages.extracted[0], representatives[0], 0)  # nothing is extracted
    assert_close(stages.attention[0], attention[0], 0)
    alone = ops.contract_and_broadcast(
        tokens[1:, :, :3], representatives[1:, :, ::2], attention[1:, :, ::2, :3], step_tokens=step
    )
    assert_close(stages.output[1:, :, :3], alone, 1e-12)
    assert (stages.output[1, :, 3:] == 0).all()
    by_hand = step[:, None, None] * attention[0].mT @ stages.contracted[0]
    assert_close(stages.output[0], by_hand, 1e-12)


@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_gradcheck_of_a_given_attention(contraction):
    tokens, representatives = torch.randn(1, 2, 5, 3).double(), torch.randn(1, 2, 4, 3).double()
    attention = torch.randn(1, 2, 4, 5).double()
    assert torch.autograd.gradcheck(
        lambda r, a: ops.contract_and_broadcast(tokens, r, a, contraction=contraction, eps=0.7),
        [representatives.requires_grad_(), attention.requires_grad_()],
    )
