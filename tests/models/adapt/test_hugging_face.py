"""Vision Transformers of transformers with random weights, adapted."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    MobileViTConfig,
    MobileViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from cbsa_torch import adapt_vit, interpret
from cbsa_torch.models.counting import count_model
from tests.helpers.compare import assert_close

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
MLP = {**SIZES, "intermediate_size": 64}
MODELS = {
    "vit": lambda: ViTModel(ViTConfig(**SIZES, intermediate_size=64)),
    "vit classifier": lambda: ViTForImageClassification(ViTConfig(**SIZES, intermediate_size=64)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "dinov2 registers": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(**SIZES, num_register_tokens=4)
    ),
    "deit": lambda: DeiTModel(DeiTConfig(**MLP)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**MLP)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**MLP)),
}
PREFIX = {"dinov2 registers": 5, "deit": 2, "siglip": 0}
each_model = pytest.mark.parametrize("name", MODELS)


def built(name):
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def output(model, image, **options):
    return model(image, **options)[0]


@pytest.mark.parametrize("mixer", ["adapted_cbsa", "agent", "linear"])
@each_model
def test_forward_backward_reload_and_any_size(name, mixer):
    model, image = built(name), torch.randn(2, 3, 32, 32)
    original = output(model, image)
    adapted, report = adapt_vit(model, mixer)
    assert len(report.adapted) == 2
    assert torch.equal(output(model, image), original)
    out = output(adapted, image)
    assert out.shape == original.shape
    assert not torch.equal(out, original)
    out.square().sum().backward()
    for layer in report.adapted:
        for part in layer.inherited:
            if "k_proj.bias" not in part or mixer == "linear":  # softmax does not see it
                assert adapted.get_parameter(f"{layer.name}.{part}").grad.abs().sum() > 0
    assert model.state_dict().keys() <= adapted.state_dict().keys()
    again = adapt_vit(built(name), mixer).model
    torch.nn.init.zeros_(again.get_parameter(f"{report.adapted[0].name}.v_proj.weight"))
    again.load_state_dict(adapted.state_dict())
    assert torch.equal(output(again, image), out)
    options = {} if "dinov2" in name else {"interpolate_pos_encoding": True}
    prefix = PREFIX.get(name, 1)
    with interpret.capture(adapted) as records:
        output(adapted, torch.randn(1, 3, 16, 64), **options)
    assert all((r.grid_size, r.num_prefix_tokens) == ((2, 8), prefix) for r in records.values())


@each_model
@torch.no_grad()
def test_queries_keys_and_values_are_those_of_the_original(name):
    model, called = built(name), {}
    adapted, report = adapt_vit(model, "linear")
    source, layer = (either.get_submodule(report.adapted[-1].name) for either in (model, adapted))
    source.register_forward_hook(
        lambda _, args, given, out: called.update(x=(*args, *given.values())[0], out=out[0]), with_kwargs=True
    )
    output(model, torch.randn(2, 3, 32, 32))
    heads = layer.heads(called["x"])
    mixed = torch.nn.functional.scaled_dot_product_attention(heads.queries, heads.keys, heads.values)
    torch.testing.assert_close(layer.proj(mixed.transpose(1, 2).flatten(2)), called["out"])


@torch.no_grad()
def test_exported_masks_are_checked_when_the_program_runs():
    model = adapt_vit(built("vit"), num_representatives=4).model
    image, mask = torch.randn(2, 3, 32, 32), torch.ones(2, 17, dtype=torch.int64)
    program = torch.export.export(model, (image,), {"attention_mask": mask}).module()
    mask[:, 9:] = 0
    assert_close(program(image, attention_mask=mask)[0], output(model, image, attention_mask=mask), 1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mixer", ["adapted_cbsa", "agent", "linear"])
@torch.no_grad()
def test_masks_are_honoured(mixer, implementation):
    model = built("vit")
    model.set_attn_implementation(implementation)
    adapted, image = adapt_vit(model, mixer).model, torch.randn(1, 3, 32, 32)
    other = image.clone()
    other[..., 16:, :] = 5.0
    mask = torch.ones(1, 17, dtype=torch.int64)
    mask[:, 9:] = 0
    for either in (model, adapted):
        first, second = (output(either, x, attention_mask=mask)[:, :9] for x in (image, other))
        torch.testing.assert_close(first, second)


def test_masks_of_queries_are_refused():
    model, report = adapt_vit(built("vit"), "linear")
    layer, x = model.get_submodule(report.adapted[0].name), torch.randn(1, 5, 32)
    with pytest.raises(ValueError, match="attention_mask must be the same for every query"):
        layer(x, torch.ones(5, 5, dtype=torch.bool).tril()[None, None])
    with pytest.raises(ValueError, match=r"attention_mask must keep keys \(0\) or hide them"):
        layer(x, torch.full((1, 1, 5, 5), -1.0))


@each_model
def test_counted_and_looked_into(name):
    model = built(name)
    for either in (model, adapt_vit(model, num_representatives=4).model):
        counts = count_model(either, (3, 32, 32))
        # The pooling head of SigLIP is not counted.
        assert name == "siglip" or counts.total.counts.products == counts.torch_flops
    with interpret.capture(either) as records, torch.no_grad():
        either(torch.randn(1, 3, 32, 32))
    assert len(records) == 2
    if name != "siglip":  # it has no class token
        assert interpret.cls_attention_maps(next(iter(records.values()))).shape == (1, 2, 4, 4)


def test_layers_with_hooks_and_mixers_of_one_projection_are_refused():
    model = built("vit")
    with pytest.raises(ValueError, match="'mssa' has one projection"):
        adapt_vit(model, "mssa")
    layer = model.get_submodule(adapt_vit(model).report.adapted[0].name)
    layer.register_forward_hook(lambda *_: None)
    (refused,) = adapt_vit(model).report.refused
    assert "it has hooks" in refused.reason


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
def test_adapters_act_in_the_adapted_model():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = peft.get_peft_model(built("vit"), config)
    merged = copy.deepcopy(model).merge_and_unload()
    image = torch.randn(1, 3, 32, 32)
    expected = output(adapt_vit(merged, "linear").model, image)
    torch.testing.assert_close(output(adapt_vit(model, "linear").model, image), expected)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_takes_the_same_grid(reentrant):
    """It recomputes the forward of a layer, without the layer's hooks."""
    model = adapt_vit(built("vit")).model
    images = [torch.randn(1, 3, *size) for size in ((32, 32), (16, 64), (64, 16))]  # 16 patches each
    single = [copy.deepcopy(model) for _ in images]  # each sees one image
    for each, image in zip(single, images, strict=True):
        output(each, image, interpolate_pos_encoding=True).square().sum().backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    sum(output(model, image, interpolate_pos_encoding=True).square().sum() for image in images).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected = sum(each.get_parameter(name).grad for each in single)
            assert_close(parameter.grad, expected, 1e-4)


