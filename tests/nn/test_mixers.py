"""Every token mixer: official parity, equivalences, grids, masks, precision, compilation, state, bad input."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cbsa_torch import CBSA, ops
from cbsa_torch.nn import MHSA, MSSA, TSSA, AgentAttention, LinearCBSA, LinearStem, ResidualBlock
from cbsa_torch.nn.orthonormal import keep_rows_orthonormal
from cbsa_torch.ops import Representatives
from tests.helpers import golden
from tests.helpers.compare import assert_close

DIM, HEADS, HEAD_DIM = 12, 3, 4


def mean_and_first(tokens, grid_size, token_mask):
    """A strategy that is a function: the mean of the real tokens, and the first token."""
    if token_mask is None:
        mean = tokens.mean(2, keepdim=True)
    else:
        real = token_mask[:, None, :, None]
        mean = tokens.masked_fill(~real, 0.0).sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
    return Representatives(torch.cat([mean, tokens[:, :, :1]], 2))


class ShiftedPool(nn.Module):
    """A strategy that is a module with parameters, and needs the grid."""

    needs_grid = True

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.empty(HEADS, 1, HEAD_DIM))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.shift)

    def forward(self, tokens, grid_size, token_mask):
        pooled = ops.pool_representatives(tokens, grid_size, 4, token_mask=token_mask)
        return pooled._replace(values=pooled.values + self.shift.to(tokens.dtype))


def build_shifted(**options):
    return CBSA(DIM, HEADS, representatives=ShiftedPool(), **options)


def of(mixer, **chosen):
    return lambda **options: mixer(DIM, HEADS, **{**chosen, **options})


pooling = partial(of, CBSA, num_representatives=4)
MIXERS = {
    "cbsa": pooling(),
    "cbsa exact": pooling(contraction="exact", eps=0.8),
    "cbsa none": pooling(contraction="none"),
    "cbsa separate": pooling(qkv="separate"),
    "cbsa tied": pooling(tied=True),
    "cbsa orthogonal": pooling(orthogonal=True),
    "cbsa tied orthogonal": pooling(tied=True, orthogonal=True, contraction="exact", eps=0.8),
    "cbsa learned": pooling(representatives="learned"),
    "cbsa tokens": of(CBSA, representatives="tokens"),
    "cbsa tokens exact": of(CBSA, representatives="tokens", contraction="exact", eps=0.8),
    "cbsa principal": of(CBSA, representatives="principal", contraction="exact", eps=0.8),
    "cbsa basis": of(CBSA, representatives="basis", contraction="exact", eps=0.8),
    "cbsa function": of(CBSA, representatives=mean_and_first),
    "cbsa module": build_shifted,
    "mssa": of(MSSA),
    "mssa tied orthogonal": of(MSSA, tied=True, orthogonal=True),
    "mhsa": of(MHSA),
    "tssa": of(TSSA),
    "tssa channel": of(TSSA, form="channel"),
    "linear": of(LinearCBSA),
    "linear eigh": of(LinearCBSA, solver="eigh"),
    "linear sum": of(LinearCBSA, average=False),
    "agent": of(AgentAttention, num_representatives=4),
    "agent shared": of(AgentAttention, num_representatives=4, qkv="shared"),
    "agent learned": of(AgentAttention, num_representatives=4, representatives="learned"),
}
ORTHOGONAL = [name for name in MIXERS if "orthogonal" in name]
each_mixer = pytest.mark.parametrize("build", MIXERS.values(), ids=MIXERS)
each_name = pytest.mark.parametrize("name", MIXERS)


def gradients(layer, x, *args, cotangent=None):
    """Output, gradient of the input, and of every parameter."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x, *args)
    if cotangent is None:
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    out.backward(cotangent)
    return out.detach(), x.grad, {name: p.grad for name, p in layer.named_parameters()}


def assert_same(actual, expected, tolerance):
    assert_close(actual[0], expected[0], tolerance)
    assert_close(actual[1], expected[1], tolerance)
    for name, gradient in expected[2].items():
        assert_close(actual[2][name], gradient, tolerance)


# --- what they compute ---


@pytest.mark.parametrize(("mixer", "name"), [(MSSA, "layer_mssa"), (TSSA, "layer_tssa")])
def test_parity_with_the_official_layer(mixer, name):
    data, _ = golden.load(name)
    ours = {"qkv.weight": "qkv.weight", "proj.weight": "to_out.weight", "proj.bias": "to_out.bias"}
    if mixer is TSSA:
        ours["temperature"] = "temp"

    def read(kind, key):
        tensor = data[f"{kind}.{ours[key]}"]
        return tensor.flatten() if key == "temperature" else tensor

    layer = mixer(32, 4, dtype=torch.float64)
    layer.load_state_dict({key: read("param", key) for key in ours})
    out, grad_input, grads = gradients(layer, data["input"], cotangent=data["grad_output"])
    assert_close(out, data["output"], 1e-10)
    assert_close(grad_input, data["grad_input"], 1e-10)
    assert grads.keys() == ours.keys()
    for key, gradient in grads.items():
        assert_close(gradient, read("grad", key), 1e-10)


