"""The layer on a CUDA device against the same layer in float64 on the CPU."""

import pytest
import torch

from cbsa_torch import CBSA
from tests.helpers.compare import assert_close

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("contraction", ["softmax", "exact", "none"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_forward_and_gradients(contraction, dtype, tolerance, masked):
    layer = CBSA(64, 4, contraction=contraction)
    twin = CBSA(64, 4, contraction=contraction, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, 64, 17, 23)
    mask = torch.rand(2, 17, 23) > 0.3 if masked else None
    expected = twin(x.double(), token_mask=mask)
    expected.square().sum().backward()
    layer = layer.cuda()
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        out = layer(x.cuda(), token_mask=None if mask is None else mask.cuda())
    out.float().square().sum().backward()
    assert_close(out.double().cpu(), expected, tolerance)
    for ours, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        assert_close(ours.grad.double().cpu(), theirs.grad, 10 * tolerance)


def test_compiles_with_inductor():
    layer = CBSA(64, 4).cuda()
    x = torch.randn(2, 64, 32, 32, device="cuda")
    assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), 1e-3)
