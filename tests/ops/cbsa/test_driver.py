"""Forward and backward over tiles against the eager oracle, and what they keep in memory."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbsa_torch import ops
from cbsa_torch.ops.cbsa import api, driver, tiles
from tests.helpers.compare import relative_error
from tests.helpers.memory import Largest, saved_sizes
from tests.helpers.operator import CONTRACTIONS, apply, assert_same, draw, evaluate


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 7 tokens, so that small inputs have many, and ragged ones."""
    monkeypatch.setattr(tiles, "TILE", 7)


@pytest.fixture
def always_folded(monkeypatch):
    monkeypatch.setattr(api, "folds", lambda *_: True)


def assert_agree(tensors, tolerance, gradient=None, **options):
    assert_same(*(evaluate(impl, tensors, gradient, **options) for impl in ("tiled", "eager")), tolerance)


@settings(max_examples=120, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (3, 3, 9, 30, 6))),
    contraction=st.sampled_from(CONTRACTIONS),
    broadcast=st.sampled_from(["shared", "softmax"]),
    separate=st.booleans(),
    masked=st.booleans(),
    channels=st.sampled_from([None, 1, 5]),
    keep=st.sampled_from([0, tiles.KEEP]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_oracle(sizes, contraction, broadcast, separate, masked, channels, keep, seed):
    torch.manual_seed(seed)
    b, _, m, n, _ = sizes
    tensors = draw(*sizes, separate=separate, channels=channels)
    options = {"contraction": contraction, "broadcast": broadcast}
    if masked:
        options["token_mask"] = torch.rand(b, n) > 0.4
        options["representative_mask"] = torch.rand(b, m) > 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", 7)
        patch.setattr(tiles, "KEEP", keep)
        patch.setattr(api, "folds", lambda *_: True)
        assert_agree(tensors, 1e-9, **options)


@pytest.mark.usefixtures("small_tiles")
def test_tile_boundaries():
    for n in (1, 6, 7, 8, 14, 15):
        assert_agree(draw(2, 2, 5, n, 4), 1e-10)


@pytest.mark.parametrize("hidden", [slice(0, 7), slice(7, 20), slice(0, 20), slice(3, 18)], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_tiles_without_any_real_token(hidden):
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, hidden] = False
    tensors = draw(2, 2, 3, 20, 4)
    tensors["tokens"][0, :, hidden] = math.nan
    assert_agree(tensors, 1e-10, token_mask=mask)


@pytest.mark.usefixtures("always_folded")
def test_what_masked_tokens_hold_and_get_does_not_matter_to_a_folded_projection():
    mask = torch.tensor([[True] * 6 + [False] * 3, [False] * 9])
    tensors = draw(2, 2, 3, 9, 4, channels=5)
    results = []
    for garbage in (0.0, math.nan):
        tensors["tokens"].masked_fill_(~mask[:, None, :, None], garbage)
        results.append(evaluate("tiled", tensors, token_mask=mask))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert torch.equal(results[0]["output"][1], tensors["out_bias"].expand(9, 5))  # nothing but the bias


# A logit of size x is known to x eps: no implementation can do better than the last column.
@pytest.mark.parametrize(("logit", "tolerance"), [(1e4, 1e-9), (-1e4, 1e-9), (1e8, 1e-6)])
@pytest.mark.usefixtures("small_tiles")
def test_huge_logits(logit, tolerance):
    tensors = draw(1, 2, 3, 20, 4)
    tensors["tokens"] *= abs(logit) ** 0.5
    tensors["representatives"] *= math.copysign(abs(logit) ** 0.5, logit)
    assert_agree(tensors, tolerance)


@pytest.mark.usefixtures("small_tiles")
def test_strided_inputs_and_expanded_representatives_and_gradients():
    wide = torch.randn(2, 20, 3 * 2 * 4, dtype=torch.float64)
    tokens = wide.view(2, 20, 3, 2, 4)[:, 1:, 1].transpose(1, 2)  # sliced rows of a joint projection
    representatives = torch.randn(2, 3, 4, dtype=torch.float64).expand(2, 2, 3, 4)
    gradient = torch.ones(1, dtype=torch.float64)  # to be expanded
    assert_agree({"tokens": tokens, "representatives": representatives}, 1e-10, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_low_precision_is_as_good_as_eager(dtype, contraction):
    tensors = {k: t.to(dtype) for k, t in draw(2, 3, 16, 300, 16, dtype=torch.float32).items()}
    gradient = torch.randn(tensors["tokens"].shape).to(dtype)
    exact = {k: t.double() for k, t in tensors.items()}
    oracle = evaluate("eager", exact, gradient.double(), contraction=contraction)
    fast, eager = (evaluate(impl, tensors, gradient, contraction=contraction) for impl in ("tiled", "eager"))
    for name, truth in oracle.items():
        assert fast[name].dtype == dtype
        slack = 2e-5 if name.startswith("step") else 1e-6  # gradients of steps are sums that cancel
        error, allowed = (relative_error(found[name].double(), truth) for found in (fast, eager))
        assert error <= 2 * allowed + slack, name


def test_nan_in_uninitialised_memory_does_not_show():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert_agree(draw(2, 2, 3, 20, 4), 1e-10, token_mask=torch.rand(2, 20) > 0.5)
    finally:
        torch.use_deterministic_algorithms(before)


def test_an_empty_batch():
    found = evaluate("tiled", draw(0, 2, 3, 9, 4))
    assert found["output"].shape == found["tokens"].shape == (0, 2, 9, 4)
    assert (found["step_tokens"] == 0).all()


def test_several_short_items_and_one_long_are_handled_alike(monkeypatch):
    """However items are grouped, each gets what it gets alone."""
    tensors = draw(5, 2, 3, 20, 4)
    results = []
    for group in (1, 40, 10**6):
        monkeypatch.setattr(tiles, "GROUP", group)
        results.append(evaluate("tiled", tensors))
    for other in results[1:]:
        assert_same(other, results[0], 1e-12)


B, H, M, N, P = 1, 2, 64, 4096, 16


@pytest.mark.parametrize("impl", ["tiled", "eager"])
def test_nothing_of_size_m_times_n_is_saved(impl):
    tensors = {k: t.requires_grad_() for k, t in draw(B, H, M, N, P, dtype=torch.float32).items()}
    sizes = saved_sizes(lambda: apply(impl, tensors))
    assert (max(sizes) >= B * H * M * N) == (impl == "eager")
    if impl == "tiled":
        assert sum(sizes) <= 1.1 * (B * H * N * P) + 3 * B * H * M * P


@pytest.mark.parametrize("channels", [None, H * P])
def test_nothing_of_size_m_times_n_is_formed(channels, monkeypatch):
    monkeypatch.setattr(tiles, "KEEP", 0)
    drawn = draw(B, H, M, N, P, channels=channels, dtype=torch.float32)
    problem = driver.Problem(
        drawn["representatives"], drawn["tokens"], None, drawn["step_representatives"], drawn["step_tokens"],
        None, None, drawn.get("out_weight"), drawn.get("out_bias"), *[None] * 4, "softmax", 0.25, 0.1, "tiled",
    )  # fmt: skip
    with Largest() as seen, torch.no_grad():
        driver.backward(*driver.forward(problem), problem)
    assert seen.elements <= max(H * M * tiles.TILE, B * H * N * P)
    assert seen.elements < B * H * M * N / 3


def test_passes_that_need_triton_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        ops.cbsa(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 3, 4), impl="triton")
