import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cbsa_torch.models  # noqa: F401
from cbsa_torch import CBSA, ISTA, interpret, ops
from cbsa_torch.interpret.rates import rank_correlation
from tests.helpers.compare import assert_close

EPS = 0.1


def rate(vectors):
    """Eq. 1 by the letter: logdet of an N x N matrix, one set of vectors (rows), float64."""
    n, q = vectors.shape
    x = vectors.double()
    return 0.5 * torch.logdet(torch.eye(n).double() + q / (n * EPS**2) * x @ x.T).item()


class Masked(nn.Module):
    """Two mixers under one mask."""

    def __init__(self, mask, **options):
        super().__init__()
        self.first = CBSA(8, 2, num_representatives=4, num_prefix_tokens=0, **options)
        self.second = CBSA(8, 2, num_representatives=4, num_prefix_tokens=0, **options)
        self.mask = mask

    def forward(self, x):
        x = x + self.first(x, (3, 3), token_mask=self.mask)
        return x + self.second(x, (3, 3), token_mask=self.mask)


@pytest.fixture
def model():
    options = {"embed_dim": 16, "depth": 3, "num_heads": 2, "num_representatives": 9}
    return timm.create_model("cbt_pico_patch1_8", **options).eval()


@pytest.fixture
def images():
    return torch.randn(5, 1, 8, 8)


def brute_force(records, kappas):
    """Quantity -> [layer][image][head], one set of vectors at a time, from the equations."""
    result = {}
    for record, kappa in zip(records.values(), kappas, strict=True):
        stages, mask = record.stages, record.token_mask
        layer = {}
        for b in range(len(stages.tokens)):
            real = slice(None) if mask is None else mask[b]
            for h in range(stages.tokens.shape[1]):
                w, a = stages.tokens[b, h].double(), stages.attention[b, h].double()
                exists = a.sum(-1) > 0.5  # rows of a softmax, or nothing
                q, c = stages.extracted[b, h][exists], stages.contracted[b, h][exists].double()
                step = (a[exists].T @ c)[real]
                w = w[real]
                unit = w / w.norm(dim=-1, keepdim=True)
                k = kappa[h].item()
                values = {
                    "rate": rate(w),
                    "normalized": rate(unit),
                    "tokens": rate(w) - rate(w - step),
                    "tokens_learned": rate(w) - rate(w + k * step),
                    "tokens_added": rate(w) - rate(w + step),
                    "output": rate(w) - rate(step),
                    "representatives": rate(q) - rate(c),
                    "gap": abs(rate(q) - rate(w)),
                }
                for name, value in values.items():
                    layer.setdefault(name, {}).setdefault(b, []).append(value)
        for name, per_image in layer.items():
            result.setdefault(name, []).append(list(per_image.values()))
    return {name: [torch.tensor(rows).double() for rows in layers] for name, layers in result.items()}