N = 10
EQUAL_LAYERS = {
    "all tokens are MSSA": (of(CBSA, representatives="tokens"), of(MSSA)),
    "principal directions are linear attention": (
        of(CBSA, representatives="principal", contraction="exact", eps=0.6),
        of(LinearCBSA, average=False, eps=0.6),
    ),
    "both solvers": (of(LinearCBSA, eps=0.6, solver="eigh"), of(LinearCBSA, eps=0.6)),
    "a mean is a sum with N eps^2": (
        of(LinearCBSA, average=False, eps=0.6 * math.sqrt(N)),
        of(LinearCBSA, average=True, eps=0.6),
    ),
    "the basis is channel attention": (
        of(CBSA, representatives="basis", contraction="exact", eps=0.6 * math.sqrt(N)),
        of(TSSA, form="channel", eps=0.6),
    ),
}


@pytest.mark.parametrize(("left", "right"), EQUAL_LAYERS.values(), ids=EQUAL_LAYERS)
@pytest.mark.parametrize("tied", [False, True])
def test_layers_that_are_the_same_with_the_same_weights(left, right, tied):
    left, right = left(tied=tied).double(), right(tied=tied).double()
    if isinstance(right, MSSA):
        nn.init.ones_(left.step_tokens)
    missing, unexpected = left.load_state_dict(right.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) <= {"step_tokens"}
    x = torch.randn(2, N, DIM).double()
    assert_same(gradients(left, x), gradients(right, x), 1e-9)


def split(tensor):
    return tensor.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


def merge(heads):
    return heads.transpose(1, 2).flatten(2)


def test_agent_attention_is_its_operator_between_projections():
    layer = MIXERS["agent shared"]().double()
    x = torch.randn(2, 9, DIM).double()
    heads = split(x @ layer.qkv.weight.T)
    agents = ops.pool_representatives(heads, (3, 3), 4).values
    assert_close(layer(x), layer.proj(merge(ops.agent_attention(heads, agents, heads, heads))), 1e-12)

    layer = MIXERS["agent"]().double()
    queries, keys, values = (split(part) for part in (x @ layer.qkv.weight.T).chunk(3, -1))
    agents = ops.pool_representatives(queries, (3, 3), 4).values
    assert_close(layer(x), layer.proj(merge(ops.agent_attention(queries, agents, keys, values))), 1e-12)


def test_mhsa_is_pytorch_multi_head_attention():
    layer = MHSA(DIM, HEADS, qkv_bias=True).double()
    reference = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(layer.qkv.weight)
        reference.in_proj_bias.copy_(layer.qkv.bias)
        reference.out_proj.weight.copy_(layer.proj.weight)
        reference.out_proj.bias.copy_(layer.proj.bias)
    x = torch.randn(2, 7, DIM).double()
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    expected, _ = reference(x, x, x, key_padding_mask=~mask, need_weights=False)
    out = layer(x, token_mask=mask)
    assert_close(out[0], expected[0], 1e-12)
    assert_close(out[1, :4], expected[1, :4], 1e-12)


@pytest.mark.parametrize(
    "representatives",
    ["pool", mean_and_first, "learned", "basis"],
    ids=["pool", "function", "learned", "basis"],
)
@pytest.mark.parametrize("contraction", ["softmax", "exact", "none"])
def test_cbsa_is_its_operator_between_projections(representatives, contraction):
    eps = {"eps": 0.7} if contraction == "exact" else {}
    layer = CBSA(DIM, HEADS, representatives=representatives, contraction=contraction, **eps).double()
    x = torch.randn(2, 9, DIM).double()
    heads = split(x @ layer.qkv.weight.T)
    values, mask, attention = layer.representatives(heads, (3, 3), None)
    eta = {} if attention is not None else {"step_representatives": layer.step_representatives}
    out = ops.cbsa(
        heads,
        values,
        representative_mask=mask,
        attention=attention,
        step_tokens=layer.step_tokens,
        contraction=contraction,
        **eps,
        **eta,
    )
    assert_close(layer(x), layer.proj(merge(out)), 1e-12)


# --- grids and masks ---


@each_mixer
@pytest.mark.parametrize("grid", [(9,), (3, 5), (2, 3, 3)], ids=str)
def test_feature_maps_are_tokens_on_a_grid(build, grid):
    layer = build().double()
    feature_map = torch.randn(2, DIM, *grid).double()
    out = layer(feature_map)
    assert out.shape == feature_map.shape
    assert_close(out.flatten(2).mT, layer(feature_map.flatten(2).mT, grid), 1e-12)


