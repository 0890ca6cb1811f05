import pytest
import torch
from timm.layers.attention import Attention
from torch import nn

from cbsa_torch import CBSA, interpret, ops
from cbsa_torch.nn import MHSA, MSSA, TSSA, LinearAttention, LinearCBSA, TokenMixer
from tests.helpers.compare import assert_close
from tests.helpers.mixers import DIM, HEAD_DIM, HEADS, MIXERS, merge, split

N = 16  # a 4 x 4 grid without prefix tokens


def recorded(layer, *args, x=None, **called):
    model = nn.Sequential(layer).double()
    x = torch.randn(2, N, DIM, generator=torch.Generator().manual_seed(1)).double() if x is None else x
    with interpret.capture(model) as records, torch.no_grad():
        output = layer(x, *args, **called)
    record = records["0"]
    return record._replace(grid_size=record.grid_size or (4, 4)), x, output


def matrix(record):
    """The maps of all tokens, stacked: the N x N matrix (B, H, N, N)."""
    n = record.tokens.shape[2]
    return torch.stack([interpret.cls_attention_maps(record, i).flatten(2) for i in range(n)], 2)


def explicit(record, x):
    """The N x N matrix of each mixer in float64, written out."""
    layer = record.layer
    z = split(layer.qkv(x)[..., :DIM]).detach()  # (B, H, N, P)
    k = z if record.keys is None else split(layer.qkv(x)[..., DIM : 2 * DIM]).detach()
    scale = HEAD_DIM**-0.5
    if isinstance(layer, CBSA):
        certified = layer.step == "certified"
        a = record.stages.broadcast_attention if certified else record.stages.attention.mT  # (B, H, N, M)
        return a @ a.mT
    if isinstance(layer, (MSSA, MHSA, Attention)):
        return torch.softmax(scale * z @ k.mT, -1)
    if isinstance(layer, LinearAttention):
        gain = layer.temperature.detach()[:, None, None, None] * HEAD_DIM**0.25
        weights = torch.cosh(gain * (z[..., :, None, :] + k[..., None, :, :])).sum(-1)
        return weights / weights.sum(-1, keepdim=True)
    gram = z.mT @ z
    if isinstance(layer, LinearCBSA):
        eps2 = layer.eps**2 * (N if layer.average else 1)
        values, vectors = torch.linalg.eigh(gram)
        filtered = vectors @ torch.diag_embed(eps2 / (eps2 + values)) @ vectors.mT
        return z @ filtered @ z.mT / eps2
    if isinstance(layer, TSSA) and layer.form == "channel":
        lambdas = gram.diagonal(dim1=-2, dim2=-1)
        return z @ torch.diag_embed(1 / (N * layer.eps**2 + lambdas)) @ z.mT
    if isinstance(layer, TSSA):
        share = (z / z.norm(dim=-2, keepdim=True)).square().sum(-1)
        pi = torch.softmax(layer.temperature.detach()[:, None] * share, 1)
        return pi[..., :, None] * pi[..., None, :] / pi.sum(-1)[..., None, None]
    agents = record.agents.values
    if getattr(layer, "broadcast", None) == "shared":
        a = torch.softmax(scale * agents @ k.mT, -1).mT
        return a @ a.mT
    return torch.softmax(scale * z @ agents.mT, -1) @ torch.softmax(scale * agents @ k.mT, -1)


@pytest.mark.parametrize("name", [*MIXERS, "timm"])
def test_maps_are_rows_of_the_explicit_matrix(name):
    layer = Attention(DIM, HEADS) if name == "timm" else MIXERS[name]()
    record, x, _ = recorded(layer)
    full = explicit(record, x)
    assert_close(matrix(record), full, 1e-7 if name == "tssa" else 1e-12)
    maps = interpret.cls_attention_maps(record, 5)
    assert maps.shape == (2, HEADS, 4, 4)
    assert torch.equal(maps, interpret.cls_attention_maps(record, 5 - N))
    assert not maps.requires_grad


def test_prefix_tokens_are_rows_but_not_on_the_map():
    layer = CBSA(DIM, HEADS, num_representatives=4, num_prefix_tokens=1)
    record, _, _ = recorded(layer, x=torch.randn(2, 1 + N, DIM).double())
    full = record.stages.attention.mT @ record.stages.attention
    for token in (0, 7):
        expected = full[:, :, token, 1:].unflatten(-1, (4, 4))
        assert_close(interpret.cls_attention_maps(record, token), expected, 1e-12)


