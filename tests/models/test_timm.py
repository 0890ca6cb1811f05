"""Our models under the conditions of timm's own test suite, which its wheel does not contain.

Those conditions: names and configurations (first convolution, classifier, channels, sizes), refused arguments,
groups for layer decay, what needs no weight decay, heads reset on device, dtype and mode, shapes with and without
head and pooling, gradients of all parameters, recomputation, features by getter, hook and FX, intermediates, FX
forward and backward, TorchScript of models and of FX graphs, tracing, fusion, saving after changes, loading for
other sizes and channels. ``slow`` repeats what is cheap enough for every registered model.
"""

import copy
import fnmatch
import io
import math

import pytest
import timm
import torch
from timm.layers import get_channel_dim
from timm.models import (
    FeatureInfo,
    create_feature_extractor,
    get_graph_node_names,
    get_notrace_functions,
    get_notrace_modules,
    load_checkpoint,
    resume_checkpoint,
)
from timm.models._hub import save_for_hf
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import AttentionExtract, CheckpointSaver, ModelEmaV3, reparameterize_model
from torch import nn
from torchvision.models import feature_extraction

from cbsa_torch.models.registry import FAMILIES, model_name, names, sizes_of
from cbsa_torch.nn import CBSA, MHSA, MSSA, TSSA, AgentAttention, LinearCBSA, TokenMixer
from tests.helpers.compare import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")

SMALLEST = [model_name(family, "pico" if "pico" in sizes_of(family) else "tiny") for family in FAMILIES]
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}

each_family = pytest.mark.parametrize("name", SMALLEST)
each_model = pytest.mark.parametrize(
    "name", [*SMALLEST, *(pytest.param(n, marks=pytest.mark.slow) for n in names() if n not in SMALLEST)]
)


def small(name, **options):
    return timm.create_model(name, **{**SMALL, **options})


def images(model, batch=2, height=8, width=8):
    """A batch of so many patches."""
    patch = model.feature_info[0]["reduction"]
    return torch.randn(batch, model.in_chans, patch * height, patch * width)


def gradients(model, x):
    model.zero_grad()
    out = model(x)
    out = out if isinstance(out, torch.Tensor) else next(iter(out.values()))
    out.square().sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@each_model
def test_configuration_and_surface(name):
    with torch.device("meta"):
        model = timm.create_model(name, device="meta", dtype=torch.float32).eval()
        with pytest.raises(TypeError):
            timm.create_model(name, device="meta", not_a_model_arg=1)
    config = model.default_cfg
    assert timm.is_model(name)
    assert timm.list_models(f"{name[:-1]}?") == [name]
    assert config is model.pretrained_cfg
    assert config["architecture"] == name
    assert model.in_chans == config["input_size"][0] == len(config["mean"]) == len(config["std"])
    assert model.num_classes == config["num_classes"] > 0
    assert not config["fixed_input_size"]
    weights = model.state_dict()
    first = config["first_conv"]
    for layer in (first,) if isinstance(first, str) else first:
        assert weights[f"{layer}.weight"].shape[1] == model.in_chans
    assert weights[f"{config['classifier']}.weight"].shape[0] == model.num_classes
    assert model.get_classifier() is model.get_submodule(config["classifier"])

    parameters = [parameter for parameter, _ in model.named_parameters()]
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(groups) == set(parameters)
        assert len(set(groups.values())) > 2
    assert all(fnmatch.filter(parameters, spared) for spared in model.no_weight_decay())

    x = torch.randn(1, *config["input_size"], device="meta")
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape[-1] == model.num_features
    assert pooled.shape == (1, model.head_hidden_size)
    assert model(x).shape == (1, model.num_classes)
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert model(x).shape == pooled.shape
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    bare = timm.create_model(name, num_classes=0, global_pool="", device="meta", dtype=torch.float32).eval()
    assert bare(x).shape == features.shape

    model.to(dtype=torch.float64)
    model.reset_classifier(2)
    head = model.get_classifier()
    assert (head.weight.dtype, head.weight.device.type) == (torch.float64, "meta")
    assert not any(module.training for module in model.modules())