@pytest.mark.parametrize("name", [name for name in MIXERS if "tied" not in name])
def test_another_number_of_output_channels(name):
    layer = MIXERS[name](dim_out=8)
    assert layer(torch.randn(2, 9, DIM)).shape == (2, 9, 8)
    assert layer(torch.randn(2, DIM, 3, 5)).shape == (2, 8, 3, 5)


@each_mixer
def test_class_and_register_tokens(build):
    layer = build(num_prefix_tokens=2)
    x = torch.randn(2, 2 + 15, DIM)
    assert layer(x, (3, 5)).shape == x.shape
    assert layer.token_grid(x, (3, 5)) == ((3, 5), 2)
    with pytest.raises(ValueError, match="grid_size"):
        layer(x, (4, 5))


@each_name
def test_a_padded_batch_is_each_item_alone(name):
    layer = MIXERS[name]().double()
    # the gradient of principal directions needs at least as many tokens as dimensions
    lengths = [9, 5, 4 if "principal" in name else 2, 0]
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    x = torch.randn(4, 9, DIM).double()
    hidden = x.masked_fill(~mask[..., None], math.nan)
    cotangent = torch.randn(4, 9, DIM).double()
    out, grad_input, grads = gradients(layer, hidden, (9,), mask, cotangent=cotangent)
    assert torch.isfinite(out).all()
    assert (out.masked_select(~mask[..., None]) == 0).all()
    assert (grad_input.masked_select(~mask[..., None]) == 0).all()
    total = {key: torch.zeros_like(gradient) for key, gradient in grads.items()}
    for b, length in enumerate(lengths[:3]):
        alone = gradients(layer, x[b : b + 1, :length], (length,), cotangent=cotangent[b : b + 1, :length])
        assert_close(out[b : b + 1, :length], alone[0], 1e-11)
        assert_close(grad_input[b : b + 1, :length], alone[1], 1e-9)
        total = {key: total[key] + gradient for key, gradient in alone[2].items()}
    for key, gradient in grads.items():
        assert_close(gradient, total[key], 1e-9)


@each_mixer
def test_masks_of_feature_maps_and_of_timm(build):
    layer = build().double()
    x = torch.randn(2, DIM, 3, 4).double()
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, :, 2:] = False  # a narrower image
    out = layer(x, token_mask=mask)
    assert_close(out[1:, :, :, :2], layer(x[1:, :, :, :2]), 1e-11)
    assert (out[1, :, :, 2:] == 0).all()
    tokens, flat = x.flatten(2).mT, mask.flatten(1)
    expected = layer(tokens, (3, 4), flat)
    assert_close(out.flatten(2).mT, expected, 1e-11)
    for shaped in (flat[:, None], flat[:, None, None]):
        assert_close(layer(tokens, (3, 4), attn_mask=shaped), expected, 0)


@each_mixer
def test_biases_do_not_leak_into_padding(build):
    options = {"qkv_bias": True} if build().tied else {"qkv_bias": True, "proj_bias": True}
    layer = build(**options).double()
    nn.init.ones_(layer.qkv.bias)
    x = torch.randn(2, 9, DIM).double()
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    out = layer(x, (9,), mask)
    assert_close(out[1:, :5], layer(x[1:, :5], (5,)), 1e-11)
    assert (out[1, 5:] == 0).all()


# --- precision and compilation ---


@each_mixer
def test_autocast(build):
    layer = build()
    x = torch.randn(2, 16, DIM)
    expected = gradients(layer, x)
    inside = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(inside)
    assert out.dtype == torch.bfloat16
    out.float().backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)))
    assert_close(out.float(), expected[0], 5e-2)
    assert_close(inside.grad, expected[1], 1e-1)
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == p.dtype for p in layer.parameters())


@each_name
@pytest.mark.parametrize("masked", [False, True], ids=["full", "masked"])
def test_compiles_in_one_graph(name, masked):
    torch.compiler.reset()
    layer = MIXERS[name]()
    x = torch.randn(2, 12, DIM)
    mask = torch.arange(12) < torch.tensor([[12], [6]]) if masked else None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    arguments = ((3, 4), mask)
    out, grad_input, grads = gradients(compiled, x, *arguments)
    grads = {key.removeprefix("_orig_mod."): gradient.clone() for key, gradient in grads.items()}
    assert_same((out, grad_input, grads), gradients(layer, x, *arguments), 1e-4)


def test_compiles_by_inductor():
    torch.compiler.reset()
    layer = MIXERS["linear"]()
    x = torch.randn(2, 12, DIM)
    compiled = torch.compile(layer, fullgraph=True)
    out, grad_input, grads = gradients(compiled, x)
    grads = {key.removeprefix("_orig_mod."): gradient.clone() for key, gradient in grads.items()}
    assert_same((out, grad_input, grads), gradients(layer, x), 1e-4)


# --- parameters and state ---


