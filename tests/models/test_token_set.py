"""Sets of features: padded = packed = each alone, order and unit of places do not matter, files rebuild the model."""

import pytest
import timm
import torch
from timm.utils import reparameterize_model

from cbsa_torch.interpret import capture, certificate, measure_rates, token_attention
from cbsa_torch.models import SlideEncoder, TokenSetTransformer, load_checkpoint, save_checkpoint
from cbsa_torch.models.counting import count_model
from cbsa_torch.models.token_set_registry import token_set_names
from cbsa_torch.ops import coordinates

WIDTH = 6
VARIANTS = {
    "cbsa": {"num_representatives": 5},
    "certified": {"step": "certified", "num_representatives": 5},
    "agent": {"mixer": "agent", "num_representatives": 5, "positions": "fourier"},
    "tssa": {"mixer": "tssa"},
    "mlp": {"mixer": "mhsa", "mlp_ratio": 2.0, "positions": "none"},
}


def build(**options):
    torch.manual_seed(0)
    return TokenSetTransformer(WIDTH, 3, 16, 2, 2, **options).double()


def bag(tiles, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tiles, WIDTH, generator=generator, dtype=torch.float64)
    return features, torch.randint(-50, 5000, (tiles, 2), generator=generator)


def gradients(model, logits):
    model.zero_grad()
    logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_padded_and_packed_are_each_alone(options):
    model, bags = build(**options), [bag(n, n) for n in (13, 1, 30)]
    alone = torch.cat([model(features[None], coords[None]) for features, coords in bags])
    expected = gradients(model, alone)

    padded = torch.full((3, 30, WIDTH), torch.nan, dtype=torch.float64)
    places = torch.full((3, 30, 2), torch.nan, dtype=torch.float64)
    mask = torch.zeros(3, 30, dtype=torch.bool)
    for i, (features, coords) in enumerate(bags):
        padded[i, : len(features)], places[i, : len(features)], mask[i, : len(features)] = (
            features,
            coords,
            True,
        )
    together = torch.cat([features for features, _ in bags])[None]
    row = torch.cat([coords for _, coords in bags])[None]
    ends = torch.tensor([0, 13, 14, 44], dtype=torch.int32)
    for logits in (model(padded, places, mask), model(together, row, cu_seqlens=ends)):
        torch.testing.assert_close(logits, alone, atol=1e-10, rtol=0)
        for name, gradient in gradients(model, logits).items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.parametrize("positions", ["sincos", "fourier"])
def test_order_unit_and_origin_do_not_matter_but_places_do(positions):
    model, (features, coords) = build(num_representatives=5, positions=positions).eval(), bag(25)
    logits = model(features[None], coords[None])
    order = torch.randperm(25)
    torch.testing.assert_close(model(features[order][None], coords[order][None]), logits, atol=1e-10, rtol=0)
    elsewhere = (coords.double() * 0.25 + torch.tensor([1000.0, -7.0])).float()  # exact in float32
    torch.testing.assert_close(model(features[None], elsewhere[None]), logits, atol=1e-5, rtol=0)
    assert not torch.allclose(model(features[None], coords[order][None]), logits, atol=1e-6, rtol=0)
    assert model(features[None], coords[None] + 2**60).equal(logits)  # beyond what floating point tells apart
    code = model.float()._position_code(model.placed(coords[None]))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            model._position_code(model.placed(coords[None])).float(), code, atol=0.02, rtol=0
        )
    low = model.bfloat16()._position_code(model.placed(coords[None])).float()
    torch.testing.assert_close(low, code, atol=0.02, rtol=0)


def test_cells_are_searched_once_for_all_layers(monkeypatch):
    calls, find = [], coordinates.find_cells
    monkeypatch.setattr(
        coordinates, "find_cells", lambda *args, **given: calls.append(1) or find(*args, **given)
    )
    features, coords = bag(25)
    build(num_representatives=5)(features[None], coords[None])
    assert len(calls) == 1


