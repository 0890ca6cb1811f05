"""Every token mixer: official parity, equivalences, grids, masks, precision, compilation, state, bad input."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from cbsa_torch import CBSA, ops
from cbsa_torch.nn import MHSA, MSSA, TSSA, AgentAttention, LinearCBSA
from tests.helpers import golden
from tests.helpers.compare import assert_close
from tests.helpers.mixers import (
    DIM,
    HEADS,
    MIXERS,
    assert_orthonormal,
    assert_same,
    each_mixer,
    each_name,
    gradients,
    mean_and_first,
    merge,
    of,
    split,
)

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
    values, mask, attention = layer.representatives(heads, (3, 3), None)[:3]
    options = {"step_tokens": layer.step_tokens, "contraction": contraction, "representative_mask": mask, **eps}
    if attention is None:
        out = ops.cbsa(heads, values, step_representatives=layer.step_representatives, **options)
    else:
        out = ops.contract_and_broadcast(heads, values, attention, **options)
    assert_close(layer(x), layer.proj(merge(out)), 1e-12)


# --- grids and masks ---


@each_mixer
@pytest.mark.parametrize("grid", [(9,), (3, 5), (2, 3, 3), (2, 30), (1,)], ids=str)
def test_feature_maps_are_tokens_on_a_grid(build, grid):
    layer = build().double()
    feature_map = torch.randn(2, DIM, *grid).double()
    out = layer(feature_map)
    assert out.shape == feature_map.shape
    assert_close(out.flatten(2).mT, layer(feature_map.flatten(2).mT, grid), 1e-12)


@pytest.mark.parametrize("name", [name for name in MIXERS if "tied" not in name])
def test_another_number_of_output_channels(name):
    layer, whole = MIXERS[name](dim_out=8), MIXERS[name]()
    state = whole.state_dict()
    layer.load_state_dict(
        {**state, "proj.weight": state["proj.weight"][:8], "proj.bias": state["proj.bias"][:8]}
    )
    x = torch.randn(2, DIM, 3, 5)
    assert_close(layer(x), whole(x)[:, :8], 1e-6)


@each_name
def test_a_padded_batch_is_each_item_alone(name):
    layer = MIXERS[name](qkv_bias=True).double()
    nn.init.ones_(layer.qkv.bias)  # which must not leak into padding
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
@pytest.mark.parametrize("grid", [(3, 4), (2, 2, 4)], ids=str)
def test_masks_of_feature_maps_and_of_timm(build, grid):
    layer = build().double()
    x = torch.randn(2, DIM, *grid).double()
    mask = torch.ones(2, *grid, dtype=torch.bool)
    mask[1, ..., 2:] = False  # a narrower image
    out = layer(x, token_mask=mask)
    assert_close(out[1:, ..., :2], layer(x[1:, ..., :2]), 1e-11)
    assert (out[1, ..., 2:] == 0).all()
    tokens, flat = x.flatten(2).mT, mask.flatten(1)
    expected = layer(tokens, grid, flat)
    assert_close(out.flatten(2).mT, expected, 1e-11)
    for shaped in (flat[:, None], flat[:, None, None]):
        assert_close(layer(tokens, grid, attn_mask=shaped), expected, 0)


# --- precision and compilation ---


@each_mixer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_low_precision(build, dtype):
    layer = build()
    x = torch.randn(2, 16, DIM)
    expected = gradients(layer, x)
    inside = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(inside)
    certified = "certified" in (getattr(layer, "step", ""))
    assert out.dtype == (torch.float32 if certified else dtype)  # its bases are not rounded
    out.float().backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)))
    assert_close(out.float(), expected[0], 5e-2)
    assert_close(inside.grad, expected[1], 1e-1)
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == parameter.dtype
        assert_close(parameter.grad, expected[2][name], 1e-1)
    if not layer.orthogonal:
        assert_close(layer.to(dtype)(x.to(dtype)).float(), expected[0], 5e-2)


ONE_OF_EACH_CLASS = ("cbsa", "mssa", "mhsa", "tssa", "linear", "agent", "linear attention", "adapted")
COMPILED = [(name, masked, "aot_eager") for name in MIXERS for masked in (False, True)]


@pytest.mark.parametrize(
    ("name", "masked", "backend"),
    [
        ("linear", False, "inductor"),
        *(pytest.param(*c, marks=() if c[0] in ONE_OF_EACH_CLASS else pytest.mark.slow) for c in COMPILED),
    ],
)
def test_compiles_in_one_graph(name, masked, backend):
    torch.compiler.reset()
    layer, x = MIXERS[name](), torch.randn(2, 12, DIM)
    mask = torch.arange(12) < torch.tensor([[12], [6]]) if masked else None
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    out, grad_input, grads = gradients(compiled, x, (3, 4), mask)
    grads = {key.removeprefix("_orig_mod."): gradient.clone() for key, gradient in grads.items()}
    assert_same((out, grad_input, grads), gradients(layer, x, (3, 4), mask), 1e-4)


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
def test_state_dict_and_deepcopy(build):
    layer, other, x = build(), build(), torch.randn(2, 9, DIM)
    expected = layer(x)
    assert (other(x) - expected).abs().max() > 1e-4
    other.load_state_dict(layer.state_dict())
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
def test_steps_and_bases_have_no_weight_decay(build):
    named = {name for name, _ in build().named_parameters()}
    expected = {n for n in named if n.startswith("step_") or n == "temperature" or "parametrizations" in n}
    assert build().no_weight_decay() == expected


@each_mixer
def test_device_and_dtype_reach_every_parameter(build):
    layer = build(dtype=torch.float64, device="meta")
    own = {n: p for n, p in layer.named_parameters() if not n.startswith("representatives.shift")}
    assert {p.dtype for p in own.values()} == {torch.float64}
    assert {p.device.type for p in own.values()} == {"meta"}


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
        ({"orthogonal": True, "dtype": torch.bfloat16}, "orthogonal needs float32 or float64 parameters"),
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
    for tensor in layer.heads(x)[1:3]:  # queries and keys
        assert_close(tensor.mean(-1) + 1, torch.ones(tensor.shape[:3]), 1e-5)
    assert {"q_norm.weight", "k_norm.weight", "norm.weight"} <= grads.keys()
    assert all(gradient.abs().max() > 0 for name, gradient in grads.items() if name != "k_norm.bias")


@each_class
def test_bad_inputs_are_named(mixer):
    layer = mixer(DIM, HEADS)
    x = torch.zeros(2, 9, DIM)
    mask = torch.ones(2, 9, dtype=torch.bool)
    if not layer.compares_tokens:
        name = mixer.__name__
        with pytest.raises(ValueError, match=f"is_causal must be False: {name} summarises all tokens"):
            layer(x, is_causal=True)
        with pytest.raises(ValueError, match="attn_mask must be a key-padding mask"):
            layer(x, attn_mask=torch.ones(9, 9, dtype=torch.bool))
        with pytest.raises(ValueError, match=f"attn_drop must be 0 for {name}, which has no N x N weights"):
            mixer(DIM, HEADS, attn_drop=0.1)
    with pytest.raises(ValueError, match="not both"):
        layer(x, token_mask=mask, attn_mask=mask[:, None])
    with pytest.raises(ValueError, match="9 cells|12 cells"):
        layer(x, (3, 4))
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


# --- around the mixers ---


@pytest.mark.parametrize("mixer", [MHSA, partial(CBSA, qkv="separate"), AgentAttention])
def test_norms_in_float32_under_autocast(mixer):
    class Wide(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.float())

    layer, x = mixer(DIM, HEADS, qk_norm=True, norm_layer=Wide), torch.randn(2, 9, DIM)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer(x).float(), expected, 5e-2)


@pytest.mark.parametrize("mixer", [CBSA, AgentAttention])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_grid_is_asked_for_once_and_not_when_computing_again(mixer, recompute):
    class Source:
        calls = 0

        def grid_of(self, num_tokens):
            self.calls += 1
            return (2, 8)

    layer = mixer(DIM, HEADS, num_representatives=4, recompute=recompute)
    layer.grid_follower = Source()
    x = torch.randn(2, 16, DIM, requires_grad=True)
    layer(x).sum().backward()
    assert layer.grid_follower.calls == 1
    assert_close(layer(x), layer(x, (2, 8)), 0)
    source = layer.read(x)
    assert (source.grid_size, source.num_prefix_tokens, source.map_grid) == ((2, 8), 0, None)
    assert layer.project(source).source is source


def test_options_for_what_takes_a_class():
    import timm

    from tests.helpers.mixers import ShiftedPool

    strategy = ShiftedPool()
    chosen = CBSA.with_options(representatives=strategy, proj_bias=False)
    model = timm.create_model(
        "vit_tiny_patch16_224", attn_layer=chosen, depth=2, embed_dim=DIM, num_heads=HEADS, img_size=64
    )
    first, second = (block.attn for block in model.blocks)
    assert type(first) is CBSA
    assert first.proj.bias is None  # timm passes proj_bias=True
    assert first.representatives is not second.representatives is not strategy
    assert torch.equal(first.representatives.shift, strategy.shift)
    tokens = torch.randn(1, 17, DIM)
    assert_close(
        pickle.loads(pickle.dumps(first))(tokens, (4, 4)), first(tokens, (4, 4)), 0
    )  # it knows no model
    file = io.BytesIO()
    torch.save(model, file)  # timm keeps the class in the model
    file.seek(0)
    x = torch.randn(1, 3, 64, 64)
    for same in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert_close(same.eval()(x), model.eval()(x), 0)
        assert same._model_args["attn_layer"](DIM, HEADS).representatives.shift.shape == strategy.shift.shape
    with pytest.raises(TypeError, match="unexpected keyword argument 'tide'"):
        CBSA.with_options(tide=True)(DIM, HEADS)
    with pytest.raises(TypeError, match="cannot be subclassed; subclass CBSA"):
        type("Mine", (chosen,), {})