@each_mixer
def test_every_parameter_gets_a_gradient(build):
    layer = build(qkv_bias=True)
    _, grad_input, grads = gradients(layer, torch.randn(2, 9, DIM))
    assert grad_input.abs().max() > 0
    for name, gradient in grads.items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 0, name


@each_mixer
def test_state_dict_and_deepcopy(build, tmp_path):
    torch.manual_seed(1)
    layer = build()
    torch.manual_seed(2)
    other = build()
    x = torch.randn(2, 9, DIM)
    expected = layer(x)
    assert (other(x) - expected).abs().max() > 1e-4
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    assert_close(other(x), expected, 1e-6)
    twin = copy.deepcopy(layer)
    assert_close(twin(x), expected, 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1)
    assert_close(twin(x), expected, 0)  # nothing is shared


@each_mixer
def test_reset_parameters(build):
    layer = build(qkv_bias=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    before = copy.deepcopy(dict(layer.named_parameters()))
    x = torch.randn(2, 9, DIM)
    out = layer(x)
    layer.reset_parameters()
    for name, parameter in layer.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert (parameter - before[name]).abs().max() > 1e-3, name
    assert (layer(x) - out).abs().max() > 1e-3
    if layer.orthogonal:
        assert_orthonormal(layer)


@each_mixer
def test_parameters_without_weight_decay_exist(build):
    layer = build()
    names = dict(layer.named_parameters())
    assert layer.no_weight_decay() <= names.keys()
    steps = {name for name in names if name.startswith("step_") or name == "temperature"}
    assert steps <= layer.no_weight_decay()


@each_mixer
def test_device_and_dtype_reach_every_parameter(build):
    layer = build(dtype=torch.float64, device="meta")
    own = {n: p for n, p in layer.named_parameters() if not n.startswith("representatives.shift")}
    assert {p.dtype for p in own.values()} == {torch.float64}
    assert {p.device.type for p in own.values()} == {"meta"}


def assert_orthonormal(layer):
    rows = layer.qkv.weight.detach().double()
    assert_close(rows @ rows.T, torch.eye(len(rows)).double(), 1e-5)


@pytest.mark.parametrize("name", ORTHOGONAL)
@pytest.mark.parametrize("head_dim", [HEAD_DIM, 3])
def test_orthonormal_bases_stay_so_in_training(name, head_dim):
    layer = MIXERS[name](head_dim=head_dim)
    assert_orthonormal(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, momentum=0.9)
    before = layer.qkv.weight.detach().clone()
    x = torch.randn(4, 9, DIM)
    for _ in range(5):
        optimizer.zero_grad()
        (layer(x) - x).square().mean().backward()
        optimizer.step()
    assert (layer.qkv.weight - before).abs().max() > 1e-3
    assert_orthonormal(layer)


def test_orthonormal_bases_span_disjoint_subspaces():
    """U_i^T U_j = 0: with tied projections, what one head moves no other head sees."""
    layer = MSSA(DIM, HEADS, tied=True, orthogonal=True).double()
    x = torch.randn(2, 9, DIM).double()
    assert_close(layer(x) @ layer.qkv.weight.T, merge(ops.mssa(split(x @ layer.qkv.weight.T))), 1e-10)


# --- bad input ---

CLASSES = [CBSA, MSSA, MHSA, TSSA, LinearCBSA, AgentAttention]
each_class = pytest.mark.parametrize("mixer", CLASSES)
BAD_OPTIONS = [
    ({"gated": True}, ValueError, "gated must be False: {name} has no output gate"),
    ({"scale_norm": True}, ValueError, "norm_layer is required with qk_norm or scale_norm"),
    ({"num_heads": 5}, ValueError, r"dim \(=12\) must be divisible by num_heads \(=5\)"),
    ({"head_dim": 0}, ValueError, "head_dim must be at least 1, got 0"),
    ({"head_dim": 4, "attn_head_dim": 8}, ValueError, "must agree"),
    ({"grid_size": (0, 3)}, ValueError, "grid_size must be a tuple of one to three positive integers"),
    ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens must be an int of at least 0, got -1"),
    ({"heads": 3}, TypeError, "unexpected keyword argument 'heads'"),
    ({"dropout": 0.1}, TypeError, "unexpected keyword argument 'dropout'"),
]


@each_class
@pytest.mark.parametrize(("options", "kind", "message"), BAD_OPTIONS)
def test_bad_options_are_named(mixer, options, kind, message):
    with pytest.raises(kind, match=message.format(name=mixer.__name__)):
        mixer(**{"dim": DIM, "num_heads": HEADS, **options})


@pytest.mark.parametrize("build", [of(c) for c in (CBSA, MSSA, TSSA, LinearCBSA)] + [MIXERS["agent shared"]])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True, "norm_layer": nn.LayerNorm}, "qk_norm needs qkv='separate'"),
        ({"tied": True, "dim_out": 6}, "tied needs qkv='shared' and dim_out equal to dim"),
        ({"orthogonal": True, "head_dim": 6}, r"num_heads \* head_dim \(=18\) at most dim \(=12\)"),
        (
            {"orthogonal": True, "dtype": torch.bfloat16},
            "orthogonal needs float32 or float64 parameters, got torch.bfloat16",
        ),
    ],
)
def test_bad_options_of_shared_projections_are_named(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("build", [of(MHSA), of(CBSA, qkv="separate"), of(AgentAttention)])
@pytest.mark.parametrize("option", ["tied", "orthogonal"])
def test_separate_projections_are_no_bases(build, option):
    with pytest.raises(ValueError, match=f"{option} needs qkv='shared'"):
        build(**{option: True})


@pytest.mark.parametrize("build", [of(MHSA), of(CBSA, qkv="separate"), of(AgentAttention)])
def test_norms_of_queries_and_keys(build):
    torch.manual_seed(1)
    plain = build()
    layer = build(qk_norm=True, scale_norm=True, norm_layer=nn.LayerNorm)
    layer.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 9, DIM)
    out, _, grads = gradients(layer, x)
    assert (out - plain(x)).abs().max() > 1e-3
    assert {"q_norm.weight", "k_norm.weight", "norm.weight"} <= grads.keys()
    assert all(gradient.abs().max() > 0 for name, gradient in grads.items() if name != "k_norm.bias")


