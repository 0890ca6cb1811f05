"""Layers that were changed before the model is adapted: taken along whole, or refused by name with nothing changed."""

import copy

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn
from torch.nn.utils import parametrize

from cbsa_torch import adapt_vit, interpret
from cbsa_torch.models.adapt import vit as adapt_module
from tests.helpers.compare import assert_close

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(4))
WHOLE = ("adapted_cbsa", "agent", "linear")
CUT = ("linear_cbsa", "mssa", "tssa")


def built(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 3, "img_size": 32, "patch_size": 8}
    return timm.create_model(name, **{**sizes, **options}).eval()


def with_lora(model, *names):
    import peft

    config = peft.LoraConfig(r=2, target_modules=list(names), init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("mixer", WHOLE)
def test_adapters_act_in_the_adapted_model(mixer):
    model = with_lora(built(), "attn.qkv", "attn.proj")
    merged = copy.deepcopy(model).merge_and_unload()
    adapted, report = adapt_vit(model, mixer)
    assert len(report.adapted) == 2
    assert "qkv.lora_A.default.weight" in report.adapted[0].inherited
    expected = adapt_vit(merged, mixer).model(IMAGE)
    assert_close(adapted(IMAGE), expected, 1e-5)
    assert_close(adapted.merge_and_unload()(IMAGE), expected, 1e-5)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3"])
def test_adapters_of_rotary_attention_act(name):
    model = with_lora(built(name, patch_size=8), "qkv", "q_proj", "k_proj", "v_proj")
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(adapt_vit(model, "linear").model(IMAGE), adapt_vit(merged, "linear").model(IMAGE), 1e-5)


@pytest.mark.parametrize("mixer", WHOLE)
def test_quantised_projections_stay_quantised(mixer):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = built()
    plain = adapt_vit(model, mixer).model
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: name.endswith(("attn.qkv", "attn.proj")))
    adapted = adapt_vit(model, mixer).model
    assert type(adapted.blocks[0].attn.qkv.weight) is type(model.blocks[0].attn.qkv.weight) is not nn.Parameter
    assert {p.dtype for n, p in adapted.named_parameters() if "step" in n} <= {torch.float32}
    with torch.no_grad(), interpret.capture(adapted) as records:
        assert_close(adapted(IMAGE), plain(IMAGE), 3e-2)
    assert len(records) == 2


@pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
)
def test_layers_quantised_by_torch_are_taken_along():
    model = built()
    plain = adapt_vit(model).model(IMAGE)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    adapted = adapt_vit(quantised).model
    assert adapted.blocks[0].attn.step_tokens.dtype == torch.float32
    assert_close(adapted(IMAGE), plain, 0.1)


def test_hooks_and_parametrisations_of_projections_act():
    model = built()
    expected = copy.deepcopy(model)
    with torch.no_grad():
        expected.blocks[0].attn.qkv.weight.mul_(2)
        expected.blocks[0].attn.qkv.bias.mul_(2)
        expected.blocks[1].attn.proj.weight.mul_(2)

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: 2 * out)
    parametrize.register_parametrization(model.blocks[1].attn.proj, "weight", Doubled())
    assert_close(adapt_vit(model).model(IMAGE), adapt_vit(expected).model(IMAGE), 1e-5)


class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def quantised(layer):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer.qkv, Int8WeightOnlyConfig())


CHANGED_PROJECTIONS = {
    "hooked": lambda layer: layer.qkv.register_forward_hook(lambda *_: None),
    "parametrised": lambda layer: parametrize.register_parametrization(layer.qkv, "weight", nn.Identity()),
    "subclassed": lambda layer: setattr(layer, "qkv", Own(32, 96)),
    "quantised": quantised,
    "adapted by LoRA": lambda layer: with_lora(layer, "qkv"),
    "masked gradient": lambda layer: layer.qkv.weight.register_hook(lambda gradient: gradient * 0),
    "hook after the gradient": lambda layer: layer.qkv.weight.register_post_accumulate_grad_hook(
        lambda p: None
    ),
}


def state(model):
    """Everything that adapting might change: modules, hooks, parameters, modes."""
    modules = {
        name: (id(module), module.training, list(module._forward_hooks), list(module._parameters))
        for name, module in model.named_modules()
    }
    return modules, {name: id(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("change", CHANGED_PROJECTIONS.values(), ids=CHANGED_PROJECTIONS)
@pytest.mark.parametrize("mixer", CUT)
def test_changed_projections_are_not_cut_up(change, mixer):
    model = built().train()
    change(model.blocks[1].attn)
    before = state(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn \(its qkv was changed"):
        adapt_vit(model, mixer, layers=[0, 1], inplace=True)
    assert state(model) == before
    report = adapt_vit(model, mixer).report
    assert [layer.name for layer in report.refused] == ["blocks.1.attn"]


@pytest.mark.parametrize("part", ["qkv", "qkv.weight"])
def test_shared_projections_are_not_cut_up(part):
    model = built()
    first, second = (block.attn for block in list(model.blocks)[:2])
    if part == "qkv":
        second.qkv = first.qkv
    else:
        second.qkv.weight = first.qkv.weight
    with pytest.raises(ValueError, match=r"blocks\.0\.attn and 1 more \(its qkv is shared with another layer"):
        adapt_vit(model, "mssa", layers=[0, 1])
    adapted = adapt_vit(model, "linear").model
    assert adapted.blocks[0].attn.qkv.weight is adapted.blocks[1].attn.qkv.weight


def parametrised_biases(layer):
    layer.extra = nn.Parameter(torch.zeros(2))
    parametrize.register_parametrization(layer, "extra", nn.Identity())


def offloaded(layer):
    import accelerate

    accelerate.cpu_offload(layer.qkv, execution_device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda layer: layer.attn_drop.register_forward_hook(print),
            "its attn_drop has hooks or another forward, which would be lost",
        ),
        (parametrised_biases, "its parameters are parametrised, which would be lost"),
        (
            lambda layer: setattr(layer, "proj", nn.Sequential(layer.proj)),
            "its proj is Sequential, not a linear layer",
        ),
        (offloaded, "the weights of its qkv are offloaded; adapt the model first"),
    ],
)
def test_what_would_be_lost_is_refused(change, reason):
    model = built().train()
    change(model.blocks[1].attn)
    before = state(model)
    with pytest.raises(ValueError, match=reason):
        adapt_vit(model, layers=[1], inplace=True)
    assert state(model) == before


@pytest.mark.parametrize("at", ["inherit", "follow"])
def test_a_failure_leaves_the_model_as_it_was(monkeypatch, at):
    model = built().train()
    model.blocks[0].attn.qkv.eval()
    before, calls = state(model), []
    original = getattr(adapt_module, at)

    def failing(*args, **options):
        calls.append(args)
        if at == "inherit" and len(calls) == 1:
            return original(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(adapt_module, at, failing)
    with pytest.raises(KeyboardInterrupt):
        adapt_vit(model, inplace=True)
    assert calls
    assert state(model) == before
    assert all(type(block.attn) is Attention for block in model.blocks)


def test_modes_of_inherited_layers_stay():
    model = built().train()
    model.blocks[0].attn.proj.eval()
    layer = adapt_vit(model, inplace=True).model.blocks[0].attn
    assert (layer.training, layer.qkv.training, layer.proj.training) == (True, True, False)
