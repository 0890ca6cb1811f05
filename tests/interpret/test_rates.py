import math

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

import cbsa_torch.models  # noqa: F401
from cbsa_torch import CBSA, ISTA, interpret
from cbsa_torch.interpret.rates import rank_correlation
from tests.helpers.compare import assert_close
from tests.helpers.mixers import Called

EPS = 0.1


def rate(vectors):
    """Eq. 1 by the letter: logdet of an N x N matrix, one set of vectors (rows), float64."""
    n, q = vectors.shape
    x = vectors.double()
    return 0.5 * torch.logdet(torch.eye(n).double() + q / (n * EPS**2) * x @ x.T).item()


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
    layers = [CBSA(8, 2, num_representatives=4, num_prefix_tokens=0) for _ in range(2)]
    model, x = Called(*layers, grid=(3, 3), mask=mask), torch.randn(3, 9, 8)
    x[1, 8] = float("nan")  # padding may hold anything
    with interpret.capture(model) as records:
        model(x)
    assert records["layers.0"].stages.representative_mask[2].sum() == 1
    check(interpret.measure_rates(model, [x]), brute_force(records, [layer.step_tokens for layer in layers]))


@torch.no_grad()
def test_rates_of_every_image_layer_and_head(images):
    """Of a layer without representatives, the rates of its tokens alone."""
    model = timm.create_model("crate_cbt_pico_patch1_8", embed_dim=16, depth=2, num_heads=2).eval()
    measured = interpret.image_rates(model, images.split(2))
    with interpret.capture(model) as records:
        model(images)
    mssa, cbsa = records
    assert list(measured) == [mssa, cbsa] == ["blocks.0.attn", "blocks.1.attn"]
    expected = [[rate(records[mssa].tokens[b, h]) for h in range(2)] for b in range(5)]
    assert_close(measured[mssa].rate, torch.tensor(expected).double(), 1e-5)
    assert measured[mssa][2:] == (None,) * 7
    for name, (values,) in brute_force({cbsa: records[cbsa]}, [records[cbsa].step_tokens]).items():
        one = getattr(measured[cbsa], name)
        assert one.shape == (5, 2)
        assert one.dtype == torch.float64
        assert torch.allclose(one, values, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("mask", [None, [[True, False, True], [True, True, True]]])
def test_fewer_tokens_than_channels(mask):
    """The determinants are then of the other side."""
    layer, x = CBSA(16, 2, representatives="tokens"), torch.randn(2, 3, 16)
    model = Called(layer, mask=None if mask is None else torch.tensor(mask))
    with interpret.capture(model) as records:
        model(x)
    check(interpret.measure_rates(model, [x]), brute_force(records, [layer.step_tokens]))


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
    assert math.isnan(rates.reduced.correlation)  # all representatives are reduced by zero


def test_a_small_step_of_eq_6_compresses_with_the_exact_contraction():
    """It is a gradient step of sum R(U_k^T Q) and, with all tokens as representatives, of R^c itself."""
    layer = CBSA(8, 2, representatives="tokens", contraction="exact", tied=True, orthogonal=True)
    for sign in (-1, 1):  # Eq. 6 subtracts, the layer adds
        nn.init.constant_(layer.step_tokens, 0.01 * sign)
        reduced = interpret.reduced_rates(nn.Sequential(layer), [0.1 * torch.randn(4, 12, 8)])
        assert all(rate * sign < 0 for rate in reduced.tokens_learned[0])


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
    for x, y in (([1, 1, 1], [1, 2, 3]), ([1], [2]), ([], []), ([1, math.nan], [1, 2])):
        assert math.isnan(rank_correlation(x, y))
    with pytest.raises(ValueError, match="one length"):
        rank_correlation([1, 2], [1, 2, 3])


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_rank_correlation_is_that_of_scipy(pairs):
    x, y = zip(*pairs, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(rank_correlation(x, y))
    else:
        assert rank_correlation(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-9)