@pytest.mark.parametrize("name", ["mssa", "mhsa", "agent", "agent shared", "agent learned", "timm"])
def test_softmax_rows_make_the_layers_output(name):
    """What the layer puts out is the matrix times the values, projected."""
    layer = Attention(DIM, HEADS) if name == "timm" else MIXERS[name]()
    record, x, output = recorded(layer)
    assert_close(matrix(record).sum(-1), torch.ones(2, HEADS, N).double(), 1e-12)
    values = split(layer.qkv(x)[..., -DIM:])
    assert_close(layer.proj(merge(matrix(record) @ values)), output, 1e-12)


@pytest.mark.parametrize("name", ["linear", "linear sum"])
def test_the_linear_map_is_what_the_operator_takes_away(name):
    record, _, _ = recorded(MIXERS[name]())
    w, layer = record.tokens, record.layer
    output = ops.linear_cbsa(w, eps=layer.eps, average=layer.average)
    assert_close(w - matrix(record) @ w, output, 1e-10)


def test_small_eps_gives_the_projections_of_cbsa():
    """LinearCBSA and the channel form tend to A A^T of CBSA along principal and basis directions."""
    x = torch.randn(1, N, DIM).double()
    for directions, layer in (
        ("principal", LinearCBSA(DIM, HEADS, eps=1e-5)),
        ("basis", TSSA(DIM, HEADS, form="channel", eps=1e-5)),
    ):
        cbsa = CBSA(DIM, HEADS, representatives=directions, contraction="exact")
        cbsa.qkv.load_state_dict(layer.qkv.state_dict())
        expected = matrix(recorded(cbsa, x=x)[0])
        assert_close(matrix(recorded(layer, x=x)[0]), expected, 1e-6)


def test_memberships_of_tssa_weight_its_moments():
    """The map over Pi of the token is the weight of each token in the mean squares of the operator."""
    record, _, _ = recorded(TSSA(DIM, HEADS))
    tokens = record.tokens
    with torch.no_grad():
        record.layer.temperature.copy_(torch.tensor([1.0, -2.0, 3.0]))
    full = matrix(record)
    pi = full.sum(-1)  # over n, the weights sum to 1
    assert_close(pi.sum(1), torch.ones(2, N).double(), 1e-6)
    moment = (full[:, :, :1] / pi[:, :, :1, None]) @ tokens.square()
    expected = ops.tssa(tokens, temperature=record.layer.temperature.detach())
    assert_close(-tokens * pi[..., None] / (1 + moment), expected, 1e-6)


@pytest.mark.parametrize("name", MIXERS)
def test_masked_tokens_get_and_give_nothing(name):
    real = torch.ones(1, N, dtype=torch.bool)
    real[0, 12:] = False  # the last row of the grid
    x = torch.randn(1, N, DIM).double()
    layer = MIXERS[name]()
    record, _, _ = recorded(layer, token_mask=real, x=x)
    maps = matrix(record)
    assert maps[..., 12:].abs().max() == 0
    assert maps[:, :, 12:].abs().max() == 0
    cut, _, _ = recorded(layer, grid_size=(3, 4), x=x[:, :12])
    alone = matrix(cut._replace(grid_size=(3, 4)))
    assert_close(maps[:, :, :12, :12], alone, 1e-7 if "tssa" in name else 1e-9)


@pytest.mark.parametrize("layer", [MSSA(DIM, HEADS), MHSA(DIM, HEADS), Attention(DIM, HEADS)])
def test_masks_that_differ_from_query_to_query(layer):
    generator = torch.Generator().manual_seed(2)
    allowed = torch.rand(N, N, generator=generator) > 0.4
    allowed.fill_diagonal_(True)
    bias = torch.randn(2, HEADS, N, N, generator=generator).double()
    for called in (
        {"attn_mask": allowed},
        {"attn_mask": allowed.expand(2, 1, N, N)},
        {"attn_mask": bias},
        {"attn_mask": bias[:, :1, :1]},
        {"is_causal": True},
        {"attn_mask": allowed[:1].expand(2, 1, 1, N)},
    ):
        record, x, output = recorded(layer, **called)
        values = split(layer.qkv(x)[..., -DIM:])
        full = matrix(record)
        if record.token_mask is None:
            assert_close(layer.proj(merge(full @ values)), output, 1e-12)
        else:
            assert full[:, :, allowed[0]][..., ~allowed[0]].abs().max() == 0
            assert_close(full[:, :, 0].sum(-1), torch.ones(2, HEADS).double() * allowed[0, 0], 1e-12)