@each_model
def test_features_by_getter_hook_and_fx(name):
    x = images(small(name), height=5, width=7)
    found = {}
    for kind in ("getter", "hook", "fx"):
        torch.manual_seed(3)
        model = small(name, features_only=True, feature_cls=kind, out_indices=(0, 2)).eval()
        found[kind] = model(x)
        assert len(found[kind]) == len(model.feature_info.channels()) == 2
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    for i, (channel, reduction) in enumerate(zip(channels, reductions, strict=True)):
        maps, hooked, traced = (found[kind][i] for kind in ("getter", "hook", "fx"))
        assert maps.shape[get_channel_dim("NCHW")] == channel
        assert maps.shape[2:] == tuple(math.ceil(side / reduction) for side in x.shape[2:])
        assert torch.equal(hooked, traced)
        assert_close(maps.flatten(2).mT, traced[:, 1:], 1e-6)
    assert len(small(name, features_only=True).feature_info.channels()) == 3


@each_family
def test_intermediates_and_recomputation(name):
    model = small(name).eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    x = images(model, height=5, width=7)
    expected = model.forward_features(x)
    model.train(False)
    for recomputes in (False, True):
        model.set_grad_checkpointing(recomputes)
        final, features = model.forward_intermediates(x)
        assert_close(final, expected, 1e-6)
        assert [f.shape for f in features] == [(2, channels, 5, 7) for channels in info.channels()]
    plain, recomputed = copy.deepcopy(model).train(), model.train()
    plain.set_grad_checkpointing(False)
    (out, once), (again, twice) = (gradients(m, x) for m in (plain, recomputed))
    assert_close(again, out, 1e-6)
    for parameter, gradient in once.items():
        assert_close(twice[parameter], gradient, 1e-5)


@each_model
def test_fx_forward_and_backward(name):
    model = small(name)
    x = images(model, height=4, width=6)
    given = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    for kwargs in ({}, {"tracer_kwargs": {**given, "param_shapes_constant": True}}):
        train_nodes, eval_nodes = feature_extraction.get_graph_node_names(model, **kwargs)
        assert train_nodes == eval_nodes
        assert {"stem", "blocks.0.attn", "blocks.2.norm2", "head"} <= set(eval_nodes)
        graph = feature_extraction.create_feature_extractor(model, [eval_nodes[-1]], **kwargs)
    for training in (False, True):
        plain = copy.deepcopy(model).train(training)
        traced = copy.deepcopy(graph).train(training)
        for images_ in (x, images(model, height=7, width=3)):  # a graph holds for every size
            (out, expected), (same, found) = gradients(plain, images_), gradients(traced, images_)
            assert_close(same, out, 1e-6)
            assert set(found) == set(expected)
            for parameter, gradient in expected.items():
                assert_close(found[parameter], gradient, 1e-5)


@pytest.mark.filterwarnings("ignore:The TorchScript type system")  # of any graph of FX
@each_model
def test_torchscript_at_any_size(name):
    model = small(name, global_pool="avg").eval()
    with torch.no_grad():
        graph = create_feature_extractor(model, get_graph_node_names(model)[1][-1:])
        scripts = torch.jit.script(model), torch.jit.script(graph)
        stored = io.BytesIO()
        torch.jit.save(scripts[0], stored)
        stored.seek(0)
        scripts = (torch.jit.load(stored), scripts[1])
        for height, width in ((4, 4), (3, 7), (9, 2)):
            x = images(model, height=height, width=width)
            expected = model(x)
            assert_close(scripts[0](x), expected, 1e-5)
            (out,) = scripts[1](x).values()
            assert_close(out, expected, 1e-5)
    assert all(isinstance(block.attn, TokenMixer) for block in model.blocks)  # the model is what it was


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@each_family
def test_traced_in_both_modes_and_channels_last(name):
    model = small(name)
    x = images(model, height=4, width=6)
    for training in (False, True):
        model.train(training)
        traced = torch.jit.trace(copy.deepcopy(model), (x,))
        other = images(model, batch=3, height=4, width=6)
        assert_close(traced(other), model(other), 1e-5)
    model.eval()
    expected = model(x)
    model.to(memory_format=torch.channels_last)
    assert_close(model(x.to(memory_format=torch.channels_last)), expected, 1e-5)


