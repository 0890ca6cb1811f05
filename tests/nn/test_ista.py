"""ISTA as a layer; its equation is tested with the function."""

import pytest
import torch

from cbsa_torch import ISTA


def test_ista_is_non_negative_and_has_one_weight():
    layer = ISTA(6, step_size=0.3, sparsity=0.2)
    assert (layer(torch.randn(2, 5, 6)) >= 0).all()
    assert [tuple(p.shape) for p in layer.parameters()] == [(6, 6)]
    assert "step_size=0.3" in repr(layer)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"sparsity": -1.0}, ValueError, "sparsity must not be negative"),
        ({"step_size": "a"}, TypeError, "step_size must be a number"),
    ],
)
def test_bad_ista_is_named(options, kind, message):
    with pytest.raises(kind, match=message):
        ISTA(4, **options)
