"""Claims that are equations: the largest relative error of each, in float64 on random tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from cbsa_torch import ops

HEADS, TOKENS, WIDTH, CELLS = 3, 36, 8, 9
EPS = 0.7


def draw() -> Tensor:
    """Tokens in the subspaces, ``(1, H, N, P)``."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, HEADS, TOKENS, WIDTH, generator=generator, dtype=torch.float64)


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference in parts of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def gradient() -> float:
    """A C of the exact contraction is a multiple of the rate's gradient, the attention held (Eq. 6, 7)."""
    tokens = draw().requires_grad_()
    pooled = ops.pool_representatives(tokens, (6, 6), CELLS).values.detach()
    inputs = ops.cbsa_inputs(tokens.detach(), pooled, contraction="exact", eps=EPS)
    attention = ops.cbsa_stages(inputs).attention
    rate = ops.coding_rate(attention @ tokens, eps=EPS).sum()
    alpha = WIDTH / (CELLS * EPS**2)
    (slope,) = torch.autograd.grad(rate, tokens)
    inputs = ops.cbsa_inputs(
        tokens.detach(), attention @ tokens.detach(), attention=attention, contraction="exact", eps=EPS
    )
    return error(alpha * ops.cbsa_stages(inputs).output, slope)


def softmax_attention() -> float:
    """All tokens as representatives, contraction (8): softmax attention (Eq. 9)."""
    w = draw()
    every = torch.eye(TOKENS, dtype=w.dtype).expand(1, HEADS, TOKENS, TOKENS)
    ours = ops.contract_and_broadcast(w, w, every)
    return error(ours, torch.softmax(w @ w.mT * WIDTH**-0.5, -1) @ w)


def linear_attention() -> float:
    """Principal directions, contraction (7): linear attention (Eq. 12)."""
    w = draw()
    chosen = ops.principal_directions(w)
    assert chosen.attention is not None
    ours = ops.contract_and_broadcast(w, chosen.values, chosen.attention, contraction="exact", eps=EPS)
    # the rows of W (M = P directions): alpha is 1 / eps^2
    inverse = torch.linalg.inv(torch.eye(WIDTH, dtype=w.dtype) + w.mT @ w / EPS**2)
    return error(ours, w @ inverse)


def channel_attention() -> float:
    """Directions of a fixed basis, contraction (7): channel attention (Eq. 13)."""
    w = draw()
    chosen = ops.basis_directions(w)
    assert chosen.attention is not None
    ours = ops.contract_and_broadcast(w, chosen.values, chosen.attention, contraction="exact", eps=EPS)
    return error(ours, w * (EPS**2 / (EPS**2 + w.square().sum(-2, keepdim=True))))


def agent_attention() -> float:
    """Without contraction, with a softmax to broadcast: agent attention, and the agents broadcast."""
    w = draw()
    agents = ops.pool_representatives(w, (6, 6), CELLS).values
    ours = ops.cbsa(w, agents, contraction="none", broadcast="softmax")
    shares = torch.softmax(w @ agents.mT * WIDTH**-0.5, -1)
    return error(ours - shares @ agents, ops.agent_attention(w, agents, w, w))
