"""One formula, many attentions (paper, section 3.3, Appendix B): each special case, values and gradients."""

import math

import pytest
import torch

from cbsa_torch import ops
from tests.helpers.compare import assert_close

B, H, N, P = 2, 3, 11, 4
EPS = (0.05, 0.7, 3.0)
SOLVERS = ("cholesky", "eigh")


def draw(n=N, p=P):
    return torch.randn(B, H, n, p).double()


def mask_of(*lengths, n=N):
    return torch.arange(n) < torch.tensor(lengths)[:, None]


def value_and_gradient(function, tokens):
    """The output and its gradient for a fixed, unsymmetric cotangent."""
    tokens = tokens.clone().requires_grad_()
    out = function(tokens)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).double()
    (gradient,) = torch.autograd.grad(out, tokens, cotangent)
    return out.detach(), gradient


def assert_same(functions, tokens, tolerance=1e-9):
    """All functions of the tokens agree with the last, in value and gradient."""
    *others, reference = (value_and_gradient(f, tokens) for f in functions)
    for out, gradient in others:
        assert_close(out, reference[0], tolerance)
        assert_close(gradient, reference[1], tolerance)


def spectral(w, f):
    """W L diag(f(lambda)) L^T for W^T W = L diag(lambda) L^T."""
    eigenvalues, vectors = torch.linalg.eigh(w.mT @ w)
    return w @ vectors @ torch.diag_embed(f(eigenvalues)) @ vectors.mT


def damping(eps):
    return lambda energy: eps**2 / (eps**2 + energy)


def along(w, chosen, eps, **options):
    """CBSA with directions as representatives and the exact contraction."""
    return ops.contract_and_broadcast(
        w, chosen.values, chosen.attention, contraction="exact", eps=eps, **options
    )


@pytest.mark.parametrize(("scale", "masked"), [(None, False), (1.3, False), (None, True)])
def test_all_tokens_give_mssa(scale, masked):
    factor = P**-0.5 if scale is None else scale
    identity = torch.eye(N).double().expand(B, H, N, N)
    mask = mask_of(N, 5) if masked else None
    rows = mask_of(N, 5 if masked else N)[:, None, :, None]
    assert_same(
        [
            lambda w: ops.contract_and_broadcast(
                w, w, identity, scale=scale, token_mask=mask, representative_mask=mask
            ),
            lambda w: ops.mssa(w, scale=scale, token_mask=mask),
            lambda w: torch.softmax((factor * w @ w.mT).masked_fill(~rows.mT, -math.inf), -1) @ w * rows,
        ],
        draw(),
    )


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("length", [N, 6])
def test_principal_directions_give_linear_attention(eps, solver, length):
    mask = None if length == N else mask_of(N, length)
    rows = mask_of(N, length)[:, None, :, None]
    assert_same(
        [
            lambda w: along(w, ops.principal_directions(w, token_mask=mask), eps, token_mask=mask),
            lambda w: ops.linear_cbsa(w, eps=eps, solver=solver, token_mask=mask),
            lambda w: w * rows @ torch.linalg.inv(torch.eye(P).double() + w.mT @ (w * rows) / eps**2),
            lambda w: spectral(w * rows, damping(eps)),
        ],
        draw(),
    )


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("n", [1, 3])
def test_principal_directions_of_fewer_tokens_than_dimensions(eps, n):
    w = draw(n, 5)
    expected = w @ torch.linalg.inv(torch.eye(5).double() + w.mT @ w / eps**2)
    assert_close(along(w, ops.principal_directions(w), eps), expected, 1e-9)
    for solver in SOLVERS:
        assert_close(ops.linear_cbsa(w, eps=eps, solver=solver), expected, 1e-9)


def test_principal_directions_are_the_singular_value_decomposition():
    w, mask = draw(), mask_of(N, 6)
    chosen = ops.principal_directions(w, token_mask=mask)
    _, sigma, right = torch.linalg.svd(w[1, :, :6])  # rows: W = R Sigma L^T
    assert_close(chosen.values.norm(dim=-1)[1].flip(-1), sigma, 1e-9)
    assert_close((chosen.values[1].flip(-2) @ right.mT).abs(), torch.diag_embed(sigma), 1e-7)
    real = mask[:, None, :, None]
    assert_close(chosen.attention.mT @ chosen.values, w.masked_fill(~real, 0.0), 1e-9)  # R Sigma L^T
    assert_close(chosen.attention @ chosen.attention.mT, torch.eye(P).double().expand(B, H, P, P), 1e-9)
    assert (chosen.attention.mT.masked_select(~real) == 0).all()


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("scaled", [False, True], ids=["rotated", "rotated and scaled"])
def test_orthogonal_representatives_give_the_same_form(eps, scaled):
    """Appendix B: A = Lam R^T and Rep = Lam Sigma L^T P^T give W L f_Lam(Sigma^2) L^T P^T."""
    lam = torch.tensor([0.3, -1.2, 2.0, 0.9]).double() if scaled else torch.ones(P).double()
    rotation = torch.linalg.qr(torch.randn(P, P).double()).Q

    def by_operator(w):
        left, sigma, right = torch.linalg.svd(w, full_matrices=False)  # W = R Sigma L^T
        representatives = (lam * sigma)[..., None] * right @ rotation.mT
        attention = lam[:, None] * left.mT
        return ops.contract_and_broadcast(w, representatives, attention, contraction="exact", eps=eps)

    def by_formula(w):
        # lam belongs to singular values in descending order, eigh sorts in ascending order
        square = lam.flip(0) ** 2
        return spectral(w, lambda energy: square * eps**2 / (eps**2 + square * energy)) @ rotation.mT

    assert_same([by_operator, by_formula], draw())