def test_recomputing_changes_nothing():
    features, coords = bag(40)
    found = []
    for recompute in (False, True):
        model = build(num_representatives=5, recompute=recompute)
        found.append(gradients(model, model(features[None], coords[None])))
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


def test_a_model_without_places_needs_none():
    model, (features, coords) = build(positions="none", representatives="learned"), bag(9)
    assert not model.needs_coords
    torch.testing.assert_close(model(features[None]), model(features[None], coords[None]))
    assert build(positions="none").needs_coords
    assert build(mixer="tssa").needs_coords
    assert not build(mixer="tssa", positions="none").needs_coords


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coords": None}, "coords must be given to this model"),
        ({"coords": torch.zeros(1, 8, 2)}, r"coords must have shape \(1, 9, 2\)"),
        ({"coords": torch.full((1, 9, 2), torch.nan)}, "coords.*(NaN|finite)"),
        ({"features": torch.zeros(1, 9, 5).double()}, "features must be .B, N, in_dim. with in_dim 6"),
        ({"token_mask": torch.ones(1, 8, dtype=torch.bool)}, "token_mask"),
        ({"cu_seqlens": torch.tensor([0, 4])}, "cu_seqlens must end at the number of features .9., got 4"),
        ({"cu_seqlens": torch.tensor([1, 9])}, "cu_seqlens must start at 0, got 1"),
        ({"cu_seqlens": torch.tensor([0, 6, 4, 9])}, "cu_seqlens must not decrease, got 6, 4 for sequence 1"),
        ({"cu_seqlens": torch.tensor([0, 9]), "token_mask": torch.ones(1, 9, dtype=torch.bool)}, "not both"),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, message):
    features, coords = bag(9)
    for mixer in ("cbsa", "tssa"):  # the one pools by coordinates, the other only knows positions
        with pytest.raises(ValueError, match=message):
            build(mixer=mixer)(**{"features": features[None], "coords": coords[None], **change})


def test_masks_are_checked_without_coordinates_too():
    model, features = build(mixer="tssa", positions="none"), torch.zeros(2, 9, 6)
    with pytest.raises(ValueError, match=r"token_mask must have shape \(B, N\) = \(2, 9\)"):
        model(features, token_mask=torch.ones(1, 9, dtype=torch.bool))
    with pytest.raises(TypeError, match="token_mask must have dtype torch.bool"):
        model(features, token_mask=torch.ones(2, 9))


def test_coordinates_that_are_not_finite_are_named_whatever_the_mixer():
    features, coords = bag(9)
    features, coords = features.expand(2, -1, -1), coords.float().expand(2, -1, -1).clone()
    coords[1, 3, 0] = torch.inf
    for mixer in ("cbsa", "tssa"):
        with pytest.raises(ValueError, match="coords must be finite for every real token.* in item 1"):
            build(mixer=mixer)(features, coords)
        row = features.reshape(1, 18, -1), coords.reshape(1, 18, 2)
        with pytest.raises(ValueError, match="coords must be finite, got NaN or infinity in sequence 1"):
            build(mixer=mixer)(*row, cu_seqlens=torch.tensor([0, 9, 18]))
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[1, 3] = False  # of padding they may be anything
        assert build(mixer=mixer)(features, coords, mask).isfinite().all()
        assert build(mixer=mixer)(features, coords, mask & torch.tensor([[True], [False]])).isfinite().all()
    with pytest.raises(TypeError, match="coords must be a torch.Tensor, got list"):
        build()(features, coords.tolist())


