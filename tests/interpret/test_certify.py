"""Certificates: every case holds where the theorem applies, and whatever breaks it is seen."""

import json
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrize

import cbsa_torch.models  # noqa: F401
from cbsa_torch import CBSA, MSSA, interpret, ops
from cbsa_torch.ops.cbsa import reference
from tests.helpers.compare import assert_close
from tests.helpers.mixers import Called, mean_and_first

GRID, PREFIX = (3, 4), 2
TOKENS = 12 + PREFIX


def build(family="cbt", **options):
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3, "num_representatives": 9}
    return timm.create_model(f"{family}_pico_patch1_8", **{**sizes, "step": "certified", **options}).eval()


def layer_of(representatives="pool", **options):
    """Head 1 of three has a step near its limit."""
    if representatives in ("pool", "learned"):
        options.setdefault("num_representatives", 6)
    options = {"step": "certified", "num_prefix_tokens": PREFIX, "qkv_bias": True, **options}
    layer = CBSA(14, 3, head_dim=4, representatives=representatives, **options).double().eval()
    if layer.step_logit is not None:
        nn.init.uniform_(layer.step_logit, -3, 3)
        layer.step_logit.data[1] = 8.0
    return layer


def mask():
    """Nothing, all, and some tokens."""
    some = torch.rand(TOKENS) < 0.7
    return torch.stack([torch.zeros(TOKENS, dtype=torch.bool), torch.ones(TOKENS, dtype=torch.bool), some])


def tokens(scale=1.0):
    return scale * torch.randn(3, TOKENS, 14).double()


@torch.no_grad()
def test_numbers_are_those_of_the_equations():
    layer, x, real = layer_of(eps=0.7), tokens(), mask()
    (found,) = interpret.certificate(Called(layer, grid=GRID, mask=real), x).layers
    stages, y = layer.stages(x, GRID, real), layer(x, GRID, real)
    bases, bias = layer.qkv.weight.unflatten(0, (3, 4)), layer.qkv.bias.view(3, 4)
    for i in (1, 2):
        exists = stages.attention[i, 0].sum(-1) > 0.5
        for k in range(3):
            w = ((x[i] @ bases[k].T) + bias[k])[real[i]]  # rows are tokens
            after = w + (y[i] @ bases[k].T)[real[i]]
            b = stages.broadcast_attention[i, k][real[i]][:, exists].T
            m = len(b)
            alpha = 4 / (m * 0.7**2)

            def rate(q, a):
                return 0.5 * torch.logdet(torch.eye(len(q)).double() + a * q @ q.T)

            assert_close(b @ w, stages.extracted[i, k][exists], 1e-12)  # the weights are all there are
            assert_close(found.before[i, k], rate(b @ w, alpha), 1e-10)
            assert_close(found.after[i, k], rate(b @ after, alpha), 1e-10)
            gram = b @ b.T
            norm = torch.linalg.matrix_norm(gram, 2)
            assert_close(found.norm[i, k], norm, 1e-10)
            kappa = -stages.step[i, k]
            assert_close(found.share[i, k], kappa * norm / 2, 1e-10)
            assert_close(found.bound[i, k], 2 * layer.step_logit[k].sigmoid() / kappa, 1e-10)
            c = torch.linalg.solve(torch.eye(m).double() + alpha * b @ w @ (b @ w).T, b @ w)
            fall = alpha * kappa * (1 - kappa * norm / 2) * (c.T @ gram @ c).trace()
            assert_close(found.guaranteed[i, k], fall, 1e-10)
            of_all = 4 / (len(w) * 0.7**2)
            assert_close(found.tokens_before[i, k], rate(w, of_all), 1e-10)
            assert_close(found.tokens_after[i, k], rate(after, of_all), 1e-10)
    assert found.cases.tolist() == [[False] * 3, [True] * 3, [True] * 3]  # no token, no case
    assert (found.norm <= found.bound).all()