@each_class
def test_bad_inputs_are_named(mixer):
    layer = mixer(DIM, HEADS)
    x = torch.zeros(2, 9, DIM)
    mask = torch.ones(2, 9, dtype=torch.bool)
    if not layer.compares_tokens:
        with pytest.raises(
            ValueError, match=f"is_causal must be False: {mixer.__name__} summarises all tokens"
        ):
            layer(x, is_causal=True)
        with pytest.raises(ValueError, match="attn_mask must be a boolean key-padding mask"):
            layer(x, attn_mask=torch.ones(9, 9, dtype=torch.bool))
        with pytest.raises(
            ValueError, match=f"attn_drop must be 0 for {mixer.__name__}, which has no N x N weights"
        ):
            mixer(DIM, HEADS, attn_drop=0.1)
    with pytest.raises(ValueError, match="not both"):
        layer(x, token_mask=mask, attn_mask=mask[:, None])
    with pytest.raises(ValueError, match="9 cells|12 cells"):
        layer(x, (3, 4))
    with pytest.raises(ValueError, match="x must have dim=12 channels"):
        layer(torch.zeros(2, 9, 7))
    with pytest.raises(ValueError, match=r"token_mask must have shape \(B, N\)"):
        layer(x, token_mask=mask[:, :8])
    with pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        layer(x, mask=mask)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TSSA(DIM, HEADS, form="tosst"), "form must be one of 'tost', 'channel'.*did you mean 'tost'"),
        (lambda: TSSA(DIM, HEADS, eps=0.5), "form='tost' has eps=1 and average=True, got 0.5 and True"),
        (lambda: TSSA(DIM, HEADS, form="channel", eps=0.0), "eps must be positive"),
        (lambda: LinearCBSA(DIM, HEADS, solver="qr"), "solver must be one of 'cholesky', 'eigh'"),
        (lambda: LinearCBSA(DIM, HEADS, eps=-1.0), "eps must be positive"),
        (lambda: AgentAttention(DIM, HEADS, qkv="seperate"), "qkv must be one of.*did you mean 'separate'"),
        (lambda: AgentAttention(DIM, HEADS, num_representatives=0), "num_representatives must be at least 1"),
        (lambda: CBSA(DIM, HEADS, representatives="princpal"), "did you mean 'principal'"),
        (lambda: CBSA(DIM, HEADS, representatives="tokens", layout="official"), "needs representatives='pool'"),
        (lambda: CBSA(DIM, HEADS, representatives="basis", qkv="separate"), "need qkv='shared'"),
        *(
            (lambda kind=kind: AgentAttention(DIM, HEADS, representatives=kind), "must not bring an attention")
            for kind in ("tokens", "principal", "basis")
        ),
    ],
)
def test_bad_own_options_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def returns(what, **attributes):
    def strategy(tokens, grid_size, token_mask):
        return what(tokens)

    for name, value in attributes.items():
        setattr(strategy, name, value)
    return strategy


def with_attention(tokens):
    weights = torch.full((*tokens.shape[:2], 2, tokens.shape[2]), 0.1)
    return Representatives(tokens[:, :, :2], attention=weights)


def without_attention(tokens):
    return Representatives(tokens[:, :, :2])