def test_bad_options_are_named():
    for options, message in (
        ({"mixer": "softmax"}, "mixer must be one of"),
        ({"positions": "rope"}, "positions must be one of"),
        ({"coord_dim": 4}, "coord_dim must be 1, 2 or 3"),
        ({"mlp_ratio": 4.0, "residual": "norm"}, "which mlp_ratio replaces"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**options)
    with pytest.raises(TypeError, match="needs in_dim"):
        timm.create_model("token_set_cbt_tiny")
    with pytest.raises(TypeError, match="no option foo"):
        timm.create_model("token_set_cbt_tiny", in_dim=4, foo=1)


@pytest.mark.parametrize("family", sorted({name.removesuffix("_tiny") for name in token_set_names() if name.endswith("_tiny")}))  # fmt: skip
def test_registered_models_are_written_and_read(family, tmp_path):
    args = {"in_dim": WIDTH, "dim": 16, "depth": 1, "num_heads": 2, "num_classes": 4}
    model = timm.create_model(f"{family}_tiny", **args).eval()
    features, coords = bag(12)
    features = features.float()[None]
    save_checkpoint(tmp_path / "m.safetensors", model, {"model": f"{family}_tiny", "model_args": args})
    loaded, _ = load_checkpoint(tmp_path / "m.safetensors")
    expected = model(features, coords[None])
    torch.testing.assert_close(loaded(features, coords[None]), expected)
    torch.testing.assert_close(
        reparameterize_model(model)(features, coords[None]), expected, atol=1e-5, rtol=1e-5
    )
    model.reset_classifier(2)
    assert model(features, coords[None]).shape == (1, 2)
    assert count_model(model, (12, WIDTH)).total.counts.flops > 0


def test_the_layers_can_be_looked_into():
    model, (features, coords) = build(num_representatives=5).eval(), bag(25)
    with capture(model) as records, torch.no_grad():
        model(features[None], coords[None])
    record = records["blocks.1.attn"]
    assert (record.grid_size, record.num_prefix_tokens) == (None, 1)
    weights = record.token_weights
    full = weights.mT @ weights  # A A^T, which is never made otherwise
    torch.testing.assert_close(token_attention(record), full[:, :, 0, 1:])
    torch.testing.assert_close(token_attention(record, -1), full[:, :, -1, 1:])

    model = build(positions="none", representatives="learned", num_representatives=5, step="certified").eval()
    batches = [torch.stack([bag(20, seed)[0] for seed in (1, 2)])]
    assert measure_rates(model, batches).coding.images == 2
    assert len(certificate(model, batches).layers) == 2


def test_tridents_call():
    model, (features, coords) = build(num_representatives=5).eval(), bag(25)
    encoder = SlideEncoder(model, "mine")
    batch = {"features": features[None], "coords": coords[None], "attributes": {"patch_size_level0": 512}}
    embedding = encoder(batch, "cpu")
    assert (encoder.enc_name, encoder.embedding_dim, encoder.precision) == ("mine", 16, torch.float32)
    assert embedding.shape == (1, 16)
    torch.testing.assert_close(model.head(embedding), model(features[None], coords[None]))
    torch.testing.assert_close(encoder(batch), embedding)


@pytest.mark.parametrize(
    ("step", "left"),
    [({}, (0.5, 2)), ({"step": "certified"}, (0.5, 2)), ({"step": "free"}, (0, 1 / 32))],
)
def test_what_reaches_the_class_token_does_not_shrink_with_the_set(step, left):
    """A free step moves a token by about M / N; the default's is in N / M, and the certified limit grows so."""
    torch.manual_seed(0)
    model = TokenSetTransformer(6, dim=16, depth=1, num_heads=2, num_representatives=4, **step).double()
    layer = model.blocks[0].attn
    if layer.proj is not None:
        torch.nn.init.zeros_(layer.proj.bias)
    class_token, x, coords = torch.randn(1, 1, 16), torch.randn(1, 64, 16), torch.arange(64)[None, :, None]
    moved = []
    for copies in (1, 64):
        row = torch.cat([class_token, x.repeat_interleave(copies, 1)], 1).double()
        moved.append(layer(row, coords=coords.repeat_interleave(copies, 1))[0, 0].norm().item())
    assert left[0] < moved[1] / moved[0] < left[1]