@pytest.mark.parametrize("contraction", ["exact", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_a_rotation_among_representatives_changes_nothing(contraction, masked):
    w, mask = draw(), mask_of(N, 5) if masked else None
    representatives, _, attention = ops.principal_directions(w, token_mask=mask)[:3]
    rotation = torch.linalg.qr(torch.randn(B, H, P, P).double()).Q

    def run(mix):
        return ops.contract_and_broadcast(
            w, mix @ representatives, mix @ attention, contraction=contraction, eps=0.7, token_mask=mask
        )

    expected = run(torch.eye(P).double())
    assert_close(run(rotation), expected, 1e-9)
    assert (run(2 * rotation) - expected).abs().max() > 1e-2  # it is the rotation that does not matter


def bases():
    def rotation(*shape):
        generator = torch.Generator().manual_seed(3)
        return torch.linalg.qr(torch.randn(*shape, P, P, generator=generator).double()).Q

    return {"default": None, "identity": torch.eye(P).double(), "shared": rotation(), "per head": rotation(H)}


@pytest.mark.parametrize("basis", bases().values(), ids=bases())
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("average", [False, True])
def test_a_fixed_basis_gives_channel_attention(basis, eps, average):
    full = torch.eye(P).double() if basis is None else basis

    def by_formula(w):
        reach = w @ full
        energy = reach.square().mean(-2) if average else reach.square().sum(-2)
        return reach @ torch.diag_embed(damping(eps)(energy)) @ full.mT

    wide = eps * math.sqrt(N) if average else eps  # the mean is the sum with N eps^2
    assert_same(
        [
            lambda w: along(w, ops.basis_directions(w, basis), wide),
            lambda w: ops.channel_attention(w, basis, eps=eps, average=average),
            by_formula,
        ],
        draw(),
    )


@pytest.mark.parametrize("basis", bases().values(), ids=bases())
def test_a_fixed_basis_with_a_mask(basis):
    mask = mask_of(4, 0)  # the second item has no real token
    w = draw()
    functions = [
        lambda w: along(w, ops.basis_directions(w, basis, token_mask=mask), 0.7, token_mask=mask),
        lambda w: ops.channel_attention(w, basis, eps=0.7, token_mask=mask),
    ]
    assert_same(functions, w)
    out, gradient = value_and_gradient(functions[0], w)
    assert (out[1] == 0).all()
    assert (gradient[1] == 0).all()


def test_an_unused_channel_has_a_gradient():
    """A direction without energy gets zeros, and no NaN from the root of zero."""
    w = draw()
    w[..., 2] = 0
    functions = [lambda w: along(w, ops.basis_directions(w), 0.7), lambda w: ops.channel_attention(w, eps=0.7)]
    out, gradient = value_and_gradient(functions[0], w)
    reference_out, reference_gradient = value_and_gradient(functions[1], w)
    assert_close(out, reference_out, 1e-9)
    used = [0, 1, 3]
    assert_close(gradient[..., used], reference_gradient[..., used], 1e-9)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("scale", "length"), [(None, N), (0.8, N), (None, 4)])
def test_without_contraction_and_residual_it_is_agent_attention(scale, length):
    agents, keys, values = draw(5), draw(), draw()
    factor = P**-0.5 if scale is None else scale
    mask = None if length == N else mask_of(N, length)

    options = {"keys": keys, "values": values, "scale": scale, "key_mask": mask}
    options |= {"contraction": "none", "broadcast": "softmax"}

    def by_cbsa(w):
        full, residual = (ops.cbsa(w, agents, step_representatives=step, **options) for step in (1.0, 0.0))
        return full - residual

    def by_hand(w):
        hidden = ~mask_of(N, length)[:, None, None]
        collected = torch.softmax((factor * agents @ keys.mT).masked_fill(hidden, -math.inf), -1) @ values
        return torch.softmax(factor * w @ agents.mT, -1) @ collected

    def by_operator(w):
        return ops.agent_attention(w, agents, keys, values, scale=scale, key_mask=mask)

    assert_same([by_cbsa, by_operator, by_hand], draw())


@pytest.mark.parametrize("masked", [False, True])
def test_tssa_at_temperature_zero_is_channel_attention(masked):
    mask = mask_of(N, 4) if masked else None
    assert_same(
        [
            lambda w: ops.tssa(w, temperature=0.0, token_mask=mask),
            lambda w: ops.tssa(w, temperature=torch.zeros(H), token_mask=mask),
            lambda w: -ops.channel_attention(w, eps=1.0, average=True, token_mask=mask) / H,
        ],
        draw(),
        1e-8,
    )


def test_tssa_equals_its_equations():
    w, temperature = draw(), torch.randn(H).double()
    expected = torch.empty_like(w)
    for b in range(B):
        normalised = w[b] / w[b].norm(dim=1, keepdim=True)  # (H, N, P), every channel over the tokens
        membership = torch.softmax(temperature[:, None] * (normalised**2).sum(-1), dim=0)  # (H, N)
        for h in range(H):
            pi = membership[h] / membership[h].sum()
            moment = (pi[:, None] * w[b, h] ** 2).sum(0)  # (P,)
            expected[b, h] = -membership[h][:, None] * w[b, h] / (1 + moment)
    assert_close(ops.tssa(w, temperature=temperature), expected, 1e-7)
