"""ViTs of timm with random weights, adapted: everything that worked goes on working."""

import copy

import pytest
import timm
import torch

from cbsa_torch import adapt_vit
from cbsa_torch.models.counting import count_model
from cbsa_torch.nn import TokenMixer

# name: (patch size, further arguments)
ARCHITECTURES = {
    "vit_tiny_patch16_224": (16, {"qk_norm": True, "scale_attn_norm": True}),
    "deit_tiny_patch16_224": (16, {}),
    "deit_tiny_distilled_patch16_224": (16, {}),
    "deit3_small_patch16_224": (16, {}),
    "vit_small_patch14_dinov2": (14, {}),  # LayerScale
    "vit_small_patch14_reg4_dinov2": (14, {}),  # registers
    "vit_small_patch16_dinov3": (16, {}),  # registers, rotary
    "vit_small_plus_patch16_dinov3": (16, {}),  # SwiGLU
    "eva02_tiny_patch14_224": (14, {}),  # rotary, biases without keys'
    "eva02_base_patch14_224": (14, {}),  # projections of their own
    "eva_giant_patch14_224": (14, {}),  # absolute positions
    "vit_pe_core_tiny_patch16_384": (16, {}),  # rotary, attention pooling
    "vit_small_patch16_rope_mixed_224": (16, {}),  # a rotation for every layer and head
    "vit_base_patch16_sapiens2": (16, {"num_kv_heads": 1}),  # keys and values shared by heads
    "vit_base_patch16_clip_224": (16, {}),  # norm before the layers
    "vit_base_patch16_siglip_224": (16, {}),  # attention pooling, no class token
    "vit_so150m_patch16_reg4_map_256": (16, {}),  # the same with registers
    "vit_medium_patch16_gap_256": (16, {}),  # average pooling, no class token
    "vit_small_patch16_18x2_224": (16, {}),  # two attentions side by side
    "vit_tiny_r_s16_p8_224": (32, {}),  # ResNet before the patches
    "flexivit_small": (16, {}),
}
MIXERS = ("adapted_cbsa", "agent", "linear")
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def created(name, **options):
    patch, own = ARCHITECTURES[name]
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": 2, "num_classes": 3, "img_size": 4 * patch}
    model = timm.create_model(name, **{**sizes, "dynamic_img_size": True, **own, **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # as if trained: no LayerScale of 1e-5, no zeros
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


def image(name, rows=4, columns=4, batch=2):
    patch = ARCHITECTURES[name][0]
    return torch.randn(batch, 3, rows * patch, columns * patch, generator=torch.Generator().manual_seed(2))


def output(model, x):
    out = model(x)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("mixer", MIXERS)
@each_architecture
def test_forward_backward_reload_and_any_size(name, mixer):
    model = created(name)
    adapted, report = adapt_vit(model, mixer, **({} if mixer == "linear" else {"num_representatives": 4}))
    assert len(report.adapted) == (4 if "x2" in name else 2)
    assert not report.refused
    x = image(name)
    original, out = output(model, x), output(adapted, x)
    assert out.shape == original.shape
    assert not torch.equal(out, original)
    adapted.train()
    output(adapted, x).square().sum().backward()
    used = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    ours = {n for n, _ in adapted.named_parameters()} - {n for n, _ in model.named_parameters()}
    inherited = {f"{layer.name}.{part}" for layer in report.adapted for part in layer.inherited}
    assert ours | inherited <= used
    adapted.eval()

    state = adapted.state_dict()
    assert model.state_dict().keys() <= state.keys()
    assert state.keys() - model.state_dict().keys() == ours
    again = adapt_vit(created(name), mixer, **report.options).model
    torch.nn.init.zeros_(next(p for n, p in again.named_parameters() if n.endswith("proj.weight")))
    again.load_state_dict(state)
    assert torch.equal(output(again, x), out)

    for rows, columns in ((2, 8), (8, 2), (3, 5)):
        other = image(name, rows, columns)
        assert output(adapted, other).shape == out.shape
    features = adapted.forward_intermediates(image(name, 2, 8), intermediates_only=True)
    assert features[-1].shape[2:] == (2, 8)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "x2" not in name])
@torch.no_grad()
def test_queries_keys_and_values_are_those_of_the_original(name):
    """Softmax attention of the adapted layer's heads is the original layer."""
    model = created(name)
    adapted = adapt_vit(model, "linear").model
    source, layer = (either.blocks[-1].attn for either in (model, adapted))
    called = {}

    def record(_, args, kwargs, out):
        called.update(x=args[0], rope=kwargs.get("rope"), out=out)

    source.register_forward_hook(record, with_kwargs=True)
    output(model, image(name))
    heads = layer.heads(called["x"], rope=called["rope"])
    mixed = torch.nn.functional.scaled_dot_product_attention(heads.queries, heads.keys, heads.values)
    torch.testing.assert_close(layer.proj(layer.norm(mixed.transpose(1, 2).flatten(2))), called["out"])


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "_r_" not in name])  # convolutions mix
def test_masks_are_honoured(name, mixer):
    adapted = adapt_vit(created(name), mixer).model
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:, 3] = False  # the last column of patches is padding
    prefix = adapted.num_prefix_tokens
    real = torch.cat([torch.ones(prefix, dtype=torch.bool), mask.flatten()])
    x, other = image(name, batch=1), image(name, batch=1)
    side = ARCHITECTURES[name][0]
    other[..., 3 * side :] = 5.0
    first, second = (adapted.forward_features(i, attn_mask=real.expand(1, 1, 1, -1)) for i in (x, other))
    torch.testing.assert_close(first[:, real], second[:, real])
    assert not torch.allclose(first[:, ~real], second[:, ~real])


@each_architecture
def test_other_layers_are_untouched(name):
    model = created(name)
    before = copy.deepcopy(model.state_dict())
    outputs = []
    adapted, report = adapt_vit(model, layers=[-1])
    assert len(report.adapted) == 1
    for either in (model, adapted):
        either.blocks[0].register_forward_hook(lambda _, __, out: outputs.append(out))
        output(either, image(name))
    assert "x2" in name or torch.equal(*outputs)
    state = adapted.state_dict()
    for key, tensor in before.items():
        assert torch.equal(tensor, state[key]), key
        assert torch.equal(tensor, model.state_dict()[key]), key
    kinds = {k: type(m) for k, m in model.named_modules() if not k.startswith(report.adapted[0].name)}
    assert all(type(adapted.get_submodule(k)) is kind for k, kind in kinds.items())
    assert not any(isinstance(m, TokenMixer) for m in model.modules())


@pytest.mark.parametrize("mixer", [None, *MIXERS])
@each_architecture
def test_counting_agrees_with_torch(name, mixer):
    model = created(name) if mixer is None else adapt_vit(created(name), mixer).model
    counts = count_model(model, tuple(image(name).shape[1:]))
    pools = [m for n, m in model.named_modules() if n == "attn_pool"]
    if not pools:  # timm's pooling heads are not counted
        assert counts.total.counts.products == counts.torch_flops
    assert counts.total.parameters == sum(p.numel() for p in model.parameters())