BAD_STRATEGIES = [
    (returns(lambda tokens: tokens[:, :, :2]), TypeError, r"must return ops.Representatives\(.*got Tensor"),
    (returns(lambda tokens: None), TypeError, "must return ops.Representatives.*got NoneType"),
    (returns(lambda tokens: (tokens, None)), TypeError, "must return ops.Representatives.*got tuple"),
    (returns(with_attention), ValueError, "gives_attention = True if and only if.*got one"),
    (returns(without_attention, gives_attention=True), ValueError, "gives_attention = True if.*got none"),
    (
        returns(lambda tokens: Representatives(tokens[..., :2])),
        ValueError,
        r"representatives must have shape \(B, H, M, P\)",
    ),
    (
        returns(lambda tokens: Representatives(tokens, torch.ones(2, 3))),
        TypeError,
        "representative_mask must have dtype torch.bool",
    ),
    (
        returns(lambda tokens: Representatives(tokens, attention=torch.ones(1)), gives_attention=True),
        ValueError,
        "attention must have shape",
    ),
]


@pytest.mark.parametrize(("strategy", "kind", "message"), BAD_STRATEGIES)
def test_strategies_that_break_the_protocol_are_named(strategy, kind, message):
    layer = CBSA(DIM, HEADS, representatives=strategy)
    with pytest.raises(kind, match=message):
        layer(torch.zeros(2, 9, DIM))


@pytest.mark.parametrize("strategy", [s for s, kind, _ in BAD_STRATEGIES if kind is TypeError][:3])
def test_agents_must_be_representatives(strategy):
    with pytest.raises(TypeError, match="must return ops.Representatives"):
        AgentAttention(DIM, HEADS, representatives=strategy)(torch.zeros(2, 9, DIM))


def test_a_strategy_of_your_own_may_bring_its_attention():
    layer = CBSA(DIM, HEADS, representatives=returns(with_attention, gives_attention=True))
    assert layer.step_representatives is None
    x = torch.randn(2, 9, DIM)
    tokens = split(x @ layer.qkv.weight.T)
    values, _, attention = with_attention(tokens)
    out = ops.cbsa(tokens, values, attention=attention, step_tokens=layer.step_tokens)
    assert_close(layer(x), layer.proj(merge(out)), 1e-5)


@pytest.mark.parametrize("mixer", [CBSA, AgentAttention])
def test_what_a_strategy_is_given(mixer):
    """Grid tokens and their grid if it needs them, otherwise all tokens and None."""
    seen = []

    def strategy(tokens, grid_size, token_mask):
        seen.append((tokens, grid_size, token_mask))
        return Representatives(tokens[:, :, :2])

    x, feature_map = torch.randn(2, 1 + 12, DIM), torch.randn(2, DIM, 2, 5)
    mask = torch.arange(13) < torch.tensor([[13], [6]])
    layer = mixer(DIM, HEADS, representatives=strategy, qkv="shared")
    layer(x, (3, 4), mask)
    strategy.needs_grid = True
    layer(x, (3, 4), mask)
    layer(feature_map)
    every = split(x.masked_fill(~mask[..., None], 0.0) @ layer.qkv.weight.T)
    mapped = split(feature_map.flatten(2).mT @ layer.qkv.weight.T)
    expected = [(every, None, mask), (every[:, :, 1:], (3, 4), mask[:, 1:]), (mapped, (2, 5), None)]
    for got, wanted in zip(seen, expected, strict=True):
        assert_close(got[0], wanted[0], 1e-6)
        assert got[1] == wanted[1]
        assert got[2] is wanted[2] is None or torch.equal(got[2], wanted[2])


# --- around the mixers ---


@pytest.mark.parametrize("mixer", CLASSES)
def test_timm_creates_models_with_them(mixer):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", attn_layer=mixer, img_size=64, num_classes=3)
    assert all(type(block.attn) is mixer for block in model.blocks)
    out = model(torch.randn(1, 3, 64, 64))
    assert out.shape == (1, 3)
    out.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.blocks.parameters())


