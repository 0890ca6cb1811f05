"""Every token mixer, ready to be built, and how tests look at one."""

from functools import partial

import pytest
import torch
from torch import nn

from cbsa_torch import CBSA, ops
from cbsa_torch.nn import MHSA, MSSA, TSSA, AdaptedCBSA, AgentAttention, LinearAttention, LinearCBSA
from cbsa_torch.ops import Representatives
from tests.helpers.compare import assert_close

DIM, HEADS, HEAD_DIM = 12, 3, 4


def mean_and_first(tokens, grid_size, token_mask):
    """A strategy that is a function: the mean of the real tokens, and the first token."""
    if token_mask is None:
        mean = tokens.mean(2, keepdim=True)
    else:
        real = token_mask[:, None, :, None]
        mean = tokens.masked_fill(~real, 0.0).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
    return Representatives(torch.cat([mean, tokens[:, :, :1]], 2))


class ShiftedPool(nn.Module):
    """A strategy that is a module with parameters, and needs the grid."""

    needs_grid = True

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.empty(HEADS, 1, HEAD_DIM))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.shift)

    def forward(self, tokens, grid_size, token_mask):
        pooled = ops.pool_representatives(tokens, grid_size, 4, token_mask=token_mask)
        return pooled._replace(values=pooled.values + self.shift.to(tokens.dtype))


class Called(nn.Module):
    """A model of mixers one after the other, with residuals, each called with this grid and token mask."""

    def __init__(self, *layers, grid=None, mask=None):
        super().__init__()
        self.layers, self.grid, self.mask = nn.ModuleList(layers), grid, mask

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x, self.grid, token_mask=self.mask)
        return x


def build_shifted(**options):
    return CBSA(DIM, HEADS, representatives=ShiftedPool(), **options)


def of(mixer, **chosen):
    return lambda **options: mixer(DIM, HEADS, **{**chosen, **options})


pooling = partial(of, CBSA, num_representatives=4)


MIXERS = {
    "cbsa": pooling(),
    "cbsa exact": pooling(contraction="exact", eps=0.8),
    "cbsa none": pooling(contraction="none"),
    "cbsa separate": pooling(qkv="separate"),
    "cbsa tied": pooling(tied=True),
    "cbsa orthogonal": pooling(orthogonal=True),
    "cbsa tied orthogonal": pooling(tied=True, orthogonal=True, contraction="exact", eps=0.8),
    "cbsa tied orthogonal certified": pooling(step="certified"),
    "cbsa relative": pooling(step="relative"),
    "cbsa tied orthogonal certified learned": pooling(step="certified", representatives="learned"),
    "cbsa learned": pooling(representatives="learned"),
    "cbsa tokens": of(CBSA, representatives="tokens"),
    "cbsa tokens exact": of(CBSA, representatives="tokens", contraction="exact", eps=0.8),
    "cbsa principal": of(CBSA, representatives="principal", contraction="exact", eps=0.8),
    "cbsa basis": of(CBSA, representatives="basis", contraction="exact", eps=0.8),
    "cbsa function": of(CBSA, representatives=mean_and_first),
    "cbsa module": build_shifted,
    "mssa": of(MSSA),
    "mssa tied orthogonal": of(MSSA, tied=True, orthogonal=True),
    "mhsa": of(MHSA),
    "tssa": of(TSSA),
    "tssa channel": of(TSSA, form="channel"),
    "linear": of(LinearCBSA),
    "linear eigh": of(LinearCBSA, solver="eigh"),
    "linear sum": of(LinearCBSA, average=False),
    "agent": of(AgentAttention, num_representatives=4),
    "agent shared": of(AgentAttention, num_representatives=4, qkv="shared"),
    "linear attention": of(LinearAttention),
    "adapted": of(AdaptedCBSA, num_representatives=4, contraction_step=1.0),
    "adapted shared": of(AdaptedCBSA, num_representatives=4, broadcast="shared", contraction_step=1.0),
    "adapted exact": of(AdaptedCBSA, num_representatives=4, contraction="exact", eps=0.8, contraction_step=0.5),
    "agent learned": of(AgentAttention, num_representatives=4, representatives="learned"),
}


ORTHOGONAL = [name for name in MIXERS if "orthogonal" in name]


each_mixer = pytest.mark.parametrize("build", MIXERS.values(), ids=MIXERS)


each_name = pytest.mark.parametrize("name", MIXERS)


def gradients(layer, x, *args, cotangent=None):
    """Output, gradient of the input, and of every parameter."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x, *args)
    if cotangent is None:
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    out.backward(cotangent)
    return out.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters()}


def assert_same(actual, expected, tolerance):
    assert_close(actual[0], expected[0], tolerance)
    assert_close(actual[1], expected[1], tolerance)
    for name, gradient in expected[2].items():
        assert_close(actual[2][name], gradient, tolerance)


def split(tensor):
    return tensor.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


def merge(heads):
    return heads.transpose(1, 2).flatten(2)


def assert_orthonormal(layer):
    rows = layer.qkv.weight.detach().double()
    assert_close(rows @ rows.T, torch.eye(len(rows)).double(), 1e-5)
