"""Layers in TorchScript: the values and gradients of every mixer, or why it cannot be compiled."""

import copy
import io

import pytest
import timm
import torch
from torch import nn

from cbsa_torch import CBSA, MSSA
from tests.helpers.compare import assert_close
from tests.helpers.mixers import DIM, HEADS, MIXERS

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")

PARAMETRISED = "no parametrisations such as orthogonal=True"
WITHOUT = "methods of its own and no scripted_operator"
KIND = "representatives must be 'pool' or 'learned'"
REFUSED = {
    "cbsa orthogonal": PARAMETRISED,
    "cbsa tied orthogonal": PARAMETRISED,
    "cbsa tied orthogonal certified": PARAMETRISED,
    "cbsa tied orthogonal certified learned": PARAMETRISED,
    "mssa tied orthogonal": PARAMETRISED,
    "cbsa tokens": KIND,
    "cbsa tokens exact": KIND,
    "cbsa principal": KIND,
    "cbsa basis": KIND,
    "cbsa function": KIND,
    "cbsa module": KIND,
    "tssa channel": "form must be 'tost'",
    "linear eigh": "solver must be 'cholesky'",
    "linear attention": WITHOUT,
    "adapted": WITHOUT,
    "adapted shared": WITHOUT,
    "adapted exact": WITHOUT,
}


