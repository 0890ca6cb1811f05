"""The decoder: the official one's masks, its own arithmetic, any grid, any number of classes."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cbsa_torch import CBSA, MHSA, MSSA, TSSA
from cbsa_torch.models import MaskTransformerDecoder, load_official
from cbsa_torch.models.segmentation.decoder import MIXERS, ScaleShift, default_num_heads
from tests.helpers import golden
from tests.helpers.compare import assert_close

GOLDEN = "segmentation_decoder"


def decoder(num_classes=5, dim=24, **kwargs):
    options = {"depth": 2, "num_heads": 2, "head_dim": 6, "dtype": torch.float64}
    return MaskTransformerDecoder(num_classes, dim, **{**options, **kwargs})


def features(*grid, b=2, dim=24):
    return torch.randn(b, dim, *grid, dtype=torch.float64)


def test_masks_of_the_official_decoder():
    data, description = golden.load(GOLDEN)
    model = load_official(golden.filled_state_dict(description))
    assert isinstance(model, MaskTransformerDecoder)
    assert not model.training
    attn = model.layers[0].attn
    assert (attn.num_heads, attn.head_dim, len(model.layers)) == (3, description["head_dim"], 2)
    patches = golden.hashed(13824, 7).reshape(2, 144, 48)
    assert_close(model(patches.transpose(1, 2).reshape(2, 48, 12, 12)), data["masks"], 1e-10)


def by_hand(model, x):
    """The decoder with the classes last, as the paper and the official code have it; MSSA, one loop per head."""
    b, _, height, width = x.shape
    k = model.num_classes
    tokens = torch.cat([x.flatten(2).mT, model.class_embed.expand(b, -1, -1)], 1)
    for layer in model.layers:
        z = F.layer_norm(tokens, (model.dim,), layer.norm.weight, layer.norm.bias)
        heads = []
        for bases in layer.attn.qkv.weight.split(layer.attn.head_dim):
            w = z @ bases.T
            heads.append((w @ w.mT / math.sqrt(len(bases))).softmax(-1) @ w)
        out = torch.cat(heads, -1)
        out = out @ layer.attn.qkv.weight if layer.attn.tied else layer.attn.proj(out)
        tokens = tokens + (1 if layer.step is None else layer.step) * out
    tokens = F.layer_norm(tokens, (model.dim,), model.norm.weight, model.norm.bias)
    cosine = F.cosine_similarity(tokens[:, :-k, None], tokens[:, None, -k:], dim=-1)
    return model.mask_norm(cosine).mT.reshape(b, k, height, width)


@pytest.mark.parametrize("options", [{}, {"tied": True, "learned_step": True}], ids=["mssa", "depict"])
def test_against_an_independent_decoder(options):
    model = decoder(mixer="mssa", **options)
    x = features(3, 5)
    assert_close(model(x), by_hand(model, x), 1e-10)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("grid", [(7, 7), (5, 9), (1, 12), (3, 2)], ids=str)
def test_any_grid_and_gradients_reach_everything(mixer, grid):
    model = decoder(mixer=mixer)
    x = features(*grid).requires_grad_()
    masks = model(x)
    assert masks.shape == (2, 5, *grid)
    (masks * torch.randn_like(masks)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("mixer", ["cbsa", "mssa", "mhsa"])
@pytest.mark.parametrize("num_classes", [1, 2, 150])
def test_one_class_and_many(mixer, num_classes):
    model = decoder(num_classes, mixer=mixer)
    x = features(4, 6)
    masks = model(x, (30, 50))
    assert masks.shape == (2, num_classes, 30, 50)
    assert masks.std() > 0  # one class is not erased by the norm over classes
    masks.square().sum().backward()
    assert model.class_embed.grad.abs().max() > 0
    assert isinstance(model.mask_norm, ScaleShift) == (num_classes == 1)


@pytest.mark.parametrize("mixer", MIXERS)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_permuted_classes_have_permuted_masks(mixer, data):
    k = data.draw(st.integers(2, 8))
    order = data.draw(st.permutations(range(k)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    model = decoder(k, mixer=mixer)
    torch.nn.init.normal_(model.mask_norm.weight)
    torch.nn.init.normal_(model.mask_norm.bias)
    x = features(4, 5)
    expected = model(x)[:, order]
    with torch.no_grad():
        model.class_embed.copy_(model.class_embed[:, order])
        model.mask_norm.weight.copy_(model.mask_norm.weight[order])
        model.mask_norm.bias.copy_(model.mask_norm.bias[order])
    assert_close(model(x), expected, 1e-9)


@pytest.mark.parametrize(("number", "cells"), [(4, (2, 2)), ((2, 5), (2, 5))])
def test_representatives_are_pooled_from_patches_alone(number, cells):
    model = decoder(num_representatives=number, dtype=torch.float64)
    x = features(4, 6, b=1)
    seen = []
    strategy = model.layers[0].attn.representatives
    strategy.register_forward_hook(lambda module, args, output: seen.append((args, output)))
    model(x)
    (tokens, grid, _), chosen = seen[0]
    assert grid == (4, 6)
    assert tokens.shape[2] == 24
    patches = model.layers[0].attn.qkv(model.layers[0].norm(x.flatten(2).mT))  # (1, 24, H * P)
    pooled = F.adaptive_avg_pool2d(patches.mT.reshape(1, 12, 4, 6), cells).flatten(2).mT
    assert_close(chosen.values.transpose(1, 2).flatten(2), pooled, 1e-10)


def test_masks_are_upsampled_bilinearly():
    model = decoder()
    x = features(4, 6)
    expected = F.interpolate(model(x), size=(33, 50), mode="bilinear", align_corners=False)
    assert_close(model(x, (33, 50)), expected, 1e-12)


def test_defaults_are_the_papers():
    model = MaskTransformerDecoder(150, 192)
    assert [type(layer.attn) for layer in model.layers] == [CBSA] * 3
    attn = model.layers[0].attn
    assert (attn.num_heads, attn.head_dim, attn.representatives.num_representatives) == (3, 100, 100)
    assert [default_num_heads(dim) for dim in (96, 192, 384, 768, 1024)] == [3, 3, 3, 6, 9]
    assert attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert attn.proj.bias.abs().max() == 0
    assert model.class_embed.std().item() == pytest.approx(0.02, rel=0.2)


def test_mixers_by_name_or_constructor():
    for name, kind in {"cbsa": CBSA, "mssa": MSSA, "mhsa": MHSA, "tssa": TSSA}.items():
        assert type(decoder(mixer=name).layers[0].attn) is kind
        assert type(decoder(mixer=kind).layers[0].attn) is kind
    assert decoder(contraction="exact", tied=True).layers[1].attn.contraction == "exact"
    assert decoder(representatives="learned").layers[0].attn.representatives.values.shape[1] == 100
    assert decoder(representatives="basis")(features(3, 3)).shape == (2, 5, 3, 3)
    assert decoder(head_dim=None).layers[0].attn.head_dim == 12
    orthogonal = decoder(orthogonal=True).layers[0].attn.qkv.weight
    assert_close(orthogonal @ orthogonal.mT, torch.eye(12, dtype=torch.float64), 1e-10)


def test_features_of_other_channels_are_projected():
    model = decoder(encoder_dim=10)
    assert model.input_proj.weight.shape == (24, 10)
    assert model(features(3, 4, dim=10)).shape == (2, 5, 3, 4)
    assert not list(decoder().input_proj.parameters())


def test_new_classes():
    model = decoder(5)
    before = {name: p.clone() for name, p in model.layers.state_dict().items()}
    model.reset_classes(3)
    assert model(features(3, 4)).shape == (2, 3, 3, 4)
    assert all(torch.equal(p, before[name]) for name, p in model.layers.state_dict().items())
    model.reset_classes(1)
    assert isinstance(model.mask_norm, ScaleShift)
    model = decoder(5, mixer=lambda dim, *_, **__: torch.nn.Identity())
    with pytest.raises(TypeError, match="mixer Identity cannot be told another number of classes"):
        model.reset_classes(3)
    assert model.num_classes == 5


def test_weight_decay_spares_embeddings_and_steps():
    model = decoder(learned_step=True)
    steps = {"step", "attn.step_tokens", "attn.step_representatives"}
    spared = {f"layers.{i}.{step}" for i in range(2) for step in steps}
    assert model.no_weight_decay() == {"class_embed"} | spared
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_low_precision_compares_in_float32():
    torch.manual_seed(0)
    model = decoder(20, dtype=torch.float32).eval()
    x = features(6, 6).float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.float32
    assert (low - model(x)).abs().mean() < 0.1
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"depth": 0}, ValueError, "depth must be at least 1"),
        ({"encoder_dim": 0}, ValueError, "encoder_dim must be at least 1"),
        ({"mixer": "msa"}, ValueError, "mixer must be one of 'cbsa', .* did you mean 'mssa'"),
        ({"mixer": 3}, TypeError, "mixer must be a name or a constructor, got 3"),
        ({"learned_step": 1}, TypeError, "learned_step must be True or False"),
        ({"learned_step": True, "step": "certified"}, ValueError, "learned_step must be False"),
        (
            {"learned_step": True, "mixer": functools.partial(CBSA, step="certified")},
            ValueError,
            "learned_step must be False",
        ),
        ({"step": "certified", "head_dim": 100}, ValueError, "give a head_dim of at most 12"),
        ({"residual": "output"}, ValueError, "residual must be one of 'input', 'norm'"),
        ({"mixer": "mssa", "num_representatives": 9}, TypeError, "num_representatives"),
        ({"num_prefix_tokens": 9}, TypeError, "num_prefix_tokens is no option here"),
        ({"contraction": "exat"}, ValueError, "did you mean 'exact'"),
    ],
)
def test_bad_options_are_named(options, kind, message):
    with pytest.raises(kind, match=message):
        decoder(**options)


def test_a_certified_decoder_with_the_residual_of_the_norm():
    model = decoder(step="certified", residual="norm").eval()
    x = features(3, 4)
    tokens = torch.cat([model.class_embed.expand(2, -1, -1), x.flatten(2).mT], 1)
    for layer in model.layers:
        normed = layer.norm(tokens)
        tokens = normed + layer.attn(normed, (3, 4))
    masks = model.similarity(model.norm(tokens)[:, 5:], model.norm(tokens)[:, :5])
    assert_close(model(x), model.mask_norm(masks).mT.reshape(2, 5, 3, 4), 1e-10)


def test_wrong_features_are_named():
    with pytest.raises(ValueError, match=r"features must have shape \(B, 24, h, w\), got \(2, 7, 3, 3\)"):
        decoder()(features(3, 3, dim=7))
    with pytest.raises(ValueError, match="features must have shape"):
        decoder()(torch.zeros(2, 9, 24, dtype=torch.float64))
    with pytest.raises(TypeError, match="features must have a floating-point dtype"):
        decoder()(torch.zeros(2, 24, 3, 3, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"each of a list of features must have shape \(24, h, w\), got \(7, 3"
    ):
        decoder()([features(3, 3)[0], features(3, 3, dim=7)[0]])
    plain = decoder()
    plain.layers[0].attn = torch.nn.Identity()
    with pytest.raises(TypeError, match="a batch, not a list, for the mixer Identity"):
        plain([features(3, 3)[0]])