@each_family
def test_attention_extract_takes_layers_by_name(name):
    model = small(name).eval()
    x = images(model)
    outputs = []
    handles = [b.attn.register_forward_hook(lambda m, args, out: outputs.append(out)) for b in model.blocks]
    model(x)
    for handle in handles:
        handle.remove()
    for method in ("fx", "hook"):
        found = AttentionExtract(model, ["*.attn"], method=method)(x)
        assert list(found) == [f"blocks.{i}.attn" for i in range(3)]
        assert all(torch.equal(a, b) for a, b in zip(found.values(), outputs, strict=True))
        with pytest.raises(RuntimeError, match="No (node|module) names found"):
            AttentionExtract(model, method=method)  # there are no modules that hold N x N matrices


@each_family
def test_layer_decay(name):
    model = small(name)
    spared = model.no_weight_decay()
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=spared, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = dict(model.named_parameters())
    assert set(scales) == {id(p) for p in named.values()}
    matrix = "attn.qkv.weight"
    found = [
        scales[id(named[n])] for n in ("cls_token", *(f"blocks.{i}.{matrix}" for i in range(3)), "head.weight")
    ]
    assert found == [0.5**k for k in (4, 3, 2, 1, 0)]
    for parameter_name, parameter in named.items():
        keeps = parameter_name in spared or parameter.ndim < 2
        assert decays[id(parameter)] == (0.0 if keeps else 0.05), parameter_name


@each_family
def test_fused_models_in_torchscript_and_fx(name):
    model = small(name).eval()
    fused = reparameterize_model(model)
    x = images(model, height=5, width=7)
    with torch.no_grad():
        expected = model(x)
        assert_close(fused(x), expected, 1e-5)
        assert_close(torch.jit.script(fused)(x), expected, 1e-5)
        graph = reparameterize_model(create_feature_extractor(model, ["head", "blocks.1"]).eval())
        assert_close(graph(x)["head"], expected, 1e-5)
    assert isinstance(graph.get_submodule("blocks.0.attn"), TokenMixer)
    with pytest.raises(RuntimeError, match="is fused for inference and cannot be trained"):
        create_feature_extractor(fused, ["head"])  # which makes a graph for training, too: fuse it afterwards
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.stem.modules()) == (
        "original" not in name
    )


@each_family
def test_arguments_of_create_model(name):
    options = {"img_size": (24, 40), "patch_size": 8, "in_chans": 5, "num_classes": 0}
    model = small(name, global_pool="avg", drop_path_rate=0.2, **options)
    assert model.grid_size == (3, 5)
    assert [block.drop_path.rate for block in model.blocks] == [0.0, 0.1, 0.2]
    x = torch.randn(2, 5, 24, 40)
    model.eval()
    assert_close(model(x), model.forward_features(x)[:, model.num_prefix_tokens :].mean(1), 1e-5)
    token = small(name, global_pool="token", **options).eval()
    token.load_state_dict(model.state_dict())
    assert_close(token(x), model.forward_features(x)[:, 0], 1e-5)


def test_rates_of_stochastic_depth():
    for rate in (1.0, -0.1, True):
        with pytest.raises(ValueError, match="drop_path_rate must be at least 0 and below 1"):
            small("cbt_pico_patch1_8", drop_path_rate=rate)


