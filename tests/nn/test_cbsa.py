"""The layer: parity with the official one, every grid and layout, timm's arguments, bad input."""

import pytest
import torch
from torch import nn

from cbsa_torch import CBSA, ops
from cbsa_torch.ops import Representatives
from cbsa_torch.ops.cbsa import tiles
from tests.helpers import golden
from tests.helpers.compare import assert_close
from tests.helpers.mixers import assert_same, gradients


def official(data, kind):
    """Parameters ("param") or gradients ("grad") of the official layer, by our names."""
    return {
        "step_tokens": data[f"{kind}.step_x"].flatten(),
        "step_representatives": data[f"{kind}.step_rep"].flatten(),
        "qkv.weight": data[f"{kind}.proj.weight"],
        "proj.weight": data[f"{kind}.to_out.weight"],
        "proj.bias": data[f"{kind}.to_out.bias"],
    }


def official_layer(data):
    layer = CBSA(32, 4, layout="official", dtype=torch.float64)
    layer.load_state_dict(official(data, "param"))
    return layer


@pytest.mark.parametrize("name", ["layer_cbsa_n145", "layer_cbsa_n65"])
def test_parity_with_the_official_layer(name):
    data, _ = golden.load(name)
    layer = official_layer(data)
    found = gradients(layer, data["input"], cotangent=data["grad_output"])
    assert_same(found, (data["output"], data["grad_input"], official(data, "grad")), 1e-10)
    if "attention_full_AtA" in data:
        attention = layer.stages(data["input"]).attention
        assert_close(attention.mT @ attention, data["attention_full_AtA"], 1e-10)


def test_parity_in_float32():
    data, _ = golden.load("layer_cbsa_n65")
    layer = official_layer(data).float()
    assert_close(layer(data["input"].float()).double(), data["output"], 1e-5)


def test_standard_layout_pools_the_grid_not_the_class_token():
    layer = CBSA(8, 2, num_representatives=4)
    x = torch.randn(1, 17, 8)
    q = layer.stages(x).representatives
    expected = ops.pool_representatives(layer.stages(x).tokens[:, :, 1:], (4, 4), 4).values
    assert_close(q, expected, 0)


def test_more_representatives_than_tokens_and_a_single_token():
    layer = CBSA(8, 2, num_representatives=64)
    assert layer.stages(torch.randn(1, 9, 8)).representatives.shape == (1, 2, 9, 4)
    assert layer(torch.randn(1, 1, 8)).shape == (1, 1, 8)
    learned = CBSA(8, 2, num_representatives=64, representatives="learned")
    out = learned(torch.randn(1, 3, 8))
    out.sum().backward()
    assert learned.representatives.values.grad.abs().sum() > 0


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_prefix_tokens(prefix):
    layer = CBSA(8, 2, num_representatives=4, num_prefix_tokens=prefix)
    x = torch.randn(2, prefix + 12, 8)
    assert layer(x, grid_size=(3, 4)).shape == x.shape
    layer.set_input_size((3, 4))
    assert layer.token_grid(x) == ((3, 4), prefix)
    assert_close(layer(x), layer(x, grid_size=(3, 4)), 0)
    inferred = CBSA(8, num_heads=1, attn_head_dim=4, num_representatives=4, grid_size=(4, 3))
    assert inferred.qkv.weight.shape == (4, 8)
    inferred = CBSA(8, 2, num_representatives=4, grid_size=(4, 3))
    assert inferred.token_grid(x) == ((4, 3), prefix)
    inferred.load_state_dict(layer.state_dict())
    assert_close(inferred(x, grid_size=(3, 4)), layer(x), 0)


