"""MSSA and MHSA: masks that differ from query to query, and dropout of attention weights."""

import pytest
import torch

from cbsa_torch.nn import MHSA, MSSA
from tests.helpers.compare import assert_close
from tests.helpers.mixers import DIM, HEADS

COMPARING = pytest.mark.parametrize("mixer", [MSSA, MHSA])


@COMPARING
def test_causal_layers_do_not_look_ahead(mixer):
    layer = mixer(DIM, HEADS).double()
    x = torch.randn(2, 9, DIM).double()
    out = layer(x, is_causal=True)
    changed = x.clone()
    changed[:, 5:] += 1
    assert_close(layer(changed, is_causal=True)[:, :5], out[:, :5], 1e-14)
    lower = torch.ones(9, 9, dtype=torch.bool).tril()
    assert_close(layer(x, attn_mask=lower), out, 1e-14)
    added = torch.zeros(9, 9).double().masked_fill(~lower, -torch.inf)
    assert_close(layer(x, attn_mask=added), out, 1e-14)
    with pytest.raises(ValueError, match="attn_mask or is_causal, not both"):
        layer(x, attn_mask=lower, is_causal=True)


@COMPARING
def test_causal_and_padded_is_causal_alone(mixer):
    layer = mixer(DIM, HEADS).double()
    x = torch.randn(3, 9, DIM).double()
    mask = torch.arange(9) < torch.tensor([9, 5, 0])[:, None]
    x[1, 5:] = torch.nan
    out = layer(x, token_mask=mask, is_causal=True)
    assert_close(out[1, :5], layer(x[1:2, :5], is_causal=True)[0], 1e-13)
    assert (out[2] == 0).all()


@COMPARING
def test_masks_of_other_kinds_are_named(mixer):
    layer = mixer(DIM, HEADS)
    x = torch.randn(2, 9, DIM)
    with pytest.raises(
        ValueError, match=r"attn_mask must broadcast to \(B, H, N, K\) = \(2, 3, 9, 9\), got \(9, 8\)"
    ):
        layer(x, attn_mask=torch.ones(9, 8, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"attn_mask must be boolean or torch\.float32"):
        layer(x, attn_mask=torch.ones(9, 9, dtype=torch.int64))


@COMPARING
def test_attention_dropout_only_while_training(mixer):
    layer = mixer(DIM, HEADS, attn_drop=0.9)
    x = torch.randn(2, 9, DIM)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
