"""CBSA on separate queries, keys and values against what it should be."""

import pytest
import torch
from torch.nn import functional as F

from cbsa_torch import AgentAttention, ops
from cbsa_torch.nn import AdaptedCBSA
from tests.helpers.compare import assert_close

DIM, HEADS = 12, 3


def built(**options):
    return AdaptedCBSA(DIM, HEADS, num_representatives=4, **options).double()


X = torch.randn(2, 17, DIM, generator=torch.Generator().manual_seed(3)).double()


def test_without_contraction_it_starts_as_agent_attention():
    agent = AgentAttention(DIM, HEADS, num_representatives=4).double()
    for layer in (built(), built(contraction="none")):
        layer.load_state_dict(agent.state_dict(), strict=False)
        assert_close(layer(X), agent(X), 1e-12)


@pytest.mark.parametrize("options", [{"contraction": "softmax"}, {"contraction": "exact", "eps": 0.7}], ids=str)
def test_shared_broadcast_is_the_operator_with_the_attention_given(options):
    layer = built(**options, broadcast="shared", contraction_step=1.0)
    heads, agents = layer.heads(X), layer.agents(layer.heads(X)).values
    attention = torch.softmax(agents @ heads.keys.mT * layer.head_dim**-0.5, -1)
    expected = ops.contract_and_broadcast(heads.keys, attention @ heads.values, attention, **options)
    assert_close(layer.mix(heads), expected * 17 / 4, 1e-12)


def test_the_exact_contraction_fades_with_epsilon():
    plain = built(contraction="none")
    exact = built(contraction="exact", eps=1e5, contraction_step=1.0)
    exact.load_state_dict(plain.state_dict(), strict=False)
    assert_close(exact(X), plain(X), 1e-8)


def test_the_shared_broadcast_keeps_its_size_on_larger_grids():
    layer = built(broadcast="shared", contraction="none")
    small = X[:, 1:].reshape(2, 4, 4, DIM).movedim(-1, 1)
    large = F.interpolate(small, scale_factor=4)  # every token sixteen times
    assert_close(layer(large), F.interpolate(layer(small), scale_factor=4), 1e-12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"broadcast": "share"}, ValueError, "did you mean 'shared'"),
        ({"contraction": "sofmax"}, ValueError, "did you mean 'softmax'"),
        ({"contraction": "none", "contraction_step": 0.5}, ValueError, "contraction_step is of a contraction"),
        ({"contraction_step": "full"}, TypeError, "contraction_step must be a number"),
        ({"eps": 0.1}, ValueError, "eps is of contraction='exact'"),
        ({"layout": "offical"}, ValueError, "did you mean 'official'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        built(**options)
