"""The tiled implementation against the eager oracle, and what it keeps in memory."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cbsa_torch import CBSA, ops
from cbsa_torch.ops.cbsa import tiled as module
from cbsa_torch.ops.cbsa import tiles
from tests.helpers.compare import relative_error

CONTRACTIONS = ("softmax", "exact", "none")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 7 tokens, so that small inputs have many, and ragged ones."""
    monkeypatch.setattr(tiles, "TILE", 7)


def evaluate(impl, operands, options, gradient):
    """Output and gradients of all floating-point operands."""
    leaves = {name: t.detach().requires_grad_() for name, t in operands.items()}
    out = ops.cbsa(**leaves, **options, impl=impl)
    grads = torch.autograd.grad(out, list(leaves.values()), gradient)
    return [out, *grads]


def assert_agree(operands, options, tolerance, floor=1e-12):
    tokens = operands["tokens"]
    gradient = torch.randn(tokens.shape, dtype=tokens.dtype)
    fast = evaluate("tiled", operands, options, gradient)
    eager = evaluate("eager", operands, options, gradient)
    for name, a, b in zip(["output", *operands], fast, eager, strict=True):
        assert a.dtype == b.dtype
        assert torch.isfinite(a).all(), name
        close = relative_error(a, b) <= tolerance or (a - b).abs().max() <= floor
        assert close, f"{name}: relative error {relative_error(a, b):.3g}"


def draw(b, h, m, n, p, *, separate=False, dtype=torch.float64):
    def rand(*shape):
        return torch.randn(*shape, dtype=dtype)

    operands = {"tokens": rand(b, h, n, p), "representatives": rand(b, h, m, p)}
    if separate:
        operands |= {"keys": rand(b, h, n, p), "values": rand(b, h, n, p)}
    return operands | {"step_representatives": rand(h), "step_tokens": rand(h)}


@settings(max_examples=120, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (3, 3, 9, 30, 6))),
    contraction=st.sampled_from(CONTRACTIONS),
    broadcast=st.sampled_from(["shared", "softmax"]),
    separate=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_agrees_with_the_oracle(sizes, contraction, broadcast, separate, masked, seed):
    torch.manual_seed(seed)
    b, _, m, n, _ = sizes
    operands = draw(*sizes, separate=separate)
    if broadcast == "shared" and separate:
        del operands["tokens"]  # a shared broadcast uses keys and values only
        operands = {"tokens": operands["keys"], "representatives": operands["representatives"], **operands}
        operands["keys"] = operands["tokens"] * 1.5
    options = {"contraction": contraction, "broadcast": broadcast}
    if masked:
        options["token_mask"] = torch.rand(b, n) > 0.4
        options["representative_mask"] = torch.rand(b, m) > 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", 7)
        leaves = {k: t.detach().requires_grad_() for k, t in operands.items()}
        gradient = torch.randn(leaves["tokens"].shape, dtype=torch.float64)
        results = []
        for impl in ("tiled", "eager"):
            out = ops.cbsa(**leaves, **options, impl=impl)
            grads = torch.autograd.grad(out, list(leaves.values()), gradient, allow_unused=True)
            results.append([out, *(torch.zeros(1) if g is None else g for g in grads)])
    for fast, eager in zip(*results, strict=True):
        assert relative_error(fast, eager) <= 1e-9 or (fast - eager).abs().max() <= 1e-9


@pytest.mark.parametrize("contraction", CONTRACTIONS)
@pytest.mark.parametrize("n", [1, 6, 7, 8, 14, 15])
@pytest.mark.usefixtures("small_tiles")
def test_tile_boundaries(contraction, n):
    assert_agree(draw(2, 2, 5, n, 4), {"contraction": contraction}, 1e-10)


@pytest.mark.parametrize("hidden", [slice(0, 7), slice(7, 20), slice(0, 20), slice(3, 18)], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_tiles_without_any_real_token(hidden):
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, hidden] = False
    operands = draw(2, 2, 3, 20, 4)
    operands["tokens"][0, :, hidden] = math.nan
    fast, eager = (
        evaluate(
            impl, operands, {"token_mask": mask}, torch.randn(2, 2, 20, 4, dtype=torch.float64).mul(0).add(1)
        )
        for impl in ("tiled", "eager")
    )
    for a, b in zip(fast, eager, strict=True):
        assert torch.isfinite(a).all()
        assert relative_error(a, b) <= 1e-10 or (a - b).abs().max() <= 1e-12


# A logit of size x is known to x eps: no implementation can do better than the last column.
@pytest.mark.parametrize(("logit", "tolerance"), [(1e4, 1e-9), (-1e4, 1e-9), (1e8, 1e-6)])
@pytest.mark.usefixtures("small_tiles")
def test_huge_logits(logit, tolerance):
    operands = draw(1, 2, 3, 20, 4)
    operands["tokens"] *= abs(logit) ** 0.5
    operands["representatives"] *= math.copysign(abs(logit) ** 0.5, logit)
    assert_agree(operands, {}, tolerance)


@pytest.mark.usefixtures("small_tiles")
def test_strided_inputs_and_expanded_representatives_and_gradients():
    wide = torch.randn(2, 20, 3 * 2 * 4, dtype=torch.float64)
    tokens = wide.view(2, 20, 3, 2, 4)[:, 1:, 1].transpose(1, 2)  # sliced rows of a joint projection
    operands = {
        "tokens": tokens,
        "representatives": torch.randn(2, 3, 4, dtype=torch.float64).expand(2, 2, 3, 4),
    }
    fast, eager = (
        evaluate(impl, operands, {}, torch.ones(1, dtype=torch.float64).expand(tokens.shape))
        for impl in ("tiled", "eager")
    )
    for a, b in zip(fast, eager, strict=True):
        assert relative_error(a, b) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("contraction", CONTRACTIONS)