@torch.no_grad()
def test_threads():
    model = adapt_vit(built("vit")).model
    images = [torch.randn(1, 3, *size) for size in ((32, 32), (16, 64), (64, 16))]
    expected = [output(copy.deepcopy(model), image, interpolate_pos_encoding=True) for image in images]

    @torch.no_grad()
    def one(i):
        return output(model, images[i % 3], interpolate_pos_encoding=True)

    with ThreadPoolExecutor(4) as pool:
        for i, got in enumerate(pool.map(one, range(30))):
            assert_close(got, expected[i % 3], 1e-5)


@pytest.mark.parametrize("mixer", ["adapted_cbsa", "agent", "linear"])
def test_mobilevit_takes_the_grid_of_each_feature_map(mixer):
    config = MobileViTConfig(
        hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
        num_attention_heads=2,
        mlp_ratio=1.0,
    )
    torch.manual_seed(0)
    model = MobileViTModel(config).eval()
    adapted, report = adapt_vit(model, mixer, **({} if mixer == "linear" else {"num_representatives": 400}))
    assert len(report.adapted) == 9
    assert not report.refused
    image = torch.randn(1, 3, 96, 160)  # maps of 12 x 20, 6 x 10 and 3 x 5, in patches of 2 x 2
    with interpret.capture(adapted) as records:
        out = output(adapted, image)
    out.square().sum().backward()
    assert out.shape == output(model, image).shape
    grids = [record.grid_size for record in records.values()]
    assert mixer == "linear" or sorted(set(grids)) == [(2, 3), (3, 5), (6, 10)]
    layer = adapted.get_submodule(report.adapted[0].name)
    source, x = model.get_submodule(report.adapted[0].name), torch.randn(2, 60, 16)
    heads = layer.heads(x, (6, 10))
    mixed = torch.nn.functional.scaled_dot_product_attention(heads.queries, heads.keys, heads.values)
    torch.testing.assert_close(layer.proj(mixed.transpose(1, 2).flatten(2)), source(x))
    assert adapted.state_dict().keys() >= model.state_dict().keys()


def test_text_towers_and_causal_calls_are_refused():
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = CLIPModel(CLIPConfig(text_config={**text, "vocab_size": 9}, vision_config=MLP, projection_dim=8))
    _, report = adapt_vit(model, "linear")
    assert [layer.name for layer in report.refused] == ["text_model.encoder.layers.0.self_attn"]
    assert "it is in no part of the model that sees images" in report.refused[0].reason
    with pytest.raises(ValueError, match="it is in no part of the model that sees images"):
        adapt_vit(CLIPTextModel(CLIPTextConfig(**text, vocab_size=9)), "linear")
    layer = adapt_vit(built("clip"), "linear").model.encoder.layers[0].self_attn
    with pytest.raises(ValueError, match="is_causal must be False"):
        layer(hidden_states=torch.randn(1, 5, 32), is_causal=True)
