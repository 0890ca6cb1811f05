"""Linear layers changed after they were built: tied mixers project out with the transpose of what the layer does."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

from cbsa_torch import CBSA
from cbsa_torch._core.linear import is_offloaded, is_plain_linear, matrix_of
from cbsa_torch.nn import MSSA
from tests.helpers.compare import assert_close

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
)
DIM, HEADS = 16, 2
X = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(3))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def lora(layer, **options):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False, **options)
    return peft.get_peft_model(nn.ModuleDict({"attn": layer}), config)


def low_rank(qkv):
    """Base weight plus B A times the scaling, by hand."""
    a, b = qkv.lora_A["default"].weight, qkv.lora_B["default"].weight
    return qkv.base_layer.weight + qkv.scaling["default"] * b @ a


# Each changes layer.qkv and returns the weight and bias that it then has, computed in another way.


def with_lora(layer):
    lora(layer, lora_alpha=4)
    return low_rank(layer.qkv), layer.qkv.base_layer.bias


def with_dora(layer):
    lora(layer, use_dora=True)
    merged = copy.deepcopy(layer.qkv)
    merged.merge()
    return merged.base_layer.weight, merged.base_layer.bias


def with_a_saved_module(layer):
    import peft

    config = peft.LoraConfig(target_modules=["other"], modules_to_save=["qkv"])
    peft.get_peft_model(nn.ModuleDict({"attn": layer, "other": nn.Linear(2, 2)}), config)
    saved = layer.qkv.modules_to_save["default"]
    nn.init.normal_(saved.weight)
    return saved.weight, saved.bias


def with_a_forward_hook(layer):
    layer.qkv.register_forward_hook(lambda module, args, out: 2 * out)
    return 2 * layer.qkv.weight, None if layer.qkv.bias is None else 2 * layer.qkv.bias


def with_a_pre_hook(layer):
    layer.qkv.register_forward_pre_hook(lambda module, args: (0.5 * args[0],))
    return 0.5 * layer.qkv.weight, layer.qkv.bias


def with_spectral_norm(layer):
    twin = nn.utils.spectral_norm(copy.deepcopy(layer.qkv))
    nn.utils.spectral_norm(layer.qkv)
    twin.load_state_dict(layer.qkv.state_dict())
    twin.eval()(X)
    return twin.weight, twin.bias


def with_another_forward(layer):
    weight, bias = layer.qkv.weight, layer.qkv.bias
    layer.qkv.forward = lambda x: F.linear(x, weight / 2, bias)
    return weight / 2, bias


def with_a_subclass(layer):
    state = layer.qkv.state_dict()
    layer.qkv = Scaled(DIM, DIM, "bias" in state)
    layer.qkv.load_state_dict(state)
    return 3 * layer.qkv.weight, None if layer.qkv.bias is None else 3 * layer.qkv.bias


def with_a_parametrisation(layer):
    weight = layer.qkv.weight.detach().clone()
    parametrize.register_parametrization(layer.qkv, "weight", Doubled())
    return 2 * weight, layer.qkv.bias


def with_pruning(layer):
    weight = layer.qkv.weight.detach().clone()
    prune.random_unstructured(layer.qkv, "weight", 0.5)
    return weight * layer.qkv.weight_mask, layer.qkv.bias


def with_compilation(layer):
    weight, bias = layer.qkv.weight, layer.qkv.bias
    layer.qkv = torch.compile(layer.qkv, backend="eager")
    return weight, bias


def offloaded(layer):
    import accelerate

    weight, bias = (None if t is None else t.detach().clone() for t in (layer.qkv.weight, layer.qkv.bias))
    accelerate.cpu_offload(nn.Sequential(layer), execution_device=torch.device("cpu"))
    assert layer.qkv.weight.is_meta
    return weight, bias


def dispatched(layer):
    import accelerate

    accelerate.dispatch_model(nn.Sequential(layer), {"": "cpu"}, main_device="cpu", force_hooks=True)
    return layer.qkv.weight, layer.qkv.bias


def quantised_by_torchao(layer, config="Int8WeightOnlyConfig"):
    from torchao import quantization

    quantization.quantize_(layer, getattr(quantization, config)(), lambda module, name: name == "qkv")
    return layer.qkv.weight.dequantize(), layer.qkv.bias


def quantised_with_activations(layer):
    return quantised_by_torchao(layer, "Int8DynamicActivationInt8WeightConfig")


def quantised_by_torch(layer):
    torch.ao.quantization.quantize_dynamic(layer, {"qkv"}, dtype=torch.qint8, inplace=True)
    return layer.qkv.weight().dequantize(), layer.qkv.bias()


CHANGES = [
    *(with_lora, with_dora, with_a_saved_module, with_spectral_norm, with_another_forward),
    *(with_a_subclass, with_a_parametrisation, with_pruning, with_compilation, offloaded, dispatched),
    *(quantised_by_torchao, quantised_with_activations, quantised_by_torch),
]
COARSE = quantised_with_activations, quantised_by_torch
each_change = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


def plain_twin(build, state, weight, bias):
    """The layer with all that it had, and this projection."""
    twin = build()
    state = {name: tensor for name, tensor in state.items() if not name.startswith("qkv")}
    state["qkv.weight"] = weight.detach()
    if bias is not None:
        state["qkv.bias"] = bias.detach()
    twin.load_state_dict(state)
    return twin


@each_change
@pytest.mark.parametrize(("mixer", "bias"), [(CBSA, False), (CBSA, True), (MSSA, True)])
def test_tied_layers_project_out_with_what_the_layer_does(mixer, bias, change):
    def build():
        return mixer(DIM, HEADS, tied=True, qkv_bias=bias).eval()

    layer = build()
    before, state = layer(X), copy.deepcopy(layer.state_dict())
    expected = plain_twin(build, state, *change(layer))(X)
    assert_close(layer(X), expected, 5e-2 if change in COARSE else 1e-5)
    same = change in (with_compilation, offloaded, dispatched) or "quantised" in change.__name__
    assert same or (before - expected).abs().max() > 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    "change", [*CHANGES, with_a_forward_hook, with_a_pre_hook], ids=lambda change: change.__name__
)
def test_untied_layers_with_folded_projections_call_both_layers(change):
    layer = CBSA(DIM, HEADS, num_representatives=4, impl="tiled").eval()
    state = copy.deepcopy(layer.state_dict())
    weight, bias = change(layer)
    twin = plain_twin(lambda: CBSA(DIM, HEADS, num_representatives=4, impl="eager").eval(), state, weight, bias)
    assert_close(layer(X), twin(X), 5e-2 if change in COARSE else 1e-5)


@pytest.mark.parametrize("options", [{"tied": True}, {}], ids=str)
def test_gradients_reach_the_adapter_and_it_can_be_merged(options):
    layer = CBSA(DIM, HEADS, num_representatives=4, **options)
    wrapped = lora(layer, lora_alpha=4)
    plain = CBSA(DIM, HEADS, num_representatives=4, tied=layer.tied)
    parameters = {n: p for n, p in layer.named_parameters() if not n.startswith("qkv")}
    expected = torch.func.functional_call(plain, {**parameters, "qkv.weight": low_rank(layer.qkv)}, X)
    adapter = [p for n, p in layer.named_parameters() if "lora" in n]
    assert_close(layer(X), expected, 1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), adapter)
    for got, want in zip(torch.autograd.grad(layer(X).square().sum(), adapter), wanted, strict=True):
        assert want.abs().max() > 0
        assert_close(got, want, 1e-4)
    merged = wrapped.merge_and_unload()["attn"]
    assert is_plain_linear(merged.qkv)
    assert_close(merged(X), expected, 1e-5)


def test_adapters_compile_and_run_under_autocast_and_transforms():
    layer = CBSA(DIM, HEADS, num_representatives=4, tied=True)
    lora(layer)
    torch.compiler.reset()
    assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(X), layer(X), 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(layer(X).float(), layer(X).detach(), 5e-2)
    assert_close(torch.func.vmap(layer)(X[:, None])[:, 0], layer(X), 1e-5)


def test_dropout_of_an_adapter_keeps_the_mean():
    layer = CBSA(DIM, HEADS, tied=True)
    lora(layer, lora_dropout=0.5)
    layer.train()
    mean = torch.stack([matrix_of(layer.qkv, X) for _ in range(2000)]).mean(0)
    assert_close(mean, low_rank(layer.qkv), 5e-2)


def test_hooks_that_observe_see_one_call_with_the_tokens_and_backward_hooks_run():
    layer, seen = CBSA(DIM, HEADS, tied=True), []
    expected = layer(X)
    layer.qkv.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    assert_close(layer(X), expected, 1e-5)
    assert len(seen) == 1
    assert seen[0] is X
    padded = torch.cat([X, torch.full_like(X[:, :1], float("nan"))], 1)
    real = torch.arange(10) < 9
    assert layer(padded, grid_size=(2, 5), token_mask=real.expand(2, -1)).isfinite().all()
    layer.qkv.register_full_backward_hook(lambda module, got, given: (2 * got[0],))
    x = X.clone().requires_grad_()
    plain = copy.deepcopy(layer)
    plain.qkv._backward_hooks.clear()
    (hooked,) = torch.autograd.grad(layer(x).sum(), x)
    (wanted,) = torch.autograd.grad(plain(x).sum(), x)
    assert_close(hooked, 2 * wanted, 1e-5)


def test_a_weight_that_a_hook_sets_is_set_once_per_step():
    layer = CBSA(DIM, HEADS, tied=True)
    nn.utils.spectral_norm(layer.qkv)
    twin = copy.deepcopy(layer.qkv)
    layer(X)
    twin(X)
    assert torch.equal(layer.qkv.weight_u, twin.weight_u)


def zeroing_a_token(module, args, out):
    return out.index_fill(1, torch.tensor([3]), 0)


def patching_an_item(module, args, out):
    out[0] *= 3


HOOKS = {
    "doubling": lambda module, args, out: 2 * out,
    "one token": zeroing_a_token,
    "one item": patching_an_item,
    "by length": lambda module, args, out: out / out.shape[1] * 16,
    "adding": lambda module, args, out: out + torch.ones(2, 9, DIM),
    "other shape": lambda module, args, out: out[..., :4],
}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_hooks_that_change_a_tied_projection_are_refused(hook):
    layer = CBSA(DIM, HEADS, tied=True)
    layer.qkv.register_forward_hook(hook)
    with pytest.raises(ValueError, match="a hook changes what this one returns.*use tied=False"):
        layer(X)
    layer = CBSA(DIM, HEADS, tied=True)
    register = nn.modules.module.register_module_forward_hook
    handle = register(lambda module, args, out: hook(module, args, out) if module is layer.qkv else None)
    try:
        with pytest.raises(ValueError, match="a hook changes what this one returns"):
            layer(X)
    finally:
        handle.remove()


def test_an_adapter_of_a_layer_with_a_hook_that_treats_an_item_differently_is_refused():
    layer = CBSA(DIM, HEADS, tied=True)
    layer.qkv.register_forward_hook(lambda module, args, out: torch.cat([out[:1], 3 * out[1:]]))
    lora(layer, lora_dropout=0.5)
    with pytest.raises(ValueError, match="a hook changes what this one returns"):
        layer.eval()(X)
    with pytest.raises(ValueError, match="has hooks: in compiled code, under torch.func, with active dropout"):
        layer.train()(X)


def test_small_changes_by_hooks_of_adapters_are_refused_too():
    """Those that choose an adapter for each item of a batch, and a factor of 1.1 on the adapter or inside it."""
    import peft

    x = torch.cat([X, X])
    layer = CBSA(DIM, HEADS, num_representatives=4, tied=True)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(layer), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.05)
    alone, names = model(x), ["default", "__base__"] * len(X)
    assert_close(model(x, adapter_names=["default"] * 2 * len(X)), alone, 1e-6)
    for hooked in (layer.qkv, layer.qkv.base_layer):
        handle = hooked.register_forward_hook(lambda module, args, out: out * (1 + 0.1 * (out.shape[0] > 1)))
        with pytest.raises(ValueError, match="a hook changes what this one returns"):
            model(x)
        handle.remove()
    layer.qkv.register_forward_hook(lambda module, args, out: None)
    assert_close(model(x), alone, 1e-6)
    with pytest.raises(ValueError, match="a hook changes what this one returns"):
        model(x, adapter_names=names)


def test_hooks_are_refused_where_values_cannot_be_compared():
    layer = CBSA(DIM, HEADS, tied=True)
    prune.random_unstructured(layer.qkv, "weight", 0.5)  # by a hook of PyTorch
    assert_close(torch.func.vmap(layer)(X[:, None])[:, 0], layer(X), 1e-5)
    layer = CBSA(DIM, HEADS, tied=True)
    layer.qkv.register_forward_hook(lambda module, args, out: None)
    torch.compiler.reset()
    for changed in (torch.compile(layer, backend="eager"), lambda x: torch.func.vmap(layer)(x[:, None])):
        with pytest.raises(ValueError, match="has hooks: in compiled code, under torch.func"):
            changed(X)
    torch.compiler.reset()  # the compiler would go on without the layers' forward, which it failed to trace
    assert layer.to("meta")(X.to("meta")).shape == X.shape


class OfPositive(nn.Linear):
    def forward(self, x):
        return super().forward(x.relu())


class ReluLinear(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.inner = nn.Linear(*sizes)

    def forward(self, x):
        return self.inner(x).relu()


class OutliersLinear(ReluLinear):
    def forward(self, x):
        return self.inner(torch.where(x > 2, 3 * x, x))


@pytest.mark.parametrize("kind", [OfPositive, ReluLinear, OutliersLinear])
def test_what_is_no_affine_map_is_refused(kind):
    layer = CBSA(DIM, HEADS, tied=True)
    layer.qkv = kind(DIM, DIM)
    with pytest.raises(ValueError, match=r"no affine map x W\^T \+ b: \w+ has a forward of its own"):
        layer(X)
    with pytest.raises(ValueError, match="no affine map"):
        matrix_of(layer.qkv, X)
    layer.qkv = nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU())
    with pytest.raises(TypeError, match="must be a linear layer or an adapter around one, got Sequential"):
        layer(X)


def test_the_matrix_without_an_input_is_the_weight_whatever_hooks_do():
    layer = nn.Linear(DIM, DIM)
    layer.register_forward_hook(lambda module, args, out: 2 * out)
    assert matrix_of(layer, X) is layer.weight


@each_change
def test_what_cannot_be_drawn_anew_is_left_as_it_is(change):
    layer = CBSA(DIM, HEADS, tied=True, num_representatives=4).eval()
    change(layer)
    before = layer(X)
    drawn = (with_a_subclass, with_another_forward, dispatched)
    if change in drawn:
        layer.reset_parameters()
        assert (layer(X) - before).abs().max() > 1e-3
    else:
        with pytest.raises(ValueError, match="reset_parameters cannot draw"):
            layer.reset_parameters()
        assert torch.equal(layer(X), before)


def test_offloaded_layers_are_told_from_those_on_meta():
    layer, meta = CBSA(DIM, HEADS), CBSA(DIM, HEADS, device="meta")
    assert [is_offloaded(m) for m in (layer, meta)] == [False, False]
    offloaded(layer)
    assert [is_offloaded(m) for m in (layer, layer.qkv, nn.Sequential(layer))] == [True, True, True]