@pytest.mark.parametrize("name", ["cbt_nano_patch4_32", "crate_original_tiny_patch16_224"])
def test_saved_by_timm_after_changes_and_loaded_for_other_images(name, tmp_path):
    model = small(name, num_classes=11).eval()
    patch = model.stem.patch_size
    size = (6 * patch, 10 * patch)
    model.set_input_size(size)
    model.reset_classifier(7, "avg")
    save_for_hf(model, tmp_path)
    x = images(model, height=6, width=10)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.grid_size == (6, 10)
    assert torch.equal(again(x), model(x))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(8 * patch, 8 * patch)).eval()
    model.set_input_size((8 * patch, 8 * patch))
    assert torch.equal(other.pos_embed, model.pos_embed)
    assert torch.equal(other(x), again(x)) is False  # resampled twice for these
    if name.startswith("cbt"):
        grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1).eval()
        pixels = x[:, :1]
        assert_close(grey(pixels), again(pixels.expand(-1, 3, -1, -1)), 1e-5)
    else:
        with pytest.raises(RuntimeError, match="size mismatch for stem.norm1.weight"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)


VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3, "dynamic_img_size": True, "img_size": 64}
LAYERS = {
    "CBSA": CBSA.with_options(num_representatives=4),
    "AgentAttention": AgentAttention.with_options(num_representatives=4),
    **{mixer.__name__: mixer for mixer in (LinearCBSA, MSSA, MHSA, TSSA)},
}
ADAPTED = ("adapted_cbsa", "agent", "linear")
each_vit = pytest.mark.parametrize("layer", [*LAYERS, *ADAPTED])


def vit(layer, **options):
    """A ViT of timm with our layers: built in, or adapted."""
    if layer in LAYERS:
        return timm.create_model("vit_tiny_patch16_224", attn_layer=LAYERS[layer], **VIT, **options).eval()
    return timm.create_model(
        "adapted_vit", base="vit_tiny_patch16_224", mixer=layer, base_args=VIT, **options
    ).eval()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@each_vit
def test_vits_of_timm_with_our_layers_in_fx_traced_and_extracted(layer):
    model = vit(layer, num_classes=5)
    graph = create_feature_extractor(model, ["head"])
    for size in ((32, 128), (128, 32), (64, 64)):
        x = torch.randn(2, 3, *size)
        (out, expected), (same, found) = gradients(model, x), gradients(graph, x)
        assert_close(same, out, 1e-6)
        assert all(torch.allclose(found[name], gradient, 1e-4, 1e-4) for name, gradient in expected.items())
    with torch.no_grad():
        x = torch.randn(2, 3, 32, 128)
        for traced in (torch.jit.trace(graph, (x,), strict=False), torch.jit.trace(model, (x,))):
            out = traced(x)
            assert_close(out["head"] if isinstance(out, dict) else out, model(x), 1e-6)
            with pytest.raises(RuntimeError, match="split_with_sizes expects"):
                traced(x.mT)
        updates = []
        for block in model.blocks:
            block.attn.register_forward_hook(lambda module, args, out: updates.append(out))
        model(x)
        expected = tuple(updates)
        for method in ("fx", "hook"):
            found = AttentionExtract(model, ["*.attn"], method=method)(x)
            assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))
    if model.blocks[0].attn.needs_grid:
        with pytest.raises(ValueError, match="FX must trace the whole model"):
            torch.fx.symbolic_trace(model.blocks)


@each_vit
@torch.no_grad()
def test_features_of_vits_of_timm_with_our_layers(layer):
    x, found = torch.randn(2, 3, 32, 128), {}
    for kind in ("getter", "hook", "fx"):
        torch.manual_seed(3)
        found[kind] = vit(layer, features_only=True, feature_cls=kind, out_indices=(0, 1))(x)
    torch.manual_seed(3)
    plain = vit(layer).forward_intermediates(x, intermediates_only=True)
    for maps, hooked, traced, expected in zip(*found.values(), plain, strict=True):
        assert torch.equal(maps, expected)
        assert maps.shape[2:] == (2, 8)
        assert torch.equal(hooked, traced)
        assert_close(maps.flatten(2).mT, traced[:, 1:], 1e-6)