@pytest.mark.parametrize("residual", ["input", "norm"])
def test_every_case_of_a_trained_model_holds(images, residual):
    model = build(residual=residual).double().train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = torch.randn(32, 1, 8, 8).double(), torch.randint(3, (32,))
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    x = torch.randn(5, 1, 6, 9).double()  # not the grid it was trained on
    found = interpret.certificate(model.eval(), x, batch_size=2)
    assert (found.images, found.cases, found.holding) == (5, 20, 20)
    assert 0.01 < found.share < 1
    for layer in found.layers:
        assert layer.deviation < 1e-13
        assert (layer.rounding < 1e-9).all()
        assert (layer.guaranteed > 1e-6).all()
        assert torch.allclose(layer.tokens_after, layer.stream_after, 1e-10) == (residual == "norm")
    with torch.no_grad():
        stream, _ = model.embed(x)
        block = model.blocks[0]
        for inputs, rates in ((stream, "stream_before"), (block.norm1(stream), "tokens_before")):
            inside = block.attn.qkv(inputs).unflatten(-1, (2, 8)).transpose(1, 2)
            assert_close(getattr(found.layers[0], rates), ops.coding_rate(inside, eps=8**0.5), 1e-10)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = interpret.certificate(model.float(), x.float())
        assert found.holding == found.cases == found.beyond_rounding == 20
        assert 0.01 < found.share < 1


@pytest.mark.parametrize("kind", ["learned", "tokens", "principal", "basis", mean_and_first])
@pytest.mark.parametrize("scale", [1e-2, 30.0])
def test_every_case_holds_for_all_representatives(kind, scale):
    real = None if kind == "principal" else mask()  # directions of few tokens are not unique
    found = interpret.certificate(Called(layer_of(kind), grid=GRID, mask=real), tokens(scale))
    assert found.holding == found.cases > 0


def test_where_rounding_outweighs_the_guarantee_it_is_counted(images):
    """Everything is far above a tiny epsilon: the guaranteed fall is about kappa P / alpha."""
    model = build(representatives="tokens", num_representatives=None, eps=1e-3)
    single, double = (interpret.certificate(model.to(t), images.to(t)) for t in (torch.float32, torch.float64))
    assert single.holding == double.holding == single.cases == 20
    assert (single.beyond_rounding, double.beyond_rounding) == (0, 20)
    assert str(single).count("10 of 10 (0 beyond rounding)") == 2
    assert "rounding" not in str(double)


def test_the_rate_of_all_tokens_may_rise(images):
    found = interpret.certificate(build(representatives="learned"), images)
    assert found.holding == found.cases == 20
    assert 0 < found.compressed < 20


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_and_autocast_hold_up_to_rounding(images, autocast):
    model = build()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = interpret.certificate(model, images.split(2))  # batches
    assert found.holding == found.cases == found.beyond_rounding == 20
    for layer in found.layers:
        assert (layer.rounding < 0.01 * layer.guaranteed).all()  # so it is more than rounding
    if not autocast:
        whole = interpret.certificate(model, images)
        for one, other in zip(found.layers, whole.layers, strict=True):
            assert_close(one.after, other.after, 1e-5)


def test_what_a_hook_does_to_the_output_is_seen(images):
    model = build().double()
    handle = model.blocks[1].attn.register_forward_hook(lambda layer, args, output: -output)
    found = interpret.certificate(model, images.double())
    assert [layer.holds.all().item() for layer in found.layers] == [True, False]
    assert not found.layers[1].holds.any()  # a step the other way
    assert found.holding == 10
    handle.remove()
    assert interpret.certificate(model, images.double()).holding == 20
    assert not any(block._forward_pre_hooks or block.attn._forward_hooks for block in model.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "change",
    [
        lambda y: 2.5 * y,
        lambda y: 0.9 * y,
        nn.Dropout(0.1),
        lambda y: torch.cat([y[:, :-1], 1.001 * y[:, -1:]], 1),
    ],
)
def test_an_output_that_is_not_the_step_has_no_certificate(images, dtype, change):
    """Although the rate may still fall by enough."""
    model = build().to(dtype)
    model.blocks[1].attn.register_forward_hook(lambda layer, args, output: change(output))
    sound, broken = interpret.certificate(model, images.to(dtype)).layers
    assert sound.broken is None
    assert sound.holds.all()
    assert "something else than its step" in broken.broken
    assert broken.guaranteed is None
    assert not broken.holds.any()


def test_an_output_outside_of_all_subspaces_has_no_certificate():
    """No head sees it."""
    layer, x = layer_of(num_prefix_tokens=0), torch.randn(2, 9, 14).double()
    assert interpret.certificate(nn.Sequential(layer), x).layers[0].broken is None
    outside = torch.linalg.qr(layer.qkv.weight.detach().T, mode="complete").Q[:, -1]
    layer.register_forward_hook(lambda layer, args, output: output + 1e-6 * outside)
    (found,) = interpret.certificate(nn.Sequential(layer), x).layers
    assert "something else than its step" in found.broken


def test_values_that_are_not_finite_hold_nowhere(images):
    model = build().double()
    images = images.double()
    images[1] = math.nan
    found = interpret.certificate(model, images)
    assert found.layers[0].holds.all(1).tolist() == [True, False, True, True, True]
    assert found.holding == 16
    json.dumps(found.record(), allow_nan=False)


