"""adapt_vit: parity with the authors' code, where adapted models start, reports, options, refusals."""

import copy
import json

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn

import cbsa_torch.models  # noqa: F401  (registers our models)
from cbsa_torch import AgentAttention, adapt_vit, interpret
from tests.helpers import golden
from tests.helpers.compare import assert_close

IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))


def vit(name="vit_tiny_patch16_224", **options):
    sizes = {"embed_dim": 32, "num_heads": 2, "depth": 4, "num_classes": 3, "img_size": 64}
    return timm.create_model(name, **{**sizes, **options}).eval()


class Tower(nn.Module):
    """The least that adapt_vit takes: a patch embedding, and attention."""

    def __init__(self, attn):
        super().__init__()
        self.patch_embed, self.attn, self.num_prefix_tokens = nn.Identity(), attn, 1
        self.patch_embed.grid_size = (12, 12)

    def forward(self, x):
        return self.attn(x)


def test_the_authors_adapted_attention():
    data, about = golden.load("vit_adapted_attention")
    attn = Attention(**about["constructor"]).double()
    attn.load_state_dict({k.removeprefix("param."): v for k, v in data.items() if k.startswith("param.")})
    model = adapt_vit(Tower(attn), "agent", layout="official").model
    assert type(model.attn) is AgentAttention
    x = data["input"].clone().requires_grad_()
    out = model(x)
    out.backward(data["grad_output"])
    assert_close(out, data["output"], 1e-10)
    assert_close(x.grad, data["grad_input"], 1e-10)
    for name, parameter in model.attn.named_parameters():
        assert_close(parameter.grad, data[f"grad.{name}"], 1e-10)


# --- where adapted models start ---


def peaked(sharpness):
    """A layer that attends to nearby tokens, as trained ones do: queries and keys are positions."""
    torch.manual_seed(0)
    attn = Attention(32, 2).double()
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 12)] * 2, indexing="ij"), -1).reshape(1, 144, 2)
    waves = torch.cat([f(grid.double() * k) for k in (1.5, 3.0, 4.5, 6.0) for f in (torch.sin, torch.cos)], -1)
    x = torch.cat([waves, torch.randn(1, 144, 16).double()], -1)
    with torch.no_grad():
        attn.qkv.weight.zero_()
        for part in (0, 1):  # each head: the waves as queries and keys
            for head in (0, 1):
                rows = slice(32 * part + 16 * head, 32 * part + 16 * head + 16)
                attn.qkv.weight[rows, :16] = torch.eye(16) * sharpness
        attn.qkv.weight[64:, 16:] = torch.randn(32, 16) / 4
    return attn, torch.cat([torch.zeros(1, 1, 32).double(), x], 1)


def distance(mixer, sharpness=2.0, **options):
    """Between the outputs of the adapted layer and of the original, over how much that varies by token."""
    attn, x = peaked(sharpness)
    model = Tower(attn)
    adapted = adapt_vit(model, mixer, **options).model
    adapted.attn.set_input_size((12, 12), 1)
    expected = model(x)[:, 1:]
    varies = (expected - expected.mean(1, keepdim=True)).norm()
    return ((adapted(x)[:, 1:] - expected).norm() / varies).item()


def test_contraction_costs_closeness_and_starts_at_none():
    agent, full = distance("agent"), distance("adapted_cbsa", contraction_step=1.0)
    assert distance("adapted_cbsa") == pytest.approx(agent, abs=1e-9)
    assert agent < distance("adapted_cbsa", contraction_step=0.5) < full < 1


@pytest.mark.parametrize("contraction", ["softmax", "none"])
def test_a_fresh_broadcast_starts_closer_than_the_shared_one(contraction):
    shared = distance("adapted_cbsa", contraction=contraction, broadcast="shared")
    assert distance("adapted_cbsa", contraction=contraction) < shared