def test_residual_block_is_its_equations():
    block = ResidualBlock(DIM, MSSA(DIM, HEADS), mlp_ratio=1.5).double()
    assert [tuple(p.shape) for p in block.mlp.parameters()] == [(18, 12), (18,), (12, 18), (12,)]
    nn.init.normal_(block.norm1.weight)
    nn.init.normal_(block.norm2.bias)
    x = torch.randn(2, 9, DIM).double()
    mask = torch.arange(9) < torch.tensor([[9], [5]])

    def norm(layer, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias

    y = x + block.attn(norm(block.norm1, x), token_mask=mask)
    up, _, down = block.mlp
    expected = y + F.gelu(norm(block.norm2, y) @ up.weight.T + up.bias) @ down.weight.T + down.bias
    assert_close(block(x, None, mask), expected, 1e-12)
    assert all(g.abs().max() > 0 for g in gradients(block, x)[2].values())
    with pytest.raises(ValueError, match="mlp_ratio must be positive"):
        ResidualBlock(DIM, MSSA(DIM, HEADS), mlp_ratio=0.0)


def test_linear_stem_reads_patches_row_by_row_channels_last():
    stem = LinearStem(2, 8, 3).double()
    nn.init.normal_(stem.norm1.weight)
    nn.init.normal_(stem.norm2.bias)
    images = torch.randn(2, 2, 6, 9).double()
    out = stem(images)
    assert out.shape == (2, 8, 2, 3)
    assert stem.grid_size((6, 9)) == (2, 3)
    for b in range(2):
        for row in range(2):
            for column in range(3):
                patch = [
                    images[b, channel, 3 * row + y, 3 * column + x]
                    for y in range(3)
                    for x in range(3)
                    for channel in range(2)
                ]
                expected = stem.norm2(stem.proj(stem.norm1(torch.stack(patch))))
                assert_close(out[b, :, row, column], expected, 1e-12)


@pytest.mark.parametrize("size", [(15, 16), (16, 18), (7, 7)], ids=str)
def test_linear_stem_names_sizes_that_are_no_multiples(size):
    stem = LinearStem(3, 8, 4)
    message = f"multiples of patch_size 4 for a linear stem, got {size[0]} x {size[1]}"
    with pytest.raises(ValueError, match=message):
        stem(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match=message):
        stem.grid_size(size)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: LinearStem(patch_size=0), ValueError, "patch_size must be at least 1"),
        (lambda: LinearStem(embed_dim=8.0), TypeError, "embed_dim must be an int"),
        (lambda: LinearStem(3, 8, 4)(torch.zeros(1, 1, 8, 8)), ValueError, r"\(B, 3, height, width\)"),
        (lambda: LinearStem(3, 8, 4)(torch.zeros(1, 3, 8, 8).byte()), TypeError, "images must have a floating"),
    ],
)
def test_bad_linear_stems_are_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("kind", ["principal", "basis", "pool", "learned", "tokens"])
def test_counts_include_what_representatives_cost(kind):
    number = {"num_representatives": 4} if kind in ("pool", "learned") else {}
    layer = CBSA(12, 3, representatives=kind, contraction="exact", **number)
    x = torch.randn(1, 16, 12)
    projections = 2 * 2 * 16 * 12 * 12
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        layer.requires_grad_(False)(x)
    assert layer.counts(x).products + projections == counter.get_total_flops()


def test_nan_in_one_item_leaves_the_others_alone_along_principal_directions():
    layer = CBSA(12, 3, representatives="principal", contraction="exact")
    x = torch.randn(2, 16, 12)
    expected = layer(x)[1]
    x[0, 3, 4] = torch.nan
    out = layer(x)
    assert out[0].isnan().any()
    assert_close(out[1], expected, 1e-6)


def test_orthogonal_bases_in_half_precision_are_refused_at_any_time():
    layer = MSSA(12, 3, orthogonal=True).bfloat16()
    with pytest.raises(ValueError, match="orthogonal needs float32 or float64 parameters, got torch.bfloat16"):
        layer(torch.randn(1, 4, 12, dtype=torch.bfloat16))


def test_agents_with_an_attention_are_refused():
    def silent(tokens, grid_size, token_mask):
        return ops.Representatives(tokens, None, torch.zeros(*tokens.shape[:3], tokens.shape[2]))

    with pytest.raises(ValueError, match="must not return an attention"):
        AgentAttention(12, 3, representatives=silent)(torch.randn(1, 4, 12))


def test_a_strategy_is_reset_down_to_its_parts():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4))

        def forward(self, tokens, grid_size, token_mask):
            return ops.Representatives(self.inner(tokens[:, :, :2]))

    layer = CBSA(12, 3, representatives=Nested())
    before = layer.representatives.inner[0].weight.clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.representatives.inner[0].weight)


COMPARING = pytest.mark.parametrize("mixer", [MSSA, MHSA])


@COMPARING
def test_causal_layers_do_not_look_ahead(mixer):
    layer = mixer(DIM, HEADS).double()
    x = torch.randn(2, 9, DIM).double()
    out = layer(x, is_causal=True)
    changed = x.clone()
    changed[:, 5:] += 1
    assert_close(layer(changed, is_causal=True)[:, :5], out[:, :5], 1e-14)
    lower = torch.ones(9, 9, dtype=torch.bool).tril()
    assert_close(layer(x, attn_mask=lower), out, 1e-14)
    added = torch.zeros(9, 9).double().masked_fill(~lower, -torch.inf)
    assert_close(layer(x, attn_mask=added), out, 1e-14)
    with pytest.raises(ValueError, match="attn_mask or is_causal, not both"):
        layer(x, attn_mask=lower, is_causal=True)


@COMPARING
def test_causal_and_padded_is_causal_alone(mixer):
    layer = mixer(DIM, HEADS).double()
    x = torch.randn(3, 9, DIM).double()
    mask = torch.arange(9) < torch.tensor([9, 5, 0])[:, None]
    x[1, 5:] = torch.nan
    out = layer(x, token_mask=mask, is_causal=True)
    assert_close(out[1, :5], layer(x[1:2, :5], is_causal=True)[0], 1e-13)
    assert (out[2] == 0).all()