def test_tied_exact_layer_is_a_gradient_step_of_the_compression_term():
    """Moving the tokens against the output of the rigorous layer lowers R^c."""
    layer = CBSA(
        12, 3, tied=True, contraction="exact", representatives="learned", num_representatives=5, eps=0.5
    )
    layer = layer.double()
    nn.init.orthogonal_(layer.qkv.weight)
    nn.init.ones_(layer.step_tokens)
    nn.init.ones_(layer.step_representatives)
    x = torch.randn(2, 20, 12).double()
    rates = [
        ops.compression_rate(layer.stages(x).extracted, eps=0.5),
        ops.compression_rate(layer.stages(x - 0.1 * layer(x)).extracted, eps=0.5),
    ]
    assert (rates[1] < rates[0]).all()


def test_dropout_of_the_output():
    layer = CBSA(8, 2, proj_drop=0.5)
    x = torch.randn(4, 16, 8)
    assert (layer(x) == 0).any()
    assert not (layer.eval()(x) == 0).any()


def test_one_dimensional_maps_and_tokens_are_told_apart():
    layer = CBSA(8, 2)
    sequence = torch.randn(2, 8, 5)  # (B, C, L)
    assert_close(layer(sequence), layer(sequence.mT, grid_size=(5,)).mT, 0)
    square = torch.randn(2, 8, 8)  # either; tokens unless told otherwise
    outputs = {}
    for choice in (None, False, True):
        layer.channels_first = choice
        outputs[choice] = layer(square, grid_size=(8,))
    assert_close(outputs[None], outputs[False], 0)
    assert_close(outputs[True], layer.forward(square, (8,)), 0)
    layer.channels_first = False
    assert_close(outputs[True], layer(square.mT, grid_size=(8,)).mT, 1e-6)
    assert (outputs[True] - outputs[False]).abs().max() > 1e-3


def test_export():
    layer = CBSA(8, 2, num_representatives=4).eval()
    x = torch.randn(2, 8, 5, 7)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (2, 5):
        x = torch.randn(batch, 8, 5, 7)
        assert_close(exported.module()(x), layer(x), 1e-6)


