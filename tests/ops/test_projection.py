"""The output projection given to the operator: folded into the contractions or not, the same numbers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cbsa_torch import CBSA, ops
from cbsa_torch.bench import measure
from cbsa_torch.bench.baselines import Transcription
from cbsa_torch.ops.cbsa import dispatch, tiles
from cbsa_torch.ops.cbsa.operands import check_operands
from tests.helpers.compare import relative_error


@pytest.fixture
def always_folded(monkeypatch):
    monkeypatch.setattr(dispatch, "folds", lambda *_: True)


def draw(b, h, m, n, p, c, *, dtype=torch.float64):
    def rand(*shape):
        return torch.randn(*shape, dtype=dtype)

    return {
        "tokens": rand(b, h, n, p),
        "representatives": rand(b, h, m, p),
        "step_representatives": rand(h),
        "step_tokens": rand(h),
        "out_weight": rand(c, h * p),
        "out_bias": rand(c),
    }


def evaluate(impl, operands, options, gradient):
    leaves = {name: t.detach().requires_grad_() for name, t in operands.items()}
    out = ops.cbsa(**leaves, **options, impl=impl)
    return [out, *torch.autograd.grad(out, list(leaves.values()), gradient)]


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, top) for top in (3, 3, 9, 30, 6, 5))),
    contraction=st.sampled_from(["softmax", "exact", "none"]),
    masked=st.booleans(),
    keep=st.sampled_from([0, tiles.KEEP]),
    seed=st.integers(0, 1000),
)
def test_folded_agrees_with_the_oracle(sizes, contraction, masked, keep, seed):
    torch.manual_seed(seed)
    operands = draw(*sizes)
    b, _, m, n, _, c = sizes
    options = {"contraction": contraction}
    if masked:
        options["token_mask"] = torch.rand(b, n) > 0.4
        options["representative_mask"] = torch.rand(b, m) > 0.3
    gradient = torch.randn(b, n, c, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE", 7)
        patch.setattr(tiles, "KEEP", keep)
        patch.setattr(dispatch, "folds", lambda *_: True)
        fast = evaluate("tiled", operands, options, gradient)
    eager = evaluate("eager", operands, options, gradient)
    for name, a, b in zip(["output", *operands], fast, eager, strict=True):
        assert relative_error(a, b) <= 1e-9 or (a - b).abs().max() <= 1e-9, name


@pytest.mark.usefixtures("always_folded")
def test_what_masked_tokens_hold_and_get_does_not_matter():
    mask = torch.tensor([[True] * 6 + [False] * 3, [False] * 9])
    results = []
    for garbage in (0.0, math.nan):
        torch.manual_seed(0)
        operands = draw(2, 2, 3, 9, 4, 5)
        operands["tokens"].masked_fill_(~mask[:, None, :, None], garbage)
        results.append(evaluate("tiled", operands, {"token_mask": mask}, torch.ones(2, 9, 5).double()))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(results[0][0][1], operands["out_bias"].expand(9, 5))  # nothing but the bias


@pytest.mark.usefixtures("always_folded")
@pytest.mark.parametrize("contraction", ["softmax", "exact", "none"])
def test_gradcheck(contraction, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", 3)
    operands = draw(2, 1, 3, 7, 2, 3)
    names = list(operands)

    def run(*tensors):
        named = dict(zip(names, tensors, strict=True))
        return ops.cbsa(**named, contraction=contraction, eps=0.5, impl="tiled")

    torch.autograd.gradcheck(run, [t.requires_grad_() for t in operands.values()])


def test_it_is_folded_where_that_takes_fewer_operations():
    def operations(n, m, p, c):
        return n * m * c + p * m * c, n * p * m + n * p * c

    for n, m, p, c in ((197, 64, 64, 384), (385, 64, 64, 384), (4096, 64, 64, 384), (4096, 64, 16, 64)):
        operands = check_operands(
            torch.empty(1, 1, n, p), torch.empty(1, 1, m, p), keys=None, values=None, attention=None,
            step_representatives=1.0, step_tokens=1.0, scale=None, contraction="none", broadcast="shared",
            eps=0.1, token_mask=None, key_mask=None, representative_mask=None,
        )  # fmt: skip
        folded, apart = operations(n, m, p, c)
        assert dispatch.folds(operands, torch.empty(c, p)) == (folded < apart)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"out_bias": torch.ones(3)}, "out_bias needs out_weight"),
        ({"out_weight": torch.ones(3, 7)}, "out_weight"),
        ({"out_weight": torch.ones(3, 8), "out_bias": torch.ones(4)}, "out_bias"),
    ],
)
def test_projections_that_do_not_fit(options, match):
    with pytest.raises(ValueError, match=match):
        ops.cbsa(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 3, 4), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_low_precision_is_as_good_as_eager(dtype):
    torch.manual_seed(0)
    exact = CBSA(32, 2, num_representatives=16, num_prefix_tokens=0, impl="eager").double()
    x = torch.randn(2, 900, 32)
    results = {}
    for impl, layer in (("tiled", exact), ("eager", exact), ("oracle", exact)):
        kind = torch.float64 if impl == "oracle" else dtype
        copy = CBSA(
            32, 2, num_representatives=16, num_prefix_tokens=0, impl="eager" if impl == "oracle" else impl
        )
        copy.load_state_dict(layer.state_dict())
        copy.to(dtype).to(kind)  # the oracle gets the rounded weights, too
        inputs = x.to(dtype).to(kind).requires_grad_()
        out = copy(inputs)
        grads = torch.autograd.grad(out.float().square().sum(), [inputs, *copy.parameters()])
        results[impl] = [out, *grads]
    for fast, eager, oracle in zip(*results.values(), strict=True):
        error, allowed = (relative_error(t.double(), oracle) for t in (fast, eager))
        assert error <= 2 * allowed + 1e-3


@pytest.mark.usefixtures("always_folded")
def test_hooks_and_subclasses_of_the_projection_still_run():
    x = torch.randn(1, 49, 16)
    layer = CBSA(16, 2, num_representatives=4, impl="tiled")
    expected, calls = layer(x), []
    handle = layer.proj.register_forward_hook(lambda *_: calls.append("hook"))
    assert relative_error(layer(x), expected) < 1e-5
    assert calls == ["hook"]
    handle.remove()

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            calls.append("subclass")
            return super().forward(x)

    adapted = Adapted(16, 16)
    adapted.load_state_dict(layer.proj.state_dict())
    layer.proj = adapted
    assert relative_error(layer(x), expected) < 1e-5
    assert calls == ["hook", "subclass"]


@pytest.mark.parametrize(("tied", "qkv"), [(False, "shared"), (True, "shared"), (False, "separate")])
@pytest.mark.usefixtures("always_folded")
def test_layers_agree_whatever_computes_them(tied, qkv):
    layers = [
        CBSA(16, 2, num_representatives=4, tied=tied, qkv=qkv, impl=i).double() for i in ("tiled", "eager")
    ]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 26, 16, dtype=torch.float64)  # a class token and 5 x 5
    results = []
    for layer in layers:
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *layer.parameters()])])
    for fast, eager in zip(*results, strict=True):
        assert relative_error(fast, eager) < 1e-10


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"recompute": True}, {"qkv": "separate"}], ids=str)
@pytest.mark.usefixtures("always_folded")
def test_gradients_of_layers_can_be_differentiated(options):
    """Pooled representatives are functions of the keys: nothing may count twice."""
    torch.manual_seed(0)
    eager = CBSA(8, 2, num_representatives=4, impl="eager", **options).double()
    tiled = CBSA(8, 2, num_representatives=4, impl="tiled", **options).double()
    tiled.load_state_dict(eager.state_dict())
    x = torch.randn(1, 17, 8, dtype=torch.float64)
    results = []
    for layer in (eager, tiled):
        leaf = x.clone().requires_grad_()
        (once,) = torch.autograd.grad(layer(leaf).square().sum(), leaf)
        (first,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        assert relative_error(first, once) < 1e-12
        results.append([first, second])
    for a, b in zip(*results, strict=True):
        assert relative_error(b, a) < 1e-10


def test_second_gradients_after_autocast():
    layer = CBSA(16, 2, num_representatives=4, impl="tiled")
    x = torch.randn(1, 901, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    (gradient,) = torch.autograd.grad(out.float().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # of torch's own forward-mode formulas
def test_what_sees_no_custom_operators_gets_the_equations(monkeypatch):
    monkeypatch.setattr(dispatch, "MANY_WEIGHTS", 1)
    layer = CBSA(8, 2, num_representatives=4).double()
    eager = CBSA(8, 2, num_representatives=4, impl="eager").double()
    eager.load_state_dict(layer.state_dict())
    x = torch.randn(1, 16, 8, dtype=torch.float64)
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (x,))[1],
        lambda f: torch.func.grad(lambda t: f(t).square().sum())(x),
        lambda f: torch.func.vmap(f)(x.expand(3, 1, 16, 8)),
    ):
        assert relative_error(transform(layer), transform(eager)) < 1e-12
    layer.impl = "tiled"
    with pytest.raises(ValueError, match=r"impl='tiled' is not for torch\.func"):
        torch.func.jvp(layer, (x,), (x,))


def test_replaced_and_globally_hooked_projections_run(monkeypatch):
    layer, x, calls = CBSA(16, 2, num_representatives=4, impl="tiled"), torch.randn(1, 49, 16), []
    forward = layer.proj.forward
    layer.proj.forward = lambda t: (calls.append("replaced"), forward(t))[1]
    layer(x)
    assert calls == ["replaced"]
    del layer.proj.forward
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: calls.append(m))
    try:
        layer(x)
    finally:
        handle.remove()
    assert layer.proj in calls


@pytest.mark.parametrize("impl", ["eager", "tiled"])
@pytest.mark.usefixtures("always_folded")
def test_the_output_has_the_dtype_of_the_tokens(impl):
    operands = draw(1, 2, 3, 9, 4, 5, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.cbsa(**operands, impl=impl).dtype == torch.float32
    operands["out_weight"], operands["out_bias"] = (
        operands["out_weight"].double(),
        operands["out_bias"].double(),
    )
    assert ops.cbsa(**operands, impl=impl).dtype == torch.float32


def test_an_empty_batch():
    leaf = torch.randn(0, 2, 9, 4, requires_grad=True)
    ops.cbsa(leaf, torch.randn(0, 2, 3, 4), impl="tiled").sum().backward()
    assert leaf.grad.shape == leaf.shape


def test_lengths_may_stay_open_in_an_export():
    layer = CBSA(8, 2, num_representatives=4, representatives="learned", impl="tiled").eval()
    length = torch.export.Dim("length", min=2, max=100_000)
    program = torch.export.export(layer, (torch.randn(1, 50, 8),), dynamic_shapes=({1: length},))
    for n in (3, 2048, 5000):
        x = torch.randn(1, n, 8)
        assert relative_error(program.module()(x), layer(x)) < 1e-5


def test_numbers_may_become_symbols():
    compiled = torch.compile(ops.cbsa, fullgraph=True, dynamic=True, backend="aot_eager")
    tokens, rep = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 3, 4)
    assert relative_error(compiled(tokens, rep, step_tokens=0.7), ops.cbsa(tokens, rep, step_tokens=0.7)) < 1e-5


def memory(layer, x):
    """What a layer keeps for its backward pass and what a training step allocates, in units of the input."""
    gradient, unit = torch.ones_like(x), x.numel() * x.element_size()
    measure.step(layer, x, gradient)
    layer.zero_grad(set_to_none=True)
    x.grad = None
    kept = measure.memory(lambda: layer(x), "cpu").left / unit  # the output is not kept, the input is
    return kept, measure.memory(lambda: measure.step(layer, x, gradient), "cpu").peak / unit


def test_what_a_layer_keeps_and_allocates():
    x = torch.randn(1, 1 + 64**2, 384, requires_grad=True)
    options = {"num_prefix_tokens": 1}
    kept, peak = memory(CBSA(384, 6, **options), x)  # "auto"
    kept_again, peak_again = memory(CBSA(384, 6, **options, recompute=True), x)
    kept_plain, peak_plain = memory(Transcription(384, 6), x)
    assert kept < 2.1
    assert kept_again < 1.1
    assert kept_plain > 5
    assert peak < 0.6 * peak_plain
    assert peak_again < 0.65 * peak_plain


@pytest.mark.parametrize("tied", [False, True])
def test_recomputing_changes_nothing(tied):
    x = torch.randn(2, 17, 8, dtype=torch.float64)
    mask = torch.rand(2, 17) > 0.2
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer = CBSA(
            8, 2, num_representatives=4, tied=tied, orthogonal=tied, proj_drop=0.5, recompute=recompute
        )
        layer.double()
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        out = layer(leaf, token_mask=mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *layer.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_recomputing_compiles():
    layer = CBSA(8, 2, num_representatives=4, recompute=True)
    x = torch.randn(1, 17, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    layer(x).sum().backward()
    expected = layer.qkv.weight.grad.clone()
    layer.zero_grad()
    compiled(x).sum().backward()
    assert relative_error(layer.qkv.weight.grad, expected) < 1e-5


def test_what_auto_is():
    def chosen(b, h, m, n, p, weight=None, **options):
        operands = check_operands(
            torch.empty(b, h, n, p), torch.empty(b, h, m, p), values=None, step_representatives=1.0,
            step_tokens=1.0, scale=None, contraction="softmax", eps=0.1, token_mask=None, key_mask=None,
            representative_mask=None,
            **{"keys": None, "attention": None, "broadcast": "shared", **options},
        )  # fmt: skip
        return dispatch.fastest(operands, weight)

    assert chosen(1, 6, 64, 196, 64) == "eager"
    assert chosen(1, 6, 64, 4096, 64) == "eager"
    assert chosen(1, 6, 64, 4096, 64, torch.empty(384, 384)) == "tiled"
    assert chosen(1, 6, 64, 16384, 64) == "tiled"
    assert chosen(1, 6, 64, 16384, 64, broadcast="softmax") == "eager"
    assert chosen(1, 2, 64, 40000, 4, attention=torch.empty(1, 2, 64, 40000)) == "eager"
