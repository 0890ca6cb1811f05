"""nn.MultiheadAttention adapted: torchvision's ViT, OpenCLIP's towers, encoders of PyTorch and DETR."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor

from cbsa_torch import adapt_vit, interpret
from cbsa_torch.models import export_model
from cbsa_torch.models.counting import count_model
from tests.helpers.compare import assert_close
from tests.helpers.exports import open_program

each_mixer = pytest.mark.parametrize("mixer", ["adapted_cbsa", "agent", "linear"])
IMAGE = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))


class ClipTower(nn.Module):
    """A vision tower as OpenCLIP builds it: ``conv1``, ``class_embedding``, blocks with ``nn.MultiheadAttention``."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(32))
        layer = {"dim_feedforward": 64, "dropout": 0.0, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, batch_first=batch_first, **layer) for _ in range(2)
        )
        self.batch_first = batch_first

    def forward(self, images):
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = x if self.batch_first else x.transpose(0, 1)
        for block in self.blocks:
            x = block(x)
        return x if self.batch_first else x.transpose(0, 1)


class DetrLayer(nn.Module):
    """An encoder layer of DETR: positions are added to queries and keys only."""

    def __init__(self):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(32, 2)

    def forward(self, x, positions, padding=None):
        q = k = x + positions
        return x + self.self_attn(q, k, value=x, key_padding_mask=padding)[0]


class Detr(nn.Module):
    """As DETR: a 1 x 1 convolution projects the features, an encoder sees them, a decoder asks it."""

    def __init__(self):
        super().__init__()
        self.backbone, self.input_proj = nn.Sequential(nn.Conv2d(3, 8, 3, 8)), nn.Conv2d(8, 32, 1)
        self.encoder, self.queries = DetrLayer(), nn.Parameter(torch.randn(5, 1, 32))
        self.decoder = nn.TransformerDecoderLayer(32, 2, 64, dropout=0.0)
        self.positions = nn.Parameter(torch.randn(32, 1, 32))

    def encode(self, images, padding=None):
        x = self.input_proj(self.backbone(images)).flatten(2).permute(2, 0, 1)  # (N, B, C)
        return self.encoder(x, self.positions, padding)

    def forward(self, images):
        memory = self.encode(images)
        return self.decoder(self.queries.expand(-1, memory.shape[1], -1), memory)


def tower():
    model = VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model


MODELS = {
    "torchvision": (tower, IMAGE[..., :32], (4, 4), 1),
    "clip": (ClipTower, IMAGE, (4, 8), 1),
    "clip, sequence first": (lambda: ClipTower(batch_first=False), IMAGE, (4, 8), 1),
    "detr": (Detr, IMAGE, (4, 8), 0),
}


@each_mixer
@pytest.mark.parametrize("name", MODELS)
def test_forward_backward_grid_and_state(name, mixer):
    build, images, grid, prefix = MODELS[name]
    torch.manual_seed(0)
    model = build().eval()
    adapted, report = adapt_vit(model, mixer)
    with interpret.capture(adapted) as records:
        out = adapted(images)
    assert mixer == "linear" or {(r.grid_size, r.num_prefix_tokens) for r in records.values()} == {
        (grid, prefix)
    }
    assert out.shape == model(images).shape
    assert not torch.allclose(out, model(images))
    out.square().sum().backward()
    for layer in report.adapted:
        assert adapted.get_parameter(f"{layer.name}.in_proj_weight").grad.abs().sum() > 0
    assert model.state_dict().keys() <= adapted.state_dict().keys()
    counts = count_model(adapted, tuple(images.shape[1:]))
    assert name == "detr" or counts.total.counts.products == counts.torch_flops  # its decoder is not counted
    torch.testing.assert_close(copy.deepcopy(adapted)(images), out)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_queries_keys_and_values_are_those_of_the_original(bias, batch_first):
    model = Detr()
    model.encoder.self_attn = nn.MultiheadAttention(32, 2, bias=bias, batch_first=batch_first)
    source, layer = model.encoder.self_attn, adapt_vit(model, "linear").model.encoder.self_attn
    q, k, v = torch.randn(3, 2, 7, 32)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    args = (q, k, v) if batch_first else tuple(t.transpose(0, 1) for t in (q, k, v))
    heads = layer.heads(*args, key_padding_mask=padding)
    keys = heads.source.token_mask[:, None, None]
    mixed = nn.functional.scaled_dot_product_attention(heads.queries, heads.keys, heads.values, attn_mask=keys)
    expected = source(*args, key_padding_mask=padding)[0]
    expected = expected if batch_first else expected.transpose(0, 1)
    torch.testing.assert_close(layer.proj(mixed.transpose(1, 2).flatten(2))[~padding], expected[~padding])


@pytest.mark.filterwarnings("ignore:`torch.jit", "ignore::torch.jit.TracerWarning")
@each_mixer
def test_graphs_of_fx_and_traced(mixer):
    model = adapt_vit(tower(), mixer).model.eval()
    if mixer != "linear":  # FX calls no hooks of a convolution
        with pytest.raises(ValueError, match=r"FX must trace the whole model.* or tell the layer its grid"):
            create_feature_extractor(model, ["heads"])
        for layer in model.encoder.layers:
            layer.self_attention.set_input_size((4, 4))
    graph = create_feature_extractor(model, ["heads"])
    images = torch.randn(3, 3, 32, 32)
    out, expected = graph(images)["heads"], model(images)
    assert_close(out, expected, 1e-6)
    weight = model.encoder.layers[0].self_attention.in_proj_weight
    first, second = (torch.autograd.grad(y.square().sum(), weight)[0] for y in (out, expected))
    assert_close(first, second, 1e-5)
    assert_close(torch.jit.trace(model, (images[:2],))(images), expected, 1e-6)
    with pytest.raises(TypeError, match="it is told where tokens are by hooks"):
        torch.jit.script(model)