def test_with_a_representative_for_every_token_sharp_attention_is_softmax_attention():
    agent = [distance("agent", num_representatives=m) for m in (4, 36, 144)]
    assert agent == sorted(agent, reverse=True)
    for mixer in ("adapted_cbsa", "agent"):
        assert distance(mixer, 6.0, num_representatives=144) < 1e-2


# --- what it returns ---


def test_a_copy_or_the_model_itself():
    model = vit()
    first = model.blocks[0].attn.qkv.weight
    copied = adapt_vit(model).model
    assert copied is not model
    assert isinstance(model.blocks[0].attn, Attention)
    changed = adapt_vit(model, inplace=True).model
    assert changed is model
    assert model.blocks[0].attn.qkv.weight is first  # an optimiser that has it keeps it
    assert torch.equal(model(IMAGE), copied(IMAGE))


def test_reports_say_what_happened():
    model = vit(reg_tokens=1, global_pool="map", attn_drop_rate=0.1, qk_norm=True)
    _, report = adapt_vit(model, layers=[1, -1], num_representatives=4, contraction_step=0.5)
    assert [layer.name for layer in report.adapted] == ["blocks.1.attn", "blocks.3.attn"]
    assert report.refused == ()
    layer = report.adapted[0]
    assert (layer.before, layer.after) == ("Attention", "AdaptedCBSA")
    assert {"qkv.weight", "qkv.bias", "q_norm.weight", "k_norm.bias", "proj.weight"} <= set(layer.inherited)
    assert layer.new == ("step_tokens = 1", "step_contraction = 0.5")
    assert layer.dropped == ("attention dropout of 0.1",)
    text = str(report)
    assert "2 of 5 attention layers are now 'adapted_cbsa', num_representatives=4, contraction_step=0.5" in text
    assert "blocks.0.attn  Attention left: not asked for" in text
    fixed = adapt_vit(model, "agent", num_representatives=(2, 3))
    assert fixed.model.blocks[0].attn.representatives.num_representatives == (2, 3)
    assert "are now 'agent', num_representatives=(2, 3)" in str(fixed.report)
    assert "AttentionPoolLatent left: attention pooling of a head" in text
    assert json.loads(json.dumps(report.to_dict()))["layers"][1]["after"] == "AdaptedCBSA"


@pytest.mark.parametrize(
    ("layers", "names"), [("all", "0123"), ("latter_half", "23"), ([0], "0"), ((-1, 1), "13")]
)
def test_chosen_layers(layers, names):
    report = adapt_vit(vit(), layers=layers).report
    assert [layer.name for layer in report.adapted] == [f"blocks.{i}.attn" for i in names]


@pytest.mark.parametrize("mixer", ["linear_cbsa", "mssa", "tssa"])
def test_one_projection_inherits_the_values(mixer):
    model = vit(attn_drop_rate=0.1)
    adapted, report = adapt_vit(model, mixer)
    assert torch.equal(adapted.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight[64:])
    assert "qkv.weight (values)" in report.adapted[0].inherited
    assert "queries and keys of qkv" in report.adapted[0].dropped
    assert (adapted.blocks[0].attn.attn_drop == 0.1) == (mixer == "mssa")
    adapted(IMAGE).sum().backward()
    assert adapted.blocks[0].attn.qkv.weight.grad is not None


def test_frozen_weights_stay_frozen_and_dtypes_stay():
    model = vit().to(torch.bfloat16).requires_grad_(False).train()
    adapted = adapt_vit(model).model
    new = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert new == {f"blocks.{i}.attn.{step}" for i in range(4) for step in ("step_tokens", "step_contraction")}
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}
    assert all(block.attn.training for block in adapted.blocks)


def test_adapted_layers_compile_train_and_can_be_looked_into():
    adapted = adapt_vit(vit("eva02_base_patch14_224", img_size=56, depth=1), num_representatives=4).model
    image = torch.randn(1, 3, 56, 56)
    compiled = torch.compile(adapted, backend="eager", fullgraph=True)
    assert_close(compiled(image), adapted(image), 1e-5)
    with interpret.capture(adapted) as records, torch.no_grad():
        adapted(image)
    record = records["blocks.0.attn"]
    assert interpret.cls_attention_maps(record).shape == (1, 2, 4, 4)
    assert interpret.subspace_coherence(adapted)["blocks.0.attn"].shape == (2, 2)
    heads = adapted.blocks[0].attn.heads(torch.randn(1, 17, 32), rope=adapted.rope.get_embed())
    assert heads.keys.shape == record.keys.shape