def test_bases_that_are_not_orthonormal_have_no_certificate(images):
    model = build().double()
    attn = model.blocks[0].attn
    parametrize.remove_parametrizations(attn.qkv, "weight")
    with torch.no_grad():
        attn.qkv.weight[3] *= 1 + 1e-9
    found = interpret.certificate(model, images.double())
    broken, sound = found.layers
    assert broken.guaranteed is None
    assert not broken.holds.any()
    assert broken.deviation == pytest.approx(2e-9, rel=1e-3)
    assert "not orthonormal" in broken.broken
    assert sound.broken is None
    assert (found.holding, found.cases) == (10, 20)
    assert "blocks.0.attn: not certified, its bases" in str(found)


def test_fresh_bases_of_few_channels_have_a_certificate():
    """Rounding leaves them 5e-7 from orthonormal, more than 4 u."""
    torch.manual_seed(117)
    layer = CBSA(4, 1, step="certified", num_representatives=2).eval()
    (found,) = interpret.certificate(nn.Sequential(layer), torch.randn(2, 4, 2, 2)).layers
    assert found.broken is None
    assert found.deviation_limit == pytest.approx(16 * 2**-23)


def test_a_step_beyond_the_limit_does_not_hold(images, monkeypatch):
    limit = reference.limit
    monkeypatch.setattr(reference, "limit", lambda *args: 3 * limit(*args))
    found = interpret.certificate(build().double(), images.double())
    beyond = torch.cat([layer.share.flatten() for layer in found.layers]) >= 1
    holds = torch.cat([layer.holds.flatten() for layer in found.layers])
    assert beyond.any()
    assert not (holds & beyond).any()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("contraction", ["softmax", "exact"])
def test_free_steps_are_measured_and_not_certified(images, sign, contraction):
    """And the rate of their representatives rises in some case, whatever the sign of kappa."""
    exact = {"tied": True, "eps": 0.1} if contraction == "exact" else {}
    model = build(step="free", contraction=contraction, **exact).double()
    for block in model.blocks:
        nn.init.constant_(block.attn.step_tokens, sign * (1.0 if contraction == "softmax" else 30.0))
    found = interpret.certificate(model, images.double())
    assert (found.cases, found.holding, found.certified) == (0, 0, [])
    assert math.isnan(found.share)
    for layer in found.layers:
        assert layer.guaranteed is layer.share is layer.bound is layer.holds is layer.broken is None
        assert layer.step == "free"
    assert any((layer.after > layer.before).any() for layer in found.layers)
    assert "not certified" in str(found)


def test_a_free_step_is_measured_in_the_precision_of_its_input():
    """Under autocast a layer before it puts out bfloat16."""
    model, x = nn.Sequential(nn.Linear(8, 8), CBSA(8, 2, num_representatives=4)).eval(), torch.randn(2, 9, 8)
    (exact,) = interpret.certificate(model, x).layers
    with torch.autocast("cpu", torch.bfloat16):
        (rounded,) = interpret.certificate(model, x).layers
    assert_close(rounded.after, exact.after, 0.05)


def test_the_representatives_of_a_free_step_are_made_by_all_weights():
    """With a tiny step, their fall is that of the derivative along the layer's output."""
    layer = layer_of(step="free", tied=True, orthogonal=True, contraction="exact", eps=1.0)
    nn.init.constant_(layer.step_tokens, -1e-7)
    x, real = tokens(), mask()
    (found,) = interpret.certificate(Called(layer, grid=GRID, mask=real), x).layers
    certified = layer_of(eps=1.0)
    certified.load_state_dict(
        {k: v for k, v in layer.state_dict().items() if "step_tokens" not in k}, strict=False
    )
    weights = certified.stages(x, GRID, real).broadcast_attention  # B
    stages = layer.stages(x, GRID, real)
    moved = weights.mT @ stages.output
    count = real.any(1) * torch.where(stages.representative_mask.any(1), stages.representative_mask.sum(1), 1)
    alpha = 4 / count.clamp(min=1).double()[:, None]
    slope = -alpha * (stages.contracted * moved).sum((-2, -1))
    assert_close(found.before - found.after, slope, 1e-4)