@COMPARING
def test_masks_of_other_kinds_are_named(mixer):
    layer = mixer(DIM, HEADS)
    x = torch.randn(2, 9, DIM)
    with pytest.raises(
        ValueError, match=r"attn_mask must broadcast to \(B, H, N, K\) = \(2, 3, 9, 9\), got \(9, 8\)"
    ):
        layer(x, attn_mask=torch.ones(9, 8, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"attn_mask must be boolean or torch\.float32"):
        layer(x, attn_mask=torch.ones(9, 9, dtype=torch.int64))


@COMPARING
def test_attention_dropout_only_while_training(mixer):
    layer = mixer(DIM, HEADS, attn_drop=0.9)
    x = torch.randn(2, 9, DIM)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("decay", [1e-4, 0.1])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_orthogonal_bases_survive_weight_decay_and_averaging(optimizer, decay):
    layer = MSSA(DIM, HEADS, orthogonal=True, tied=True)
    steps = optimizer(layer.parameters(), lr=0.1, weight_decay=decay)
    average = copy.deepcopy(layer)
    for _ in range(5):
        layer(torch.randn(2, 9, DIM)).square().mean().backward()
        steps.step()
        for mean, new in zip(average.parameters(), layer.parameters(), strict=True):
            mean.data.lerp_(new.data, 0.1)
    for model in (layer, average):
        bases = model.qkv.weight
        assert_close(bases @ bases.mT, torch.eye(DIM), 1e-5)


def test_making_a_weight_orthonormal_keeps_an_orthonormal_one():
    linear = nn.Linear(7, 5, dtype=torch.float64)
    nn.init.orthogonal_(linear.weight)
    expected = linear.weight.detach().clone()
    keep_rows_orthonormal(linear)
    assert_close(linear.weight, expected, 1e-14)
    linear.weight = torch.eye(5, 7, dtype=torch.float64)  # nothing to reflect
    assert_close(linear.weight, torch.eye(5, 7, dtype=torch.float64), 0)
    reflectors = linear.parametrizations.weight.original
    torch.autograd.gradcheck(linear.parametrizations.weight[0], reflectors.detach().requires_grad_())


@pytest.mark.parametrize("mixer", [MHSA, partial(CBSA, qkv="separate"), AgentAttention])
def test_norms_in_float32_under_autocast(mixer):
    class Wide(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.float())

    layer = mixer(DIM, HEADS, qk_norm=True, norm_layer=Wide)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(layer(torch.randn(2, 9, DIM))).all()


def test_principal_directions_and_the_softmax_contraction_do_not_go_together():
    with pytest.raises(ValueError, match="the signs of principal directions are arbitrary"):
        CBSA(DIM, HEADS, representatives="principal")


@pytest.mark.parametrize("contraction", ["exact", "none"])
def test_more_dimensions_than_tokens_along_principal_directions(contraction):
    layer = CBSA(DIM, HEADS, representatives="principal", contraction=contraction).double()
    x = torch.randn(2, 3, DIM).double()  # 3 tokens, 4 dimensions
    padded = torch.cat([x, torch.full((2, 2, DIM), torch.nan).double()], dim=1)
    mask = torch.arange(5).expand(2, 5) < 3
    assert_close(layer(padded, token_mask=mask)[:, :3], layer(x), 1e-12)
    chosen = layer.representatives(split(x @ layer.qkv.weight.T), None, None)
    empty = chosen.values.square().sum(-1) == 0
    assert empty.sum(-1).eq(1).all()
    assert (chosen.attention[empty] == 0).all()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"eps": 0.5}, ValueError, "eps is of contraction='exact'"),
        ({"representatives": "tokens", "num_representatives": 4}, ValueError, "num_representatives is of"),
        ({"representatives": nn.Identity}, TypeError, "must be an instance, got the class Identity"),
        ({"representatives": None}, ValueError, "or pass a function or module of your own"),
        ({"tied": "no"}, TypeError, "tied must be True or False, got 'no'"),
        ({"orthogonal": 1}, TypeError, "orthogonal must be True or False"),
    ],
)
def test_options_without_effect_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        CBSA(DIM, HEADS, **options)


def test_a_strategy_is_on_a_grid_or_gives_its_attention():
    def both(tokens, grid_size, token_mask):
        raise AssertionError

    both.needs_grid = both.gives_attention = True
    with pytest.raises(ValueError, match="cannot have both needs_grid and gives_attention"):
        CBSA(DIM, HEADS, representatives=both)


def test_the_mean_form_of_channel_attention_is_the_sum_with_n_eps_squared():
    mean, literal = TSSA(DIM, HEADS, form="channel"), TSSA(DIM, HEADS, form="channel", average=False, eps=3.0)
    literal.load_state_dict(mean.state_dict())
    x = torch.randn(2, 9, DIM)
    assert_close(literal(x), mean(x), 1e-6)
