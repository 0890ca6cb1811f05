"""Layers merged for inference compute what they did, keep nothing that trains, and lose nothing silently."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

from cbsa_torch import ISTA
from cbsa_torch.nn import MSSA, ConvStem
from cbsa_torch.nn.fused import Fused, FusedConv2d
from cbsa_torch.nn.orthonormal import OrthonormalLinear
from tests.helpers.compare import assert_close


def stem(patch_size=4, chans=8):
    """With statistics, scales and shifts that matter."""
    layer = ConvStem(3, chans, patch_size)
    for norm in (module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return layer.eval()


LAYERS = {
    "ista": (lambda: ISTA(6, step_size=0.3, sparsity=0.2), (2, 3, 6)),  # as many tokens as channels
    "ista few": (lambda: ISTA(6), (1, 2, 6)),
    "stem": (stem, (2, 3, 8, 12)),
    "stem of one": (lambda: stem(1), (2, 3, 5, 4)),
    "orthonormal": (lambda: OrthonormalLinear(6, 4), (3, 6)),
    "orthonormal without bias": (lambda: OrthonormalLinear(6, 4, bias=False), (3, 6)),
}
each_layer = pytest.mark.parametrize("name", LAYERS)


def build(name, dtype=torch.float32):
    make, shape = LAYERS[name]
    return make().to(dtype), torch.randn(shape, dtype=dtype)


@each_layer
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_a_fused_layer_computes_the_same(name, dtype, tolerance):
    layer, x = build(name, dtype)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    fused = layer.fuse()
    assert_close(fused(x), layer(x), tolerance)
    again = fused.fuse()
    for other in (again, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(x), fused(x))
        assert list(other.state_dict()) == list(fused.state_dict())
    assert not list(fused.parameters())
    assert not any(module.training for module in fused.modules() if isinstance(module, Fused))
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    gradients = [
        torch.autograd.grad(f(v).square().sum(), v)[0] for f, v in zip((fused, layer), inputs, strict=True)
    ]
    assert_close(*gradients, 10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["ista", "ista few", "stem"])
def test_in_half_precision_it_is_as_exact_as_the_layer(name, dtype):
    layer, x = build(name, dtype)
    exact = copy.deepcopy(layer).double()(x.double())
    error, fused_error = ((f(x).double() - exact).abs().max() for f in (layer, layer.fuse()))
    assert fused_error <= 2 * error + torch.finfo(dtype).eps * exact.abs().max()


def test_half_precision_is_refused_where_the_layer_refuses_it():
    with pytest.raises(ValueError, match="orthogonal needs float32 or float64 parameters, got torch.float16"):
        OrthonormalLinear(6, 4).half().fuse()


@each_layer
def test_autocast_frozen_weights_and_training_mode_change_nothing(name):
    layer, x = build(name)
    expected = layer.fuse()(x)
    with torch.autocast("cpu", torch.bfloat16):
        fused = layer.requires_grad_(False).train().fuse()
        assert_close(fused(x).float(), expected, 2e-2)
    assert_close(fused.eval()(x), expected, 1e-6)


@each_layer
def test_on_meta_it_is_fused_without_values(name):
    layer, x = build(name)
    fused = layer.to("meta").fuse()
    assert fused(x.to("meta")).shape == build(name)[0](x).shape
    given = build(name)[0].fuse()
    fused.load_state_dict(given.state_dict(), assign=True)
    assert torch.equal(fused(x), given(x))


@each_layer
def test_it_is_not_trained(name):
    layer, _ = build(name)
    fused = layer.fuse()
    with pytest.raises(
        RuntimeError, match="is fused for inference and cannot be trained.*train the model that"
    ):
        fused.train()
    fused.requires_grad_(True)
    assert not any(tensor.requires_grad for tensor in fused.state_dict(keep_vars=True).values())
    with pytest.raises(ValueError, match="empty parameter list"):
        torch.optim.SGD(fused.parameters(), lr=0.1)


@each_layer
@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_the_parts_are_not_loaded(name, strict):
    layer, x = build(name)
    model, fused = nn.Sequential(layer), nn.Sequential(layer.fuse())
    expected = fused(x)
    with pytest.raises(RuntimeError, match=r"0\S* is fused and takes no weights of its parts .*before fusing"):
        fused.load_state_dict(model.state_dict(), strict=strict)
    assert torch.equal(fused(x), expected)
    other = nn.Sequential(build(name)[0].fuse())
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(x), expected)


def parts(layer):
    """What is merged, of a layer."""
    if isinstance(layer, ConvStem):
        return [layer.proj[0], *layer.proj[0]]
    return [layer]


@each_layer
@pytest.mark.parametrize(
    "register",
    [
        lambda part: part.register_forward_hook(lambda *_: None),
        lambda part: part.register_forward_pre_hook(lambda *_: None),
        lambda part: part.register_full_backward_hook(lambda *_: None),
        lambda part: part.register_full_backward_pre_hook(lambda *_: None),
        lambda part: vars(part).update(forward=part.forward),
    ],
    ids=["forward", "before", "backward", "before backward", "replaced"],
)
def test_what_was_done_to_a_layer_is_not_lost(name, register):
    for i in range(len(parts(build(name)[0]))):
        layer, _ = build(name)
        register(parts(layer)[i])
        with pytest.raises(ValueError, match="cannot be fused: it(s forward was replaced| has hooks)"):
            layer.fuse()


def test_hooks_on_what_is_not_merged_stay():
    layer, x = build("stem")
    seen = []
    layer.register_forward_hook(lambda module, *_: seen.append(module))
    layer.proj[1].register_forward_hook(lambda module, *_: seen.append(module))
    fused = layer.fuse()
    fused(x)
    assert seen == [fused.proj[1], fused]


class Halved(ISTA):
    def forward(self, x):
        return super().forward(x) / 2


class LoudConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Packed(torch.Tensor):
    """A tensor that is not what its values say, as quantised ones."""


def with_conv(conv):
    layer = stem()
    layer.proj[0][0] = conv
    return layer


def with_norm(norm):
    layer = stem()
    layer.proj[0][1] = norm
    return layer


def packed():
    layer = ISTA(6)
    layer.weight = nn.Parameter(torch.randn(6, 6).as_subclass(Packed), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "kind", "message"),
    [
        (lambda: Halved(6), TypeError, "Halved cannot be fused: it has another forward than ISTA"),
        (lambda: with_conv(LoudConv(3, 4, 3, 2, 1)), TypeError, "another forward than Conv2d"),
        (lambda: with_conv(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1))), TypeError, "another forward than Conv2d"),
        (lambda: with_norm(nn.GroupNorm(2, 4)), TypeError, "GroupNorm cannot be fused.*than BatchNorm2d"),
        (lambda: with_norm(nn.BatchNorm2d(4, track_running_stats=False)), ValueError, "keeps no statistics"),
        (packed, TypeError, "weight must be an ordinary tensor, got Packed; fuse before quantising"),
    ],
)
def test_layers_of_other_kinds_are_refused(layer, kind, message):
    with pytest.raises(kind, match=message):
        layer().fuse()


@pytest.mark.parametrize(
    "layer",
    [
        lambda: with_conv(nn.Conv2d(3, 4, (3, 5), 2, (1, 4), dilation=(1, 2), padding_mode="reflect")),
        lambda: with_norm(nn.BatchNorm2d(4, eps=0.5, affine=False)),
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(stem()),
        lambda: timm.layers.freeze_batch_norm_2d(stem()),
    ],
    ids=["convolution", "norm", "synchronised", "frozen"],
)
def test_options_of_what_is_merged_are_kept(layer):
    layer, x = layer().eval(), torch.randn(2, 3, 8, 12)
    fused = layer.fuse()
    assert sum(isinstance(module, FusedConv2d) for module in fused.modules()) == 2
    assert_close(fused(x), layer(x), 1e-6)


def test_a_parametrised_dictionary_counts_as_it_is_read():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer, x = build("ista")
    plain = layer.fuse()(x)
    parametrize.register_parametrization(layer, "weight", Doubled())
    assert_close(layer.fuse()(x), layer(x), 1e-6)
    assert not torch.allclose(layer(x), plain)


def test_inside_a_wrapper_it_is_what_the_wrapper_calls():
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer, self.down, self.up = base, nn.Linear(6, 1, bias=False), nn.Linear(1, 6, bias=False)

        def forward(self, x):
            return self.base_layer(x) + self.up(self.down(x))

    layer, x = build("ista")
    adapter = Adapter(layer)
    expected = adapter(x)
    adapter.base_layer = layer.fuse()
    assert_close(adapter(x), expected, 1e-6)


def test_fused_bases_are_not_drawn_anew():
    mixer = MSSA(12, 3, orthogonal=True)
    mixer.qkv = mixer.qkv.fuse()
    before = mixer.qkv.weight.clone()
    with pytest.raises(ValueError, match="cannot draw qkv.*fused"):
        mixer.reset_parameters()
    assert torch.equal(mixer.qkv.weight, before)
