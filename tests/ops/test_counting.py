"""Counted FLOPs against what PyTorch counts when the operator runs."""

from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cbsa_torch import CBSA, ISTA, ops
from cbsa_torch.nn import MHSA, MSSA, TSSA, AgentAttention, LinearCBSA
from cbsa_torch.ops import counting
from cbsa_torch.ops.counting import Counts
from cbsa_torch.ops.ista import ista_equation

H = 3


def measured(function):
    """FLOPs of the matrix products in ``function()``."""
    # The fused kernels of softmax attention are not counted on CPU; the plain one is made of products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def draw(rows, p):
    return torch.randn(1, H, rows, p)


SIZES = [(11, 4, 5), (7, 9, 4), (6, 6, 6), (5, 1, 3)]
each_size = pytest.mark.parametrize(("n", "m", "p"), SIZES, ids=str)


@each_size
@pytest.mark.parametrize("contraction", ["softmax", "exact", "none"])
@pytest.mark.parametrize("extracted", [True, False])
def test_cbsa(n, m, p, contraction, extracted):
    tokens, representatives = draw(n, p), draw(m, p)
    inputs = ops.cbsa_inputs(tokens, representatives, contraction=contraction)
    if not extracted:
        inputs = inputs._replace(attention=torch.randn(1, H, m, n))
    counts = counting.cbsa(n, m, num_heads=H, head_dim=p, contraction=contraction, extracted=extracted)
    assert counts.products == measured(lambda: ops.cbsa_stages(inputs))
    assert (counts.factorizations > 0) == (contraction == "exact")


@each_size
def test_the_other_operators(n, m, p):
    w, agents, heads = draw(n, p), draw(m, p), {"num_heads": H, "head_dim": p}
    runs = [
        (counting.softmax_attention(n, **heads), lambda: ops.mssa(w)),
        (counting.softmax_attention(n, **heads), lambda: ops.softmax_attention(w, w, w)),
        (counting.agent_attention(n, m, **heads), lambda: ops.agent_attention(w, agents, w, w)),
        (counting.agent_attention(n, m, separate=True, **heads), lambda: ops.agent_attention(w, agents, w, w)),
        (counting.linear_cbsa(n, **heads), lambda: ops.linear_cbsa(w)),
        (counting.linear_cbsa(n, solver="eigh", **heads), lambda: ops.linear_cbsa(w, solver="eigh")),
        (counting.channel_attention(n, weighted=True, **heads), lambda: ops.tssa(w)),
    ]
    for counts, run in runs:
        assert counts.products == measured(run)
    assert counting.channel_attention(n, **heads).products == 0
    assert measured(lambda: ops.channel_attention(w)) == 0  # work per element only


def test_counts_are_per_item_and_proportional_to_heads():
    w = torch.randn(4, H, 7, 5)
    assert measured(lambda: ops.mssa(w)) == 4 * counting.softmax_attention(7, num_heads=H, head_dim=5).products
    for function, args in (
        (counting.cbsa, (7, 4)),
        (counting.softmax_attention, (7,)),
        (counting.agent_attention, (7, 4)),
        (counting.linear_cbsa, (7,)),
        (counting.channel_attention, (7,)),
    ):
        one, three = (function(*args, num_heads=h, head_dim=5) for h in (1, 3))
        assert three == one + one + one == one * 3


def test_factorisations_by_the_textbook():
    """Cholesky s^3 / 3, two triangular solves of s^2 each per column (two FLOPs an entry), eigh 9 s^3."""
    heads = {"num_heads": 1, "head_dim": 6}
    wide = counting.cbsa(50, 9, contraction="exact", **heads)  # P < M: a P x P system, M right-hand sides
    assert wide.factorizations == 6**3 // 3 + 2 * 6**2 * 9
    narrow = counting.cbsa(50, 3, contraction="exact", **heads)  # M < P: an M x M system, P columns
    assert narrow.factorizations == 3**3 // 3 + 2 * 3**2 * 6
    assert counting.linear_cbsa(50, **heads).factorizations == 6**3 // 3 + 2 * 6**3
    assert counting.linear_cbsa(50, solver="eigh", **heads).factorizations == 9 * 6**3


def test_similarities():
    heads = {"num_heads": H, "head_dim": 5}
    assert counting.cbsa(11, 4, **heads).similarities == H * (11 * 4 + 4 * 5 // 2)
    assert counting.cbsa(11, 4, contraction="none", **heads).similarities == H * 11 * 4
    assert counting.softmax_attention(11, **heads).similarities == H * 11**2
    assert counting.agent_attention(11, 4, **heads).similarities == H * 11 * 4
    assert counting.agent_attention(11, 4, separate=True, **heads).similarities == 2 * H * 11 * 4
    assert counting.linear_cbsa(11, **heads).similarities == H * 11 * 5
    assert counting.channel_attention(11, **heads).similarities == H * 11 * 5


def test_counts_add_up():
    a, b = Counts(1, 20, 300), Counts(4000, 50000, 600000)
    assert a + b == Counts(4001, 50020, 600300)
    assert a + Counts() == a
    assert a * 3 == Counts(3, 60, 900)
    assert (a.flops, b.flops) == (21, 54000)


def test_linear_and_ista():
    x = torch.randn(1, 7, 6)
    assert counting.linear(7, 6, 5).products == measured(lambda: torch.nn.Linear(6, 5)(x))
    layer = ISTA(6)
    fused = layer.fuse()
    assert counting.ista(7, 6).products == measured(lambda: ista_equation(x, layer.weight, 0.1, 0.1))
    assert counting.ista(7, 6, fused=True).products == measured(lambda: fused(x))


@pytest.mark.parametrize(
    "mixer", [CBSA, MSSA, MHSA, LinearCBSA, TSSA, partial(AgentAttention, qkv="shared"), AgentAttention]
)
@pytest.mark.parametrize("head_dim", [None, 6])
@pytest.mark.parametrize("n", [9, 36])
def test_mixers_count_what_they_do_between_their_projections(mixer, head_dim, n):
    layer = mixer(12, 3, head_dim=head_dim)
    x = torch.randn(1, n, 12)
    projections = layer.qkv.weight.numel() + layer.proj.weight.numel()
    assert layer.counts(x).products == measured(lambda: layer(x)) - 2 * n * projections


def test_bad_contractions_are_named():
    with pytest.raises(ValueError, match="contraction must be one of.*did you mean 'exact'"):
        counting.cbsa(9, 4, num_heads=1, head_dim=4, contraction="exat")