@pytest.mark.parametrize("mixer", ["adapted_cbsa", "agent", "linear"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_low_precision_and_export(name, mixer):
    size = 56 if "14" in name else 64
    model = adapt_vit(vit(name, img_size=size, depth=1, qk_norm=name.startswith("vit")), mixer).model
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected = model(image)
        assert_close(torch.export.export(model, (image,)).module()(image), expected, 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(model(image).float(), expected, 5e-2)
        assert_close(model.to(torch.bfloat16)(image.to(torch.bfloat16)).float(), expected, 5e-2)


def test_models_without_values():
    with torch.device("meta"):
        adapted = adapt_vit(vit("eva02_base_patch14_224", img_size=56), "adapted_cbsa").model
    assert all(parameter.is_meta for parameter in adapted.parameters())
    assert adapted(torch.empty(1, 3, 56, 56, device="meta")).shape == (1, 3)


def test_models_around_a_vit():
    class Clip(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.text = vit(dynamic_img_size=True), nn.Linear(4, 3)

        def forward(self, image):
            return self.visual(image) + self.text(torch.zeros(4))

    adapted, report = adapt_vit(Clip())
    assert report.adapted[0].name == "visual.blocks.0.attn"
    assert adapted(torch.randn(1, 3, 32, 128)).shape == (1, 3)
    segmenter = timm.create_model(
        "segmenter", encoder="vit_tiny_patch16_224", img_size=64, num_classes=3, encoder_args={"depth": 1}
    )
    adapted, report = adapt_vit(segmenter, layers=[0])
    assert [layer.name for layer in report.adapted] == ["encoder.blocks.0.attn"]


@pytest.mark.parametrize("mixer", ["adapted_cbsa", "agent", "linear", "mssa"])
def test_mobilevit_takes_the_grid_of_each_feature_map(mixer):
    torch.manual_seed(0)
    pools = mixer in ("adapted_cbsa", "agent")
    model = timm.create_model("mobilevit_xxs", num_classes=3).eval()
    adapted, report = adapt_vit(model, mixer, **({"num_representatives": 4} if pools else {}))
    assert (len(report.adapted), report.refused) == (9, ())
    alone, called = copy.deepcopy(adapted), {}
    for layer in report.adapted:
        adapted.get_submodule(layer.name).register_forward_hook(
            lambda _, args, out, name=layer.name: called.update({name: (args[0], out)})
        )
    out = adapted(torch.randn(2, 3, 96, 160))  # maps of 12 x 20, 6 x 10 and 3 x 5, in patches of 2 x 2
    grids = {"stages.2": (6, 10), "stages.3": (3, 5), "stages.4": (2, 3)}
    for name, (x, found) in called.items():
        assert_close(found, alone.get_submodule(name)(x, grid_size=grids[name[:8]]), 1e-6)
    out.square().sum().backward()
    assert adapted.get_parameter(f"{report.adapted[0].name}.qkv.weight").grad.abs().sum() > 0


def test_twice_is_two_halves():
    half = adapt_vit(vit(), layers=[0, 1]).model
    both, report = adapt_vit(half, "linear", layers="all")
    assert [layer.name for layer in report.refused] == ["blocks.0.attn", "blocks.1.attn"]
    assert "it is AdaptedCBSA of cbsa_torch already" in str(report)
    assert both(IMAGE).shape == (2, 3)


# --- refusals ---


REFUSED = [
    ("resnet18", {}, "no attention layers: ResNet; adapt_vit takes the self-attention of timm's ViTs"),
    ("swin_tiny_patch4_window7_224", {}, r"layers.0.blocks.0.attn and 11 more \(it attends within windows"),
    ("beit_base_patch16_224", {"depth": 1}, "its bias by relative position needs all pairs of tokens"),
    ("vit_relpos_small_patch16_224", {"depth": 1}, "its bias by relative position needs all pairs of tokens"),
    ("vit_pwee_patch16_reg1_gap_256", {"depth": 1}, "one layer projects queries, keys, values and the MLP"),
    ("vit_dwee_patch16_reg1_gap_256", {"depth": 1}, "it is the difference of two softmaxes"),
    ("xcit_nano_12_p16_224", {}, "ClassAttentionBlock is not the standard attention"),
    ("cbt_pico_patch1_8", {}, "it is CBSA of cbsa_torch already"),
    ("crossvit_9_240", {}, r"pools over a grid.*; blocks.0.fusion.0 and 5 more \(CrossAttentionBlock is not"),
    ("pit_ti_224", {}, "pools over a grid, which no patch_embed tells here"),
]


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_models_that_cannot_be_adapted_say_why(name, options, message):
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        adapt_vit(model, inplace=True)
    assert [type(m) for m in model.modules()] == kinds


def test_layers_that_cannot_be_adapted_say_why():
    class Own(Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(x) * 2

    model = vit()
    model.blocks[0].attn = Own(32, 2)
    model.blocks[1].attn = Attention(32, 2, gated=True)
    model.blocks[2].attn.register_forward_hook(lambda *_: None)
    report = adapt_vit(model).report
    reasons = [layer.reason for layer in report.refused]
    assert "forward of its own" in reasons[0]
    assert "output gate" in reasons[1]
    assert "it has hooks" in reasons[2]
    scaled = vit()
    scaled.blocks[1].attn.scale = 1.0
    assert "scaled by 1, not by" in adapt_vit(scaled).report.refused[0].reason
    with pytest.raises(ValueError, match="blocks.0.attn .it has a forward of its own"):
        adapt_vit(model, layers=[0, 3])
    with pytest.raises(ValueError, match="'mssa' has one projection"):
        adapt_vit(vit("eva02_tiny_patch14_224", img_size=56), "mssa")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mixer": "adapted_cbsaa"}, ValueError, "mixer must be one of .*; did you mean 'adapted_cbsa'"),
        ({"layers": "last_half"}, ValueError, "layers must be 'all', .*; did you mean 'latter_half'"),
        ({"layers": [4]}, ValueError, "layers must hold indices from -4 to 3, .*has 4 attention layers; got 4"),
        ({"layers": [3, -1]}, ValueError, "layers must not name a layer twice"),
        ({"layers": []}, ValueError, "layers must not be empty"),
        ({"layers": [True]}, TypeError, "layers must hold ints, got True"),
        ({"layers": 3}, TypeError, "layers must be 'all', 'latter_half' or a sequence"),
        ({"num_representatives": 0}, ValueError, "num_representatives must be at least 1, got 0"),
        ({"mixer": "linear", "num_representatives": 4}, ValueError, "of mixer='adapted_cbsa', 'agent': leave"),
        ({"mixer": "agent", "contraction": "exact"}, ValueError, "contraction is .* of mixer='adapted_cbsa'"),
        ({"contraction": "none", "contraction_step": 1.0}, ValueError, "contraction_step is of a contraction"),
        ({"mixer": "agent", "broadcast": "shared"}, ValueError, "broadcast is .* of mixer='adapted_cbsa'"),
        ({"contraction_step": float("nan")}, ValueError, "contraction_step must be finite"),
        ({"inplace": 1}, TypeError, "inplace must be True or False"),
    ],
)
def test_bad_options_are_named_and_change_nothing(options, error, message):
    model = vit()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        adapt_vit(model, **{"inplace": True, **options})
    assert all(isinstance(block.attn, Attention) for block in model.blocks)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_a_name_is_no_model():
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        adapt_vit("vit_tiny_patch16_224")