def test_it_is_plain_in_json(images):
    found = interpret.certificate(build(depth=3), images)
    record = found.record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert (record["images"], record["cases"], record["holding"]) == (5, 30, 30)
    first, layer = record["layers"][0], found.layers[0]
    assert first["name"] == "blocks.0.attn"
    assert first["holds"] == first["cases"] == [5, 5]
    assert first["before"] == pytest.approx(layer.before.mean(0).tolist())
    assert first["least_margin"] == pytest.approx(
        (layer.before - layer.after - layer.guaranteed).amin(0).tolist()
    )
    assert first["share"] == pytest.approx(layer.share.median(0).values.tolist())
    rows = str(found).splitlines()
    assert len(rows) == 4
    assert rows[1].split()[:4] == [
        "blocks.0.attn",
        f"{layer.before.sum(1).mean():.2f}",
        "->",
        f"{layer.after.sum(1).mean():.2f}",
    ]


def test_a_segmenter_has_one_for_encoder_and_decoder():
    sizes = {
        "embed_dim": 16,
        "depth": 1,
        "num_heads": 2,
        "num_representatives": 9,
        "step": "certified",
        "residual": "input",
    }
    model = timm.create_model(
        "segmenter",
        encoder="cbt_pico_patch1_8",
        encoder_args=sizes,
        num_classes=3,
        depth=1,
        num_heads=2,
        head_dim=4,
        residual="norm",
        mixer_args={"step": "certified", "num_representatives": 4},
    ).eval()
    found = interpret.certificate(model, torch.randn(2, 1, 8, 8))
    assert found.holding == found.cases == 8
    encoder, decoder = found.layers
    assert not torch.equal(encoder.stream_after, encoder.tokens_after)
    assert_close(decoder.stream_after, decoder.tokens_after, 1e-5)


def test_compiled_or_called_twice_or_on_feature_maps():
    layer = CBSA(8, 2, step="certified", num_representatives=4).eval()
    found = interpret.certificate(nn.Sequential(layer, layer), torch.randn(2, 8, 3, 4))
    assert found.images == 2
    assert found.layers[0].before.shape == (4, 2)
    assert found.layers[0].stream_before is None
    assert found.holding == 8
    model = build()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    found = interpret.certificate(model, torch.randn(2, 1, 8, 8))
    assert [layer.name for layer in found.layers] == ["blocks.0.attn", "blocks.1.attn"]
    assert found.layers[0].stream_before is not None


@torch.no_grad()
@pytest.mark.parametrize("residual", ["input", "norm"])
def test_the_stream_is_without_the_bias_of_the_projection(images, residual):
    model, x = build(residual=residual, depth=1, qkv_bias=True).double(), images.double()
    block, (stream, _) = model.blocks[0], model.embed(x)
    nn.init.constant_(block.attn.qkv.bias, 3.0)
    (found,) = interpret.certificate(model, x).layers
    normed = block.norm1(stream)
    start = normed if residual == "norm" else stream
    after = start + block.attn(normed)
    for tokens, measured in ((stream, found.stream_before), (after, found.stream_after)):
        inside = (tokens @ block.attn.qkv.weight.T).unflatten(-1, (2, 8)).transpose(1, 2)
        assert_close(measured, ops.coding_rate(inside, eps=8**0.5), 1e-10)


def test_a_layer_of_two_blocks_has_no_stream(images):
    """Only the block that names it is known."""
    model = build()
    model.blocks[1].attn = model.blocks[0].attn
    (found,) = interpret.certificate(model, images).layers
    assert found.before.shape == (10, 2)
    assert found.stream_before is found.stream_after is None


def test_what_cannot_be_measured_is_named():
    separate, narrow = CBSA(8, 2, qkv="separate"), CBSA(8, 2, dim_out=6)
    with pytest.raises(ValueError, match="queries, keys and values have bases of their own"):
        interpret.certificate(nn.Sequential(separate), torch.randn(2, 9, 8))
    mixed = nn.Sequential(CBSA(8, 2, step="certified"), separate, MSSA(8, 2), narrow)
    found = interpret.certificate(mixed, torch.randn(2, 9, 8))
    assert [layer.name for layer in found.layers] == ["0"]
    assert list(found.left_out) == ["1", "3"]
    assert "3: left out, its output has 6 channels, its input 8" in str(found)
    for model, images, kind, message in (
        (MSSA(8, 2), torch.randn(2, 9, 8), ValueError, "MSSA has no CBSA layer"),
        (mixed, torch.randn(0, 9, 8), ValueError, "at least one image"),
        (mixed, [(1, 2)], TypeError, "batches must yield tensors"),
    ):
        with pytest.raises(kind, match=message):
            interpret.certificate(model, images)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        interpret.certificate(mixed, torch.randn(2, 9, 8), batch_size=0)