BAD_CONSTRUCTIONS = [
    ({"dim": 0}, ValueError, "dim must be at least 1"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be an int"),
    ({"num_representatives": 0}, ValueError, "num_representatives must be at least 1, got 0"),
    ({"contraction": "exat"}, ValueError, "did you mean 'exact'"),
    ({"representatives": "pooled"}, ValueError, "did you mean 'pool'"),
    ({"layout": "offical"}, ValueError, "did you mean 'official'"),
    ({"qkv": "seperate"}, ValueError, "did you mean 'separate'"),
    ({"impl": "fast"}, ValueError, "impl must be one of"),
    ({"eps": -1.0}, ValueError, "eps must be positive"),
    ({"dim_out": 0}, ValueError, "dim_out must be at least 1, got 0"),
    ({"eps": "small"}, TypeError, "eps must be a number, got 'small'"),
    ({"eps": float("inf")}, ValueError, "eps must be positive"),
    ({"step": "certifed"}, ValueError, "did you mean 'certified'"),
    *(
        ({"step": "certified", **{name: value}}, ValueError, f"{name} must be .*certified.* got {value!r}")
        for name, value in {
            "contraction": "softmax",
            "tied": False,
            "orthogonal": False,
            "qkv": "separate",
            "scale_norm": True,
            "proj_drop": 0.1,
            "impl": "triton",
        }.items()
    ),
    ({"step": "certified", "contraction": "none"}, ValueError, "contraction must be 'exact'"),
    ({"step": "certified", "eps": 0.0}, ValueError, "eps must be positive"),
    ({"step": "certified", "head_dim": 5}, ValueError, r"give a head_dim of at most 4"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD_CONSTRUCTIONS)
def test_bad_options_are_named(options, kind, message):
    with pytest.raises(kind, match=message):
        CBSA(**{"dim": 12, "num_heads": 3, **options})


TOKENS, MASK = torch.zeros(2, 9, 12), torch.ones(2, 9, dtype=torch.bool)
BAD_INPUTS = [
    ({"x": torch.zeros(9, 12)}, ValueError, r"x must be \(B, N, C\) tokens or"),
    ({"x": torch.zeros(1, 12, 2, 2, 2, 2)}, ValueError, "1-, 2- or 3-D grid"),
    ({"x": torch.zeros(1, 9, 13)}, ValueError, "x must have dim=12 channels on axis 2, got 13"),
    ({"x": torch.zeros(1, 13, 3, 3)}, ValueError, "dim=12 channels on axis 1, got 13"),
    ({"x": TOKENS.long()}, TypeError, "x must have a floating"),
    ({"x": "image"}, TypeError, "x must be a torch.Tensor, got str"),
    ({"x": torch.zeros(1, 7, 12)}, ValueError, "7 tokens.*not a square grid; pass grid_size"),
    ({"x": torch.zeros(1, 12, 3, 3), "grid_size": (1, 9)}, ValueError, "differs from the feature map"),
    ({"x": torch.zeros(1, 12, 3, 3), "token_mask": MASK[:1]}, ValueError, r"must have shape \(B, \*grid\)"),
    ({"token_mask": torch.ones(2, 9)}, TypeError, "torch.bool"),
    ({"attn_mask": [True]}, TypeError, "attn_mask must be a torch.Tensor"),
    ({"grid_size": (2, 4)}, ValueError, r"8 cells \+ 0 prefix tokens, but x has 9 tokens"),
    ({"grid_size": (0, 3)}, ValueError, "positive integers"),
    ({"grid_size": 3}, ValueError, "grid_size must be a tuple"),
    ({"grid_size": (3.0, 3.0)}, ValueError, r"integers, got \(3.0, 3.0\)"),
    ({"grid_size": ()}, ValueError, "one to three positive integers"),
]


@pytest.mark.parametrize(("arguments", "kind", "message"), BAD_INPUTS)
def test_bad_input_is_named(arguments, kind, message):
    with pytest.raises(kind, match=message):
        CBSA(12, 3, num_prefix_tokens=0)(**{"x": TOKENS, **arguments})


def test_grids_are_checked_by_every_layer_and_when_they_are_set():
    layer = CBSA(12, 3, num_prefix_tokens=2, representatives="learned")
    with pytest.raises(ValueError, match=r"9 cells \+ 2 prefix tokens, but x has 10 tokens"):
        layer(torch.zeros(1, 10, 12), grid_size=(3, 3))
    with pytest.raises(ValueError, match="positive integers"):
        layer.set_input_size((-1, 3))


def test_printing_tells_the_options():
    text = repr(CBSA(12, 3, contraction="exact"))
    assert "contraction='exact'" in text
    assert "num_representatives=64" in text


def test_onnx(tmp_path):
    import onnxruntime

    layer = CBSA(16, 4, num_representatives=9).eval()
    x = torch.randn(1, 16, 12, 20)
    path = tmp_path / "layer.onnx"
    torch.onnx.export(layer, (x,), dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close(torch.from_numpy(out), layer(x), 1e-5)


def test_a_certified_step_has_the_options_that_it_needs():
    layer = CBSA(24, 3, step="certified")
    given = CBSA(24, 3, step="certified", contraction="exact", tied=True, orthogonal=True, qkv="shared")
    for one in (layer, given):
        assert (one.contraction, one.tied, one.orthogonal, one.eps) == ("exact", True, True, 8**0.5)
    assert CBSA(24, 3, step="certified", eps=0.5).eps == 0.5
    assert (layer.step_logit == 0).all()
    assert layer.step_tokens is None
    assert "step='certified'" in repr(layer)
    free = CBSA(24, 3)
    assert (free.contraction, free.tied, free.orthogonal, free.eps) == ("softmax", False, False, 0.1)
    assert "step_logit" not in free.state_dict()


def test_a_certified_layer_is_its_operator_between_bases():
    layer = CBSA(12, 3, step="certified", num_representatives=4, num_prefix_tokens=1, eps=0.7).double()
    nn.init.normal_(layer.step_logit)
    x = torch.randn(2, 10, 12).double()
    tokens = (x @ layer.qkv.weight.T).unflatten(-1, (3, 4)).transpose(1, 2)
    update = ops.certified_cbsa(
        tokens,
        ops.pool_representatives(tokens[:, :, 1:], (3, 3), 4),
        fraction=layer.step_logit.sigmoid(),
        step_representatives=layer.step_representatives,
        eps=0.7,
        num_prefix_tokens=1,
    )
    assert_close(layer(x), update.transpose(1, 2).flatten(2) @ layer.qkv.weight, 1e-12)


def test_tokens_after_a_certified_step_have_a_lower_rate_in_every_head():
    """Of the layer's own output, also under autocast, which has no effect on it."""
    layer = CBSA(24, 3, step="certified", num_representatives=4)
    x = torch.randn(16, 24, 5, 7)
    out = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), out)
        assert_close(layer(x.bfloat16()), out, 1e-2)
    stages, after = layer.stages(x), layer.heads(x + out).queries
    held = stages.extracted + stages.broadcast_attention.mT @ (after - stages.tokens)
    before, after = (ops.coding_rate(t, eps=layer.eps) for t in (stages.extracted, held))
    assert (after < before).all()


def test_autocast_has_no_effect_on_a_certified_layer_with_a_hook():
    layer, x = CBSA(12, 3, step="certified"), torch.randn(2, 9, 12)
    expected = layer(x)
    layer.norm.register_forward_hook(lambda module, inputs, output: None)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.float32
    assert_close(found, expected, 1e-6)


class Scored(nn.Module):
    """A strategy with a projection and a product of its own, which autocast would round."""

    def __init__(self):
        super().__init__()
        self.score = nn.Linear(4, 5)

    def forward(self, tokens, grid_size, token_mask):
        return Representatives(torch.softmax(self.score(tokens).mT, -1) @ tokens)


def test_autocast_has_no_effect_on_the_strategy_of_a_certified_layer():
    layer, x = CBSA(12, 3, step="certified", representatives=Scored()), torch.randn(2, 9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert torch.equal(found, layer(x))


@pytest.mark.parametrize("impl", ["eager", "tiled"])
def test_a_certified_layer_exports(impl):
    layer = CBSA(8, 2, step="certified", num_representatives=4, impl=impl).eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(layer, (torch.randn(2, 8, 5, 7),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 8, 5, 7)
    assert_close(exported.module()(x), layer(x), 1e-6)


def test_a_certified_layer_is_the_same_layer_over_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 7)
    for layout in ("standard", "official"):
        layer = CBSA(
            24, 3, step="certified", num_representatives=4, layout=layout, num_prefix_tokens=2
        ).double()
        x, mask = torch.randn(2, 37, 24).double(), torch.rand(2, 37) > 0.3
        found = []
        for layer.impl in ("tiled", "eager"):
            found.append(gradients(layer, x, (5, 7), mask))
        assert_same(*found, 1e-9)


@pytest.mark.parametrize("impl", ["tiled", "triton"])
@pytest.mark.parametrize("contraction", ["softmax", "exact"])
def test_every_implementation_is_the_same_layer(impl, contraction):
    device = "cuda" if torch.cuda.is_available() else "cpu"  # Triton: its interpreter
    layer = CBSA(24, 3, num_representatives=4, contraction=contraction, impl=impl).to(device)
    eager = CBSA(24, 3, num_representatives=4, contraction=contraction, impl="eager").to(device)
    eager.load_state_dict(layer.state_dict())
    x = torch.randn(2, 24, 5, 7, device=device)
    mask = torch.rand(2, 5, 7, device=device) > 0.3
    found, expected = (model(x, token_mask=mask) for model in (layer, eager))
    assert_close(found, expected, 1e-4)
    (found.square().sum() + expected.square().sum()).backward()
    for a, b in zip(layer.parameters(), eager.parameters(), strict=True):
        assert_close(a.grad, b.grad, 1e-3)