class Residual(nn.Module):
    """A layer as models call it."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x, grid_size: tuple[int, int]):
        return x + self.attn(x, grid_size)


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_has_its_values_and_gradients_in_torchscript_or_says_why_not(name):
    layer = MIXERS[name]()
    if name in REFUSED:
        with pytest.raises(TypeError, match=f"torch.jit.script cannot compile {type(layer).__name__}: .*"):
            torch.jit.script(layer)
        with pytest.raises(TypeError, match=REFUSED[name]):
            torch.jit.script(layer)
        return
    plain = copy.deepcopy(layer)
    scripted = torch.jit.script(Residual(layer))
    stored = io.BytesIO()
    torch.jit.save(scripted, stored)
    stored.seek(0)
    scripted = torch.jit.load(stored)
    for grid in ((4, 4), (2, 9), (7, 1)):
        x = torch.randn(2, 1 + grid[0] * grid[1], DIM)
        assert_close(scripted(x, grid), x + plain(x, grid), 2e-6)
    x = torch.randn(2, 17, DIM)
    scripted(x, (4, 4)).square().sum().backward()
    (x + plain(x, (4, 4))).square().sum().backward()
    found = {n: p.grad for n, p in scripted.named_parameters()}
    expected = [p.grad for p in plain.parameters()]
    assert len(found) == len(expected)
    sizes = sorted(g.norm().item() for g in found.values())
    assert sizes == pytest.approx(sorted(g.norm().item() for g in expected), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"num_representatives": (3, 2), "layout": "official"},
        {"contraction": "exact", "num_representatives": 12, "head_dim": 3},
        {"step": "relative", "num_representatives": 5},
        {"qkv": "separate", "qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm},
        {"grid_size": (2, 8)},
    ],
    ids=str,
)
def test_options_of_cbsa(options):
    layer = CBSA(DIM, HEADS, **options).eval()
    x = torch.randn(2, 17, DIM)
    grid = () if "grid_size" in options else ((2, 8),)
    assert_close(torch.jit.script(layer)(x, *grid), layer(x, *grid), 2e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_in_graphs_of_fx_and_traced(name):
    layer = MIXERS[name]()
    model = nn.Sequential(layer)
    graph = torch.fx.symbolic_trace(model)
    for tokens in (16, 9):
        x = torch.randn(2, tokens, DIM)
        out, expected = graph(x), model(x)
        assert_close(out, expected, 1e-6)
        found, wanted = (torch.autograd.grad(y.square().sum(), layer.qkv.parameters()) for y in (out, expected))
        for gradient, each in zip(found, wanted, strict=True):
            assert_close(gradient, each, 1e-5)
    traced, x = torch.jit.trace(model, (torch.randn(2, 16, DIM),)), torch.randn(3, 16, DIM)
    assert_close(traced(x), model(x), 1e-5)


class Given(nn.Module):
    """A mixer with a second input, under this name; of None, the grid of a feature map that it flattens."""

    def __init__(self, mixer, name=None):
        super().__init__()
        self.mixer, self.name = mixer, name

    def forward(self, x, given=None):
        if self.name is None:
            return self.mixer(x.flatten(2).mT, grid_size=x.shape[2:])
        return self.mixer(x, **{self.name: given})


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_traces_keep_nothing_of_the_values_and_the_aspect_of_the_example():
    """What could not be checked any more when the graph runs is refused."""
    layer = CBSA(DIM, HEADS, num_representatives=4, num_prefix_tokens=0).eval()
    maps = torch.randn(2, DIM, 4, 4)
    traced = torch.jit.trace(Given(layer), (maps,))
    assert_close(traced(maps + 1), layer(maps + 1).flatten(2).mT, 1e-5)
    with pytest.raises(RuntimeError):
        traced(maps.reshape(2, DIM, 2, 8))
    layer.set_input_size((4, 4))
    x, hidden = maps.flatten(2).mT, torch.rand(3, 2, 1, 16) > 0.6
    for name, masks in (("token_mask", ~hidden[:, :, 0]), ("attn_mask", ~hidden)):
        model = Given(layer, name)
        traced = torch.jit.trace(model, (x, masks[0]))
        assert_close(traced(x, masks[1]), model(x, masks[1]), 1e-5)
    additive = torch.zeros(3, 2, 1, 16).masked_fill(hidden, -torch.inf)
    with pytest.raises(ValueError, match="attn_mask must keep keys .* torch.jit.trace cannot check that"):
        torch.jit.trace(Given(layer, "attn_mask"), (x, additive[0]))
    model = Given(MSSA(DIM, HEADS).eval(), "attn_mask")  # as weights, whatever the example's are
    traced, weights = torch.jit.trace(model, (x, additive[0][:, None])), torch.randn(2, 1, 1, 16)
    assert_close(traced(x, weights), model(x, weights), 1e-5)


def test_dropout_is_that_of_the_mode():
    scripted = torch.jit.script(MSSA(DIM, HEADS, attn_drop=0.5))
    x = torch.randn(1, 16, DIM)
    assert not torch.equal(scripted(x), scripted(x))
    scripted.eval()
    assert torch.equal(scripted(x), scripted(x))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_compiled_layers_refuse():
    scripted = torch.jit.script(CBSA(DIM, HEADS))
    with pytest.raises(torch.jit.Error, match="grid_size is needed to pool representatives"):
        scripted(torch.randn(1, 16, DIM))
    with pytest.raises(torch.jit.Error, match="token_mask must be None in TorchScript"):
        scripted(torch.randn(1, 16, DIM), (4, 4), torch.ones(1, 16, dtype=torch.bool))
    with pytest.raises(torch.jit.Error, match=r"x must be \(B, N, C\) tokens in TorchScript"):
        scripted(torch.randn(1, DIM, 4, 4))
    for options in ({"grid_size": (16,)}, {"num_representatives": (4,)}):
        with pytest.raises(TypeError, match="must have two axes"):
            torch.jit.script(CBSA(DIM, HEADS, **options))


def test_layers_that_learn_their_grid_from_hooks_say_so():
    vit = timm.create_model("vit_tiny_patch16_224", attn_layer=CBSA, depth=1, embed_dim=48)
    with pytest.raises(TypeError, match="cannot compile CBSA: it is told where tokens are by hooks"):
        torch.jit.script(vit)
    assert vit(torch.randn(1, 3, 224, 224)).shape == (1, 1000)  # and it is what it was