def check(rates, expected):
    for i, (plain, unit) in enumerate(zip(expected["rate"], expected["normalized"], strict=True)):
        assert rates.coding.per_head[i] == pytest.approx(plain.mean(0).tolist(), rel=1e-5)
        assert rates.coding.per_head_normalized[i] == pytest.approx(unit.mean(0).tolist(), rel=1e-5)
        assert rates.coding.rate[i] == pytest.approx(plain.sum(1).mean().item(), rel=1e-5)
        assert rates.coding.rate_std[i] == pytest.approx(plain.sum(1).std(correction=0).item(), rel=1e-3)
        assert rates.coding.normalized[i] == pytest.approx(unit.sum(1).mean().item(), rel=1e-5)
        spread = unit.sum(1).std(correction=0).item()
        assert rates.coding.normalized_std[i] == pytest.approx(spread, rel=1e-3)
    for name in ("tokens", "tokens_learned", "tokens_added", "output", "representatives", "gap"):
        for i, values in enumerate(expected[name]):
            measured = getattr(rates.reduced, name)[i]
            assert measured == pytest.approx(values.mean(0).tolist(), rel=1e-4, abs=1e-4), name
    for i, values in enumerate(expected["gap"]):
        assert rates.reduced.gap_max[i] == pytest.approx(values.amax(0).tolist(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("contraction", ["softmax", "exact", "none"])
def test_rates_are_those_of_the_equations(images, contraction):
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_representatives": 9}
    model = timm.create_model("cbt_pico_patch1_8", **options).eval()
    for block in model.blocks:
        block.attn.contraction = contraction
    kappas = [block.attn.step_tokens for block in model.blocks]
    rates = interpret.measure_rates(model, images.split(2))
    with interpret.capture(model) as records:
        model(images)
    check(rates, brute_force(records, kappas))
    assert rates.reduced.layers == rates.coding.layers == ["blocks.0.attn", "blocks.1.attn"]
    assert rates.reduced.images == rates.coding.images == 5
    assert rates.reduced.step_tokens == [pytest.approx(k.tolist()) for k in kappas]
    if contraction == "none":
        assert all(set(row) == {0.0} for row in rates.reduced.representatives)
    alone = interpret.coding_rates(model, images.split(2))
    assert alone[0] == rates.coding.layers
    for values, expected in zip(alone[1:], rates.coding[1:], strict=True):
        assert_close(torch.tensor(values), torch.tensor(expected), 1e-9)
    assert str(interpret.reduced_rates(model, images.split(2))) == str(rates.reduced)  # NaN is not equal to NaN


def test_masked_tokens_and_representatives_that_do_not_exist_count_nowhere():
    mask = torch.tensor([[1] * 9, [1, 1, 0] + [1, 1, 0] + [0] * 3, [1] + [0] * 8], dtype=torch.bool)
    model = Masked(mask)
    x = torch.randn(3, 9, 8)
    x[1, 8] = float("nan")  # padding may hold anything
    with interpret.capture(model) as records:
        model(x)
    assert records["first"].stages.representative_mask[2].sum() == 1
    rates = interpret.measure_rates(model, [x])
    check(rates, brute_force(records, [model.first.step_tokens, model.second.step_tokens]))


@torch.no_grad()
@pytest.mark.parametrize("family", ["cbt", "crate_cbt", "stem_vit"])
def test_rates_of_every_image_layer_and_head(images, family):
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    model = timm.create_model(f"{family}_pico_patch1_8", **options).eval()
    measured = interpret.image_rates(model, images.split(2))
    with interpret.capture(model) as records:
        model(images)
    assert list(measured) == list(records) == ["blocks.0.attn", "blocks.1.attn"]
    cbsa = {"cbt": 2, "crate_cbt": 1, "stem_vit": 0}[family]
    for i, (layer, record) in enumerate(zip(measured.values(), records.values(), strict=True)):
        assert (layer.tokens is None) == (i < 2 - cbsa)
        for b in range(5):
            for h in range(2):
                w = record.tokens[b, h].double()
                expected = {
                    "rate": ops.coding_rate(w, eps=EPS),
                    "normalized": ops.coding_rate(w, eps=EPS, normalize=True),
                }
                if record.stages is not None:
                    step = (record.stages.broadcast_attention[b, h] @ record.stages.contracted[b, h]).double()
                    q, c = record.stages.extracted[b, h].double(), record.stages.contracted[b, h].double()
                    extracted = ops.coding_rate(q, eps=EPS)
                    after = {
                        "tokens": w - step,
                        "tokens_added": w + step,
                        "tokens_learned": w + record.step_tokens[h].double() * step,
                        "output": step,
                    }
                    expected |= {k: expected["rate"] - ops.coding_rate(v, eps=EPS) for k, v in after.items()}
                    expected["representatives"] = extracted - ops.coding_rate(c, eps=EPS)
                    expected["gap"] = (extracted - expected["rate"]).abs()
                else:
                    assert layer[2:] == (None,) * 6
                for name, value in expected.items():
                    one = getattr(layer, name)[b, h].item()
                    assert one == pytest.approx(value.item(), rel=1e-4, abs=1e-4), name
        assert layer.rate.shape == (5, 2)
        assert layer.rate.dtype == torch.float64


@pytest.mark.parametrize("mask", [None, [[True, False, True], [True, True, True]]])
def test_fewer_tokens_than_channels(mask):
    """The determinants are then of the other side."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = CBSA(16, 2, representatives="tokens")
            self.mask = None if mask is None else torch.tensor(mask)

        def forward(self, x):
            return self.layer(x, token_mask=self.mask)

    model, x = Model(), torch.randn(2, 3, 16)
    with interpret.capture(model) as records:
        model(x)
    check(interpret.measure_rates(model, [x]), brute_force(records, [model.layer.step_tokens]))


def test_a_step_that_is_not_finite_spoils_no_other_rate(model, images):
    plain = interpret.image_rates(model, [images])["blocks.0.attn"]
    with torch.no_grad():
        model.blocks[0].attn.step_tokens[1] = math.nan
    broken = interpret.image_rates(model, [images])["blocks.0.attn"]
    assert broken.tokens_learned[:, 1].isnan().all()
    assert torch.equal(broken.tokens_learned[:, 0], plain.tokens_learned[:, 0])
    for name in ("rate", "normalized", "tokens", "representatives", "gap", "output", "tokens_added"):
        assert torch.equal(getattr(broken, name), getattr(plain, name)), name
    with torch.no_grad():
        model.blocks[0].attn.step_representatives.fill_(math.nan)  # now the step A C itself
    broken = interpret.image_rates(model, [images])["blocks.0.attn"]
    assert broken.tokens.isnan().all()
    assert torch.equal(broken.rate, plain.rate)


def test_means_are_those_of_the_images(model, images):
    rates, each = interpret.measure_rates(model, [images]), interpret.image_rates(model, [images])
    stacked = torch.stack([layer.rate for layer in each.values()], 1)
    assert stacked.shape == (5, 3, 2)
    assert rates.coding.rate == stacked.sum(-1).mean(0).tolist()
    assert rates.reduced.gap_max == torch.stack([layer.gap for layer in each.values()]).amax(1).tolist()


def test_bases_that_pick_coordinates_and_tokens_of_known_covariance():
    """Two heads of two channels; the tokens of head k are +-s_k e_j, four of them: W^T W = 2 s_k^2 I."""
    layer = CBSA(4, 2, representatives="tokens", contraction="none", qkv_bias=False, tied=True)
    with torch.no_grad():
        layer.qkv.weight.copy_(torch.eye(4))
        layer.step_tokens.copy_(torch.tensor([-0.5, 2.0]))
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    tokens = torch.cat([cross * 0.3, cross * 0.7], -1)[None]
    rates = interpret.measure_rates(nn.Sequential(layer), [tokens], eps=0.2)

    def known(scale):  # 1/2 logdet(I_2 + 2 / (4 * 0.04) * 2 s^2 I_2)
        return math.log(1 + 25 * scale**2)

    assert rates.coding.per_head[0] == pytest.approx([known(0.3), known(0.7)], rel=1e-5)
    assert rates.coding.per_head_normalized[0] == pytest.approx([known(1.0)] * 2, rel=1e-5)
    # A = I and C = W: the step of Eq. 6 takes tokens to zero; learned kappa takes them to (1 + kappa) W.
    assert rates.reduced.tokens[0] == pytest.approx([known(0.3), known(0.7)], rel=1e-5)
    learned = [known(0.3) - known(0.15), known(0.7) - known(2.1)]
    assert rates.reduced.tokens_learned[0] == pytest.approx(learned, rel=1e-5)
    assert rates.reduced.output[0] == pytest.approx([0, 0], abs=1e-6)
    added = [known(0.3) - known(0.6), known(0.7) - known(1.4)]
    assert rates.reduced.tokens_added[0] == pytest.approx(added, rel=1e-5)
    assert rates.reduced.gap[0] == pytest.approx([0, 0], abs=1e-6)
    assert rates.reduced.step_tokens == [[-0.5, 2.0]]
    assert math.isnan(rates.reduced.correlation)  # all representatives are reduced by zero
    assert math.isnan(rates.reduced.correlation_output)


def test_a_small_step_of_eq_6_compresses_with_the_exact_contraction():
    """It is a gradient step of sum R(U_k^T Q) and, with all tokens as representatives, of R^c itself."""
    layer = CBSA(8, 2, representatives="tokens", contraction="exact", tied=True, orthogonal=True)
    with torch.no_grad():
        layer.step_tokens.fill_(-0.01)  # Eq. 6 subtracts, the layer adds
    reduced = interpret.reduced_rates(nn.Sequential(layer), [0.1 * torch.randn(4, 12, 8)])
    assert min(reduced.tokens_learned[0]) > 0
    with torch.no_grad():
        layer.step_tokens.fill_(0.01)
    reduced = interpret.reduced_rates(nn.Sequential(layer), [0.1 * torch.randn(4, 12, 8)])
    assert max(reduced.tokens_learned[0]) < 0


def test_batches_may_be_an_iterator_of_several_sizes(model, images):
    whole = interpret.measure_rates(model, [images])
    parts = interpret.measure_rates(model, iter([images[:1], images[1:]]))
    assert parts.coding.rate == pytest.approx(whole.coding.rate, rel=1e-5)
    assert parts.coding.rate_std == pytest.approx(whole.coding.rate_std, rel=1e-3)
    assert parts.reduced.gap == [pytest.approx(row, rel=1e-5) for row in whole.reduced.gap]
    assert interpret.coding_rates(model, [images[:0], images]).images == 5


def test_rates_need_no_grid():
    layer, x = CBSA(8, 2, representatives="learned", num_representatives=4), torch.randn(2, 7, 8)
    assert interpret.coding_rates(nn.Sequential(layer), [x]).images == 2


def test_autocast_changes_little(model, images):
    plain = interpret.measure_rates(model, [images])
    with torch.autocast("cpu", torch.bfloat16):
        low = interpret.measure_rates(model, [images])
    assert low.coding.rate == pytest.approx(plain.coding.rate, rel=0.01)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m, x: interpret.image_rates(m, [x], eps=-1), ValueError, "eps must be positive"),
        (lambda m, x: interpret.coding_rates(m, [(x, 1)]), TypeError, "batches must yield tensors"),
        (lambda m, x: interpret.reduced_rates(m, []), ValueError, "at least one batch"),
        (lambda m, x: interpret.measure_rates(m, [x[:0]]), ValueError, "at least one image"),
        (lambda m, x: interpret.measure_rates(m, [x], eps=0), ValueError, "eps must be positive"),
        (lambda m, x: interpret.reduced_rates(ISTA(4), [x]), ValueError, "ISTA has no CBSA layer"),
    ],
)
def test_bad_arguments_are_named(model, images, call, kind, message):
    with pytest.raises(kind, match=message):
        call(model, images)


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [5, 4, -3]) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5
    assert rank_correlation([0, 7, 7, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    for x, y in (([1, 1, 1], [1, 2, 3]), ([1], [2]), ([], []), ([1, math.nan], [1, 2])):
        assert math.isnan(rank_correlation(x, y))
    with pytest.raises(ValueError, match="one length"):
        rank_correlation([1, 2], [1, 2, 3])


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_rank_correlation_against_ranks_counted_one_by_one(pairs):
    def ranks(values):
        return [sum(v < u for v in values) + (sum(v == u for v in values) + 1) / 2 for u in values]

    x, y = zip(*pairs, strict=True)
    stacked = torch.tensor([ranks(x), ranks(y)]).double()
    measured = rank_correlation(x, y)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(measured)
    else:
        assert measured == pytest.approx(torch.corrcoef(stacked)[0, 1].item(), abs=1e-9)
        assert measured == pytest.approx(rank_correlation(y, x), abs=1e-12)
        assert measured == pytest.approx(rank_correlation([math.exp(v) for v in x], y), abs=1e-12)