def test_low_precision_is_as_good_as_eager(dtype, contraction):
    operands = {k: t.to(dtype) for k, t in draw(2, 3, 16, 300, 16, dtype=torch.float32).items()}
    gradient = torch.randn(operands["tokens"].shape).to(dtype)
    exact = {k: t.double() for k, t in operands.items()}
    oracle = evaluate("eager", exact, {"contraction": contraction}, gradient.double())
    fast = evaluate("tiled", operands, {"contraction": contraction}, gradient)
    eager = evaluate("eager", operands, {"contraction": contraction}, gradient)
    for name, a, b, truth in zip(["output", *operands], fast, eager, oracle, strict=True):
        assert a.dtype == dtype
        slack = 2e-5 if name.startswith("step") else 1e-6  # gradients of steps are sums that cancel
        assert relative_error(a.double(), truth) <= 2 * relative_error(b.double(), truth) + slack, name


@pytest.mark.parametrize("contraction", CONTRACTIONS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_gradcheck(contraction, masked):
    operands = draw(2, 1, 3, 9, 2)
    mask = torch.rand(2, 9) > 0.3 if masked else None
    names = list(operands)

    def run(*tensors):
        return ops.cbsa(
            **dict(zip(names, tensors, strict=True)),
            contraction=contraction,
            token_mask=mask,
            eps=0.5,
            impl="tiled",
        )

    torch.autograd.gradcheck(run, [t.requires_grad_() for t in operands.values()])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of opcheck itself
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(separate, dtype):
    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    keys = leaf(2, 2, 5, 4)
    values = leaf(2, 2, 5, 4) if separate else None
    mask = torch.tensor([[True] * 5, [True, False] * 2 + [True]])
    arguments = (leaf(2, 2, 3, 4), keys, values, leaf(2), leaf(2), mask, None)
    for projection in ((None, None), (leaf(3, 8), None), (leaf(3, 8), leaf(3))):
        torch.library.opcheck(module.tiled, (*arguments, *projection, "softmax", 0.5, 0.1))


def test_nan_in_uninitialised_memory_does_not_show():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert_agree(draw(2, 2, 3, 20, 4), {"token_mask": torch.rand(2, 20) > 0.5}, 1e-10)
    finally:
        torch.use_deterministic_algorithms(before)


def test_compiles_and_exports_and_ignores_autocast():
    layer = CBSA(12, 3, num_representatives=4, impl="tiled").eval()
    x = torch.randn(2, 35, 12)
    expected = layer(x, grid_size=(5, 7))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x, grid_size=(5, 7)), expected) < 1e-5
    exported = torch.export.export(layer, (x,), {"grid_size": (5, 7)})
    assert relative_error(exported.module()(x, grid_size=(5, 7)), expected) < 1e-5
    tokens, rep = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.cbsa(tokens, rep, impl="tiled")
    assert torch.equal(out, ops.cbsa(tokens, rep, impl="tiled"))


def test_what_it_cannot_do_raises():
    tokens, rep = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    with pytest.raises(ValueError, match="impl='tiled' computes the attention itself"):
        ops.cbsa(tokens, rep, attention=torch.eye(9).expand(1, 2, 9, 9), impl="tiled")


@pytest.mark.parametrize("projected", [False, True])
def test_gradients_can_be_differentiated(projected):
    operands = draw(2, 1, 2, 4, 2)
    if projected:
        operands |= {"out_weight": torch.randn(3, 2).double(), "out_bias": torch.randn(3).double()}
    names = list(operands)

    def run(*tensors):
        return ops.cbsa(**dict(zip(names, tensors, strict=True)), impl="tiled")

    torch.autograd.gradgradcheck(run, [t.requires_grad_() for t in operands.values()])


B, H, M, N, P = 1, 2, 64, 4096, 16


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("impl", ["tiled", "eager"])
def test_nothing_of_size_m_times_n_is_saved(impl):
    operands = {k: t.requires_grad_() for k, t in draw(B, H, M, N, P, dtype=torch.float32).items()}
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ops.cbsa(**operands, impl=impl)
    assert (max(sizes) >= B * H * M * N) == (impl == "eager")
    if impl == "tiled":
        assert sum(sizes) <= 1.1 * (B * H * N * P) + 3 * B * H * M * P


@pytest.mark.parametrize("projected", [False, True])
def test_nothing_of_size_m_times_n_is_formed(projected, monkeypatch):
    monkeypatch.setattr(tiles, "KEEP", 0)
    operands = {k: t.requires_grad_() for k, t in draw(B, H, M, N, P, dtype=torch.float32).items()}
    arguments = (operands["representatives"], operands["tokens"], None)
    steps = (operands["step_representatives"], operands["step_tokens"], None, None)
    projection = (torch.randn(H * P, H * P), None) if projected else (None, None)
    inputs = *arguments, *steps, *projection
    with Largest() as seen, torch.no_grad():
        out, *kept = module.tiled._init_fn(*inputs, "softmax", 0.25, 0.1)
        module.tiled_backward._init_fn(torch.randn_like(out), *inputs, *kept, "softmax", 0.25, 0.1)
    assert seen.elements <= max(H * M * tiles.TILE, B * H * N * P)
    assert seen.elements < B * H * M * N / 3