@each_mixer
@torch.no_grad()
def test_compiled_exported_and_offloaded(mixer, tmp_path):
    import accelerate

    torch.compiler.reset()
    model = adapt_vit(tower().eval(), mixer).model
    images = torch.randn(3, 3, 32, 32)
    expected = model(images)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(compiled(images), expected, 1e-5)
    file = tmp_path / "model.pt2"
    export_model(model, file, "torch", in_chans=3, image_size=32)
    assert_close(open_program(file)(images), expected, 1e-5)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert_close(model(images), expected, 1e-6)


@each_mixer
@torch.no_grad()
def test_padding_is_honoured(mixer):
    torch.manual_seed(0)
    model = adapt_vit(Detr().eval(), mixer, **({} if mixer == "linear" else {"num_representatives": 8})).model
    padding = torch.zeros(1, 4, 8, dtype=torch.bool)
    padding[..., 5:] = True
    other = IMAGE[:1].clone()
    other[..., 40:] = 7.0
    kept = ~padding.flatten()
    first, second = (model.encode(images, padding.flatten(1))[kept] for images in (IMAGE[:1], other))
    torch.testing.assert_close(first, second)
    assert not torch.allclose(model.encode(other)[kept], first)


@torch.no_grad()
def test_the_fast_path_and_nested_tensors_of_pytorch_do_not_pass_the_mixer_by():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)}).eval()
    adapted, report = adapt_vit(model, "linear")
    assert [layer.name for layer in report.adapted] == [
        "encoder.layers.0.self_attn",
        "encoder.layers.1.self_attn",
    ]
    x, padding = torch.randn(2, 7, 32), torch.arange(7) >= torch.tensor([[7], [4]])
    out = adapted["encoder"](x, src_key_padding_mask=padding)
    assert_close(out[1, :4], adapted["encoder"](x[1:, :4])[0], 1e-5)
    assert not torch.allclose(out[0], model["encoder"](x)[0], atol=1e-3)
    with torch.enable_grad():  # never on the fast path
        assert_close(
            adapted["encoder"](x.requires_grad_(), src_key_padding_mask=padding)[~padding], out[~padding], 1e-5
        )


@each_mixer
def test_adapters_of_peft_act_and_merge(mixer):
    """On the output projection of adapted layers, and on the whole of the original ones, as peft takes them."""
    import peft

    def lora(model, target):
        config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        return peft.get_peft_model(copy.deepcopy(model), config).eval()

    images, model = IMAGE[..., :32], tower().eval()
    adapted = adapt_vit(model, mixer).model
    wrapped = lora(adapted, "out_proj")
    out = wrapped(images)
    assert not torch.allclose(out, adapted(images), atol=1e-2)
    assert_close(copy.deepcopy(wrapped).merge_and_unload()(images), out, 1e-5)

    original = lora(model, "self_attention")
    later, report = adapt_vit(original, mixer)
    assert (len(report.adapted), report.refused) == (2, ())
    merged = copy.deepcopy(original).merge_and_unload()  # no layer of ours is in it
    assert_close(merged(images), original(images), 1e-5)
    expected = adapt_vit(merged, mixer).model(images)
    assert_close(later(images), expected, 1e-5)
    assert_close(copy.deepcopy(later).merge_and_unload()(images), expected, 1e-5)


def test_refusals():
    _, report = adapt_vit(Detr(), "linear")
    refused = {layer.name: layer.reason for layer in report.refused}
    assert refused.keys() == {"decoder.self_attn", "decoder.multihead_attn"}
    assert "a decoder, whose queries are no patches" in refused["decoder.self_attn"]
    with pytest.raises(ValueError, match="'mssa' has one projection"):
        adapt_vit(tower(), "mssa")
    with pytest.raises(ValueError, match="'agent' pools over a grid, which no patch_embed tells"):
        adapt_vit(nn.Sequential(nn.TransformerEncoderLayer(8, 2)), "agent")
    for options, reason in (
        ({"kdim": 4}, "cross-attention"),
        ({"add_bias_kv": True}, "keys that are no tokens"),
    ):
        with pytest.raises(ValueError, match=reason):
            adapt_vit(nn.Sequential(nn.MultiheadAttention(8, 2, **options)), "linear")
    layer, x = adapt_vit(Detr(), "linear").model.encoder.self_attn, torch.randn(6, 2, 32)
    with pytest.raises(ValueError, match="cross-attention stays nn.MultiheadAttention"):
        layer(x, x[:3], x[:3])
    with pytest.raises(ValueError, match="attn_mask must be None"):
        layer(x, x, x, attn_mask=torch.zeros(6, 6))
    with pytest.raises(ValueError, match="is_causal must be False"):
        layer(x, x, x, is_causal=True)


@torch.no_grad()
def test_adapters_of_the_output_act_and_those_around_the_layer_are_refused():
    """peft's adapter of the whole layer merges its weights and calls it, which a mixer in its place is not for."""
    import peft

    def adapter(model, targets):
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()

    original, images = tower().eval(), IMAGE[..., :32]
    with pytest.raises(ValueError, match=r"it is an adapter \(peft.*merge it first"):
        adapt_vit(adapter(copy.deepcopy(original), ["self_attention"]), "linear")
    model = adapter(adapt_vit(original, "linear").model, ["out_proj"])
    out = model(images)
    assert not torch.allclose(out, adapt_vit(original, "linear").model(images))
    assert_close(model.merge_and_unload()(images), out, 1e-5)