@pytest.mark.parametrize(("grid", "axes"), [((16,), 1), ((2, 4, 2), 3)])
@pytest.mark.parametrize("name", ["cbsa", "agent", "mssa", "tssa", "linear"])
def test_grids_of_one_and_three_axes(name, grid, axes):
    layer = MIXERS[name]()
    model = nn.Sequential(layer).double()
    x = torch.randn(2, DIM, *grid).double()
    with interpret.capture(model) as records:
        layer(x, None) if axes == 3 else layer(x)
    maps = interpret.cls_attention_maps(records["0"], 3)
    assert maps.shape == (2, HEADS, *grid)
    assert_close(maps.flatten(2), explicit(records["0"], x.flatten(2).mT)[:, :, 3], 1e-6)
    assert interpret.upsample_maps(maps, tuple(2 * g for g in grid)).shape == (2, HEADS, *(2 * g for g in grid))


@pytest.mark.parametrize("name", ["cbsa", "cbsa separate", "agent", "agent shared", "agent learned"])
def test_receptive_fields_are_softmaxes_over_tokens(name):
    real = torch.ones(2, N, dtype=torch.bool)
    real[1, 8:] = False
    record, _, _ = recorded(MIXERS[name](), token_mask=real)
    fields = interpret.receptive_fields(record)
    assert fields.shape == (2, HEADS, 4, 4, 4)
    keys = record.tokens if record.keys is None else record.keys
    rep = record.stages.representatives if record.stages else record.agents.values
    expected = torch.softmax(HEAD_DIM**-0.5 * rep[0] @ keys[0].mT, -1)
    assert_close(fields[0].flatten(2), expected, 1e-12)
    assert fields[1, ..., 2:, :].abs().max() == 0


def test_upsampling_by_hand():
    maps = torch.tensor([[0.0, 4.0]])  # one map on a grid of two cells
    assert torch.equal(interpret.upsample_maps(maps, (4,)), torch.tensor([[0.0, 1.0, 3.0, 4.0]]))
    square = torch.tensor([[0.0, 4.0], [8.0, 12.0]])
    expected = torch.tensor([0.0, 1, 3, 4]) + torch.tensor([0.0, 2, 6, 8])[:, None]
    assert_close(interpret.upsample_maps(square, (4, 4)), expected, 1e-7)
    assert torch.equal(interpret.upsample_maps(square, (2, 2)), square)
    assert interpret.upsample_maps(torch.zeros(0, 3, 2, 2), (4, 4)).shape == (0, 3, 4, 4)
    assert interpret.upsample_maps(torch.ones(2, 3, 2, 2, 2), (3, 4, 5)).mean() == 1


class Mine(TokenMixer):
    def mix(self, heads):
        return heads.queries

    def count_heads(self, heads):
        raise AssertionError("maps count nothing")


def made_by(mixer):
    return recorded(mixer(DIM, HEADS))[0]


RECORD, _, _ = recorded(MIXERS["cbsa"]())


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: interpret.cls_attention_maps(RECORD, 16), IndexError, "one of 16 tokens, -16 to 15, got 16"),
        (lambda: interpret.cls_attention_maps(RECORD, 1.0), TypeError, "token must be an int, got 1.0"),
        (lambda: interpret.cls_attention_maps(RECORD._replace(grid_size=None)), ValueError, "0 has no grid"),
        (lambda: interpret.cls_attention_maps(made_by(Mine)), ValueError, "to have a map; 0 is Mine"),
        (lambda: interpret.receptive_fields(made_by(MSSA)), ValueError, "CBSA or AgentAttention; 0 is MSSA"),
        (lambda: interpret.upsample_maps(torch.ones(2, 2), (0, 2)), ValueError, "size must be 1 to 3"),
        (lambda: interpret.upsample_maps(torch.ones(2, 2), 4), ValueError, "size must be 1 to 3"),
        (lambda: interpret.upsample_maps(torch.ones(2), (4, 4)), ValueError, "maps must have shape"),
        (lambda: interpret.upsample_maps(torch.ones(2, 2).long(), (4, 4)), TypeError, "floating-point"),
    ],
)
def test_bad_arguments_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
