"""Which implementation computes what, and what is refused."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cbsa_torch import CBSA, ops
from cbsa_torch.ops.cbsa import api
from tests.helpers.compare import assert_close, relative_error
from tests.helpers.operator import apply, draw


def test_what_auto_is():
    def chosen(b, h, m, n, p, weight=None, **options):
        inputs = ops.cbsa_inputs(torch.empty(b, h, n, p), torch.empty(b, h, m, p), **options)
        return api.fastest(inputs, weight)

    assert chosen(1, 6, 64, 196, 64) == "eager"
    assert chosen(1, 6, 64, 4096, 64) == "eager"
    assert chosen(1, 6, 64, 4096, 64, torch.empty(384, 384)) == "tiled"
    assert chosen(1, 6, 64, 16384, 64) == "tiled"
    assert chosen(1, 6, 64, 16384, 64, broadcast="softmax") == "eager"
    tokens = torch.empty(8, 6, 197, 64, requires_grad=True)
    recorded = ops.cbsa_inputs(tokens, torch.empty(8, 6, 64, 64))
    assert api.fastest(recorded, None) == "tiled"
    assert api.fastest(ops.cbsa_inputs(tokens[:6], torch.empty(6, 6, 64, 64)), None) == "eager"
    with torch.no_grad():
        assert api.fastest(recorded, None) == "eager"
    tokens = torch.empty(1, 2, 40000, 4)
    given = ops.cbsa_inputs(tokens, torch.empty(1, 2, 64, 4), attention=torch.empty(1, 2, 64, 40000))
    assert api.fastest(given, None) == "eager"


@pytest.mark.parametrize(
    ("sizes", "dtype", "expected"),
    [  # B, H, M, N, P
        ((1, 6, 64, 2**14, 64), torch.bfloat16, "triton"),
        ((1, 6, 64, 2**14 - 1, 64), torch.bfloat16, "eager"),
        ((256, 6, 64, 197, 64), torch.float16, "triton"),
        ((128, 6, 64, 197, 64), torch.float16, "eager"),
        ((256, 6, 64, 197, 64), torch.float32, "eager"),
        ((1, 6, 64, 2**18, 64), torch.float32, "triton"),
        ((1, 6, 64, 2**18, 64), torch.float64, "eager"),
        ((1, 6, 64, 2**14, 129), torch.bfloat16, "eager"),
        ((1, 6, 257, 2**14, 64), torch.bfloat16, "eager"),
    ],
)
def test_what_auto_is_on_cuda(sizes, dtype, expected):
    b, h, m, n, p = sizes
    with FakeTensorMode():
        tokens = torch.empty(b, h, n, p, dtype=dtype, device="cuda")
        inputs = ops.cbsa_inputs(tokens, torch.empty(b, h, m, p, dtype=dtype, device="cuda"))
        assert api.fastest(inputs, None) == expected


def test_the_projection_is_folded_where_that_takes_fewer_operations():
    for n, m, p, c in ((197, 64, 64, 384), (385, 64, 64, 384), (4096, 64, 64, 384), (4096, 64, 16, 64)):
        inputs = ops.cbsa_inputs(torch.empty(1, 1, n, p), torch.empty(1, 1, m, p))
        folded, apart = n * m * c + p * m * c, n * p * m + n * p * c
        assert api.folds(inputs, torch.empty(c, p)) == (folded < apart)


@pytest.mark.parametrize("impl", ["eager", "tiled"])
@pytest.mark.parametrize("folded", [False, True])
def test_a_projection_is_a_linear_layer_on_the_joined_heads(impl, folded, monkeypatch):
    monkeypatch.setattr(api, "folds", lambda *_: folded)
    tensors = draw(2, 2, 3, 9, 4, channels=5)
    heads = apply("eager", {name: t for name, t in tensors.items() if not name.startswith("out_")})
    joined = heads.transpose(1, 2).flatten(2)
    expected = joined @ tensors["out_weight"].T
    assert_close(apply(impl, tensors), expected + tensors["out_bias"], 1e-12)
    del tensors["out_bias"]
    assert_close(apply(impl, tensors), expected, 1e-12)


@pytest.mark.parametrize("impl", ["eager", "tiled"])
@pytest.mark.parametrize("folded", [False, True])
def test_the_output_has_the_dtype_of_the_tokens(impl, folded, monkeypatch):
    monkeypatch.setattr(api, "folds", lambda *_: folded)
    tensors = draw(1, 2, 3, 9, 4, channels=5, dtype=torch.float32)
    expected = apply(impl, tensors)
    wide = {name: t.double() if name.startswith("out_") else t for name, t in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        found = apply(impl, tensors), apply(impl, wide)
    for output in found:
        assert output.dtype == torch.float32
        assert torch.equal(output, expected)


def test_what_an_implementation_cannot_do_raises():
    tokens, attention = torch.randn(1, 2, 9, 4), torch.eye(9).expand(1, 2, 9, 9)
    with pytest.raises(ValueError, match="impl must be one of 'auto', 'eager'.*did you mean 'eager'"):
        ops.cbsa(tokens, tokens, impl="egaer")
    with pytest.raises(ValueError, match="impl='tiled' computes the attention itself"):
        api.run(ops.cbsa_inputs(tokens, tokens, attention=attention), "tiled")
    with pytest.raises(ValueError, match="impl='triton' broadcasts with the attention it extracted"):
        ops.cbsa(tokens, tokens, broadcast="softmax", impl="triton")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")  # of torch's own forward-mode formulas
def test_what_sees_no_custom_operators_gets_the_equations(monkeypatch):
    monkeypatch.setattr(api, "MANY_WEIGHTS", 1)
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
    exported = torch.export.export(layer.eval(), (x,))
    assert "cbsa_torch" not in exported.graph_module.code
    layer.impl = "tiled"
    assert "cbsa_torch" in torch.export.export(layer, (x,)).graph_module.code
    with pytest.raises(ValueError, match=r"impl='tiled' is not for torch\.func"):
        torch.func.jvp(layer, (x,), (x,))
