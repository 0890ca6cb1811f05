"""Every mixer on a CUDA device against the same layer in float64 on the CPU."""

import math
from functools import partial

import pytest
import torch

from cbsa_torch import CBSA, MHSA, MSSA, TSSA, AgentAttention, LinearCBSA
from cbsa_torch.ops import pool_representatives
from tests.helpers.compare import assert_close

pytestmark = pytest.mark.gpu

MIXERS = {
    "cbsa": CBSA,
    "cbsa triton": partial(CBSA, impl="triton"),
    "cbsa exact": partial(CBSA, contraction="exact"),
    "cbsa none": partial(CBSA, contraction="none"),
    "cbsa basis": partial(CBSA, representatives="basis", contraction="exact"),
    "cbsa tokens": partial(CBSA, representatives="tokens"),
    "cbsa orthogonal": partial(CBSA, tied=True, orthogonal=True),
    "mssa": MSSA,
    "mhsa": MHSA,
    "tssa": TSSA,
    "channel": partial(TSSA, form="channel"),
    "linear": LinearCBSA,
    "linear eigh": partial(LinearCBSA, solver="eigh"),
    "agent": AgentAttention,
    "agent shared": partial(AgentAttention, qkv="shared"),
}


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_forward_and_gradients(name, dtype, tolerance, masked):
    layer = MIXERS[name](64, 4)
    twin = MIXERS[name](64, 4, dtype=torch.float64)
    if name == "cbsa triton":
        twin.impl = "eager"
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, of its older versions
@pytest.mark.filterwarnings("ignore::UserWarning")  # its advice on speed
@pytest.mark.parametrize("name", MIXERS)
def test_compiles_with_inductor(name):
    torch.compiler.reset()
    layer = MIXERS[name](64, 4).cuda()
    x = torch.randn(2, 64, 32, 32, device="cuda")
    assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), 1e-3)


@pytest.mark.parametrize("mixer", [MHSA, AgentAttention])
def test_norms_of_queries_and_keys_under_autocast(mixer):
    layer, x = mixer(64, 4, qk_norm=True, norm_layer=torch.nn.LayerNorm), torch.randn(2, 16, 64)
    expected = layer(x)
    layer = layer.cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert_close(layer(x.cuda()).float().cpu(), expected, 5e-2)


@pytest.mark.parametrize("grid_size", [(64, 80), (61, 83), (4097,), (11, 20, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pooling_of_large_cells(grid_size, dtype):
    tokens = torch.randn(2, 3, math.prod(grid_size), 16).to(dtype)
    expected = pool_representatives(tokens.double(), grid_size, 16).values
    pooled = pool_representatives(tokens.cuda(), grid_size, 16).values
    assert_close(pooled.double().cpu(), expected, {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype])