def test_models_without_features_say_so():
    for kind in ("getter", "hook", "fx"):
        for name, options, message in (
            ("segmenter", {"encoder": "cbt_nano_patch4_32"}, "gives masks; features are its encoder's"),
            ("token_set_cbt_tiny", {"in_dim": 8}, "gives one vector for each set"),
        ):
            with pytest.raises(ValueError, match=f"features_only must be False: {name} {message}"):
                timm.create_model(name, features_only=True, feature_cls=kind, **options)


@torch.no_grad()
def test_attention_extract_of_a_segmenter():
    model = timm.create_model(
        "segmenter", encoder="cbt_nano_patch4_32", encoder_args={"depth": 1}, depth=1
    ).eval()
    x, updates = torch.randn(1, 3, 32, 48), []
    for layer in (model.encoder.blocks[0].attn, model.decoder.layers[0].attn):
        layer.register_forward_hook(lambda module, args, out: updates.append(out))
    model(x)
    expected = tuple(updates)
    found = AttentionExtract(model, ["*.attn"], method="hook")(x)
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))
    with pytest.raises(TypeError, match="torch.fx cannot trace what looks at sizes"):
        AttentionExtract(model, ["*.attn"], method="fx")


def test_layers_that_learn_their_grid_from_hooks_are_refused_by_torchscript():
    for layer in ("CBSA", *ADAPTED):
        with pytest.raises(
            TypeError, match="torch.jit.script cannot compile .*it is told where tokens are by hooks"
        ):
            torch.jit.script(vit(layer))


@pytest.mark.parametrize("name", ["adapted_vit", "segmenter"])
def test_averaged_saved_and_resumed_by_timm(name, tmp_path):
    """Others train in examples/timm_training.py and test_timm_script.py."""

    def start():
        if name == "adapted_vit":
            model, target = vit("adapted_cbsa", num_classes=5), torch.zeros(2, 5)
        else:
            model = timm.create_model(
                name, encoder="cbt_nano_patch4_32", encoder_args={"depth": 1}, num_classes=3
            )
            target = torch.zeros(2, 3, 64, 64)
        optimizer = create_optimizer_v2(model, "adamw", lr=1e-2, weight_decay=0.05)
        return model.train(), optimizer, ModelEmaV3(model, decay=0.5), target

    def step(model, optimizer, ema, target):
        optimizer.zero_grad()
        (model(x) - target).square().mean().backward()
        optimizer.step()
        ema.update(model)

    x = torch.randn(2, 3, 64, 64)
    model, optimizer, ema, target = start()
    saver = CheckpointSaver(model, optimizer, model_ema=ema, checkpoint_dir=tmp_path)
    step(model, optimizer, ema, target)
    saver.save_checkpoint(0, metric=1.0)
    again, its_optimizer, its_ema, _ = start()
    assert resume_checkpoint(again, tmp_path / "last.pth.tar", its_optimizer) == 1
    load_checkpoint(its_ema.module, tmp_path / "last.pth.tar", use_ema=True)
    step(model, optimizer, ema, target)
    step(again, its_optimizer, its_ema, target)
    for left, right in ((model, again), (ema.module, its_ema.module)):
        assert torch.equal(left(x), right(x))


def test_what_fx_and_torchscript_cannot_take_is_refused_by_name():
    segmenter = timm.create_model("segmenter", encoder="cbt_nano_patch4_32", num_classes=3)
    for model in (segmenter, timm.create_model("token_set_cbt_tiny", in_dim=8)):
        with pytest.raises(TypeError, match=f"torch.jit.script cannot compile {type(model).__name__}: "):
            torch.jit.script(model)
        with pytest.raises(
            TypeError, match=r"must be a torch.Tensor, got Proxy; torch.fx cannot trace what looks"
        ):
            torch.fx.symbolic_trace(model)
    for options, reason in (
        ({"step": "certified"}, "no parametrisations such as orthogonal=True"),
        ({"representatives": "basis"}, "representatives must be 'pool' or 'learned'"),
    ):
        with pytest.raises(TypeError, match=f"torch.jit.script cannot compile CBSA: .*{reason}"):
            torch.jit.script(small("cbt_pico_patch1_8", **options))
