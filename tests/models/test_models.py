"""One suite over everything we register: timm's list of checks."""

import functools
import inspect

import pytest
import timm
import torch
from torch import nn

from cbsa_torch import CBSA, MSSA
from cbsa_torch.models import WhiteBoxTransformer, load_checkpoint, save_checkpoint
from cbsa_torch.models.counting import count_model
from cbsa_torch.models.registry import FAMILIES, model_name, names, sizes_of
from cbsa_torch.nn import LearnedRepresentatives, LinearStem, TokenMixer
from tests.helpers.compare import assert_close

NAMES = list(names())
PICO = [model_name(family, "pico") for family in FAMILIES if "pico" in sizes_of(family)]
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
PARAMETERS = {
    "cbt_tiny_patch16_224": 1_789_192,
    "cbt_small_patch16_224": 6_667_048,
    "cbt_base_patch16_224": 25_691_752,
    "cbt_large_patch16_224": 83_051_368,
    "crate_original_base_patch16_224": 22_796_008,
    "crate_original_large_patch16_224": 77_641_192,
    "crate_tiny_patch16_224": 1_789_120,
    "crate_small_patch16_224": 6_666_904,
    "tost_tiny_patch16_224": 1_789_156,
    "tost_small_patch16_224": 6_666_976,
    "crate_original_small_patch16_224": 13_116_328,
}
"""Of the paper's Table 3, and of the official code's own comparison models."""


def small(name, **kwargs):
    return timm.create_model(name, **{**SMALL, **kwargs})


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_of_the_official_models(name):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == PARAMETERS[name]


# Small, base and large have the images and patches of tiny, and here its width and depth.
@pytest.mark.parametrize(
    "name", [n for n in NAMES if not any(size in n for size in ("_small_", "_base_", "_large_"))]
)
def test_forward_backward_reaches_every_parameter(name):
    model = small(name)
    channels, height, width = model.pretrained_cfg["input_size"]
    assert channels == model.in_chans
    out = model(torch.randn(2, channels, height, width))
    assert out.shape == (2, 5)
    out.square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


def test_every_family_comes_in_every_size():
    assert len(NAMES) == len(set(NAMES)) == 7 * 8 + 4
    assert set(NAMES) <= set(timm.list_models())


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "crate_original"])
@pytest.mark.parametrize("size", [(160, 320), (100, 70), (17, 16)], ids=str)
def test_any_image_size_and_aspect(family, size):
    model = small(f"{family}_tiny_patch16_224").eval()
    x = torch.randn(1, 3, *size)
    grid = (-(-size[0] // 16), -(-size[1] // 16))
    learned = model.pos_embed[:, 1:].mT.reshape(1, 32, 14, 14)
    # transposed, as PyTorch 2.14 resizes wrongly to a width of 1
    turned = nn.functional.interpolate(learned.mT.contiguous(), grid[::-1], mode="bicubic", antialias=True)
    positions = turned.mT
    tokens = (model.stem(x) + positions).flatten(2).mT
    tokens = torch.cat([model.cls_token + model.pos_embed[:, :1], tokens], dim=1)
    for block in model.blocks:
        tokens = block(tokens, grid)
    tokens = model.norm(tokens)
    assert_close(model(x), model.head(tokens[:, 0]), 1e-5)
    (features,) = model.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    assert_close(features, tokens[:, 1:].mT.reshape(1, 32, *grid), 1e-5)


def test_set_input_size_is_what_happens_at_run_time():
    model = small("cbt_tiny_patch16_224").eval()
    x = torch.randn(1, 3, 96, 160)
    expected = model(x)
    model.pos_embed.requires_grad_(False)
    model.set_input_size((96, 160))
    assert not model.pos_embed.requires_grad  # it stays frozen
    assert model.pos_embed.shape == (1, 1 + 6 * 10, 32)
    assert_close(model(x), expected, 1e-5)
    model.set_input_size()
    with pytest.raises(ValueError, match="patch_size must stay 16"):
        model.set_input_size(patch_size=8)
    with pytest.raises(TypeError, match="img_size must be an int"):
        model.set_input_size((3.5, 2))


def test_gradient_checkpointing_changes_nothing():
    model = small("cbt_nano_patch4_32")
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_close(checkpointed, plain, 1e-5)


def test_classifier_and_pooling():
    model = small("cbt_nano_patch4_32")
    x = torch.randn(2, 3, 32, 32)
    assert model.get_classifier().out_features == 5
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 65, 32)
    assert model.num_features == model.head_hidden_size == 32
    tokens = model.forward_features(x)
    assert model.forward_head(tokens, pre_logits=True).shape == (2, 65, 32)
    with pytest.raises(ValueError, match="global_pool must be one of"):
        model.reset_classifier(3, "mean")
    with pytest.raises(ValueError, match="num_classes must be an int of at least 0, got -1"):
        model.reset_classifier(-1)


def test_intermediates():
    model = small("cbt_nano_patch4_32", depth=4).eval()
    x = torch.randn(2, 3, 32, 32)
    final, features = model.forward_intermediates(x, norm=True)
    assert len(features) == 4
    assert_close(model.forward_head(final), model(x), 1e-6)
    last = features[-1].flatten(2).transpose(1, 2)
    assert_close(last, final[:, 1:], 1e-6)
    early = model.forward_intermediates(x, [0, 1], stop_early=True, intermediates_only=True, output_fmt="NLC")
    assert [f.shape for f in early] == [(2, 64, 32)] * 2
    pairs = model.forward_intermediates(x, 1, return_prefix_tokens=True, intermediates_only=True)
    assert pairs[0][1].shape == (2, 1, 32)
    named = model.forward_intermediates(x, 1, return_prefix_tokens=True, output_dict=True)
    assert set(named) == {"image_intermediates", "image_intermediates_prefix", "image_features"}
    assert model.prune_intermediate_layers(1) == [3]
    with pytest.raises(ValueError, match="output_fmt must be one of 'NCHW', 'NLC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


def test_double_precision():
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    assert small("cbt_pico_patch1_8", dtype=torch.float64)(x).dtype == torch.float64


def test_features_only():
    model = timm.create_model("cbt_nano_patch4_32", features_only=True, out_indices=(1, 3))
    shapes = [f.shape for f in model(torch.randn(1, 3, 32, 48))]
    assert shapes == [(1, 128, 8, 12)] * 2
    assert model.feature_info.channels() == [128, 128]


def test_weight_decay_spares_steps_and_embeddings():
    model = small("cbt_nano_patch4_32")
    spared = model.no_weight_decay()
    steps = {f"blocks.{i}.attn.step_{kind}" for i in range(2) for kind in ("tokens", "representatives")}
    assert spared == {"pos_embed", "cls_token"} | steps
    assert spared <= {name for name, _ in model.named_parameters()}
    assert set(model.group_matcher()) == {"stem", "blocks"}


SET_BY_MODEL = {
    *("head_dim", "num_prefix_tokens", "grid_size", "channels_first"),
    *("attn_head_dim", "dim_out", "gated", "device", "dtype"),
}
VALUES = {"num_representatives": 9, "representatives": "tokens", "contraction": "exact", "form": "channel"}
VALUES |= {"eps": 0.5, "average": False, "solver": "eigh", "qkv": "separate", "layout": "official"}
VALUES |= {"impl": "reference", "tied": True, "orthogonal": True, "qkv_bias": True, "qk_norm": True}
VALUES |= {"scale_norm": True, "proj_bias": False, "attn_drop": 0.5, "proj_drop": 0.5, "recompute": True}
VALUES |= {"norm_layer": nn.LayerNorm, "step": "certified"}
NEEDED = {
    "eps": {"contraction": "exact", "form": "channel"},
    "average": {"form": "channel"},
    "tied": {"qkv": "shared"},
    "orthogonal": {"qkv": "shared"},
    "qk_norm": {"qkv": "separate", "norm_layer": nn.LayerNorm},
    "scale_norm": {"norm_layer": nn.LayerNorm},
}
"""What options need beside them, where a mixer has it."""


def keyword_only(cls):
    return {p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("family", ["cbt", "linear_cbt", "crate", "tost", "agent", "stem_vit"])
def test_every_option_of_every_mixer_is_one_of_its_models(family, monkeypatch):
    mixer = FAMILIES[family].mixer
    own, shared = (keyword_only(cls) for cls in (mixer, TokenMixer))
    options = own | shared - {"qkv"} - SET_BY_MODEL
    made, init = [], mixer.__init__

    @functools.wraps(init)
    def recorded(self, *args, **kwargs):
        made.append(kwargs)
        init(self, *args, **kwargs)

    monkeypatch.setattr(mixer, "__init__", recorded)
    for option in options:
        given = {option: VALUES[option]}
        given |= {name: value for name, value in NEEDED.get(option, {}).items() if name in options}
        made.clear()
        try:
            mixer(32, 2, **given)
        except (TypeError, ValueError):
            with pytest.raises((TypeError, ValueError)):
                small(f"{family}_pico_patch1_8", **given)
        else:
            small(f"{family}_pico_patch1_8", **given)
            assert len(made) == 3
            assert all(given.items() <= kwargs.items() for kwargs in made), option


def test_mixer_per_layer():
    class Silent(nn.Module):
        def __init__(self, dim, num_heads, **kwargs):
            super().__init__()

        def forward(self, x, grid_size=None, token_mask=None):
            return torch.zeros_like(x)

    model = WhiteBoxTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=2, mixer=[CBSA, Silent, CBSA]
    )
    assert [type(block.attn) for block in model.blocks] == [CBSA, Silent, CBSA]
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 2)
    with pytest.raises(ValueError, match="mixer must be one constructor or depth=3 of them, got 2"):
        WhiteBoxTransformer(depth=3, mixer=[CBSA, CBSA])


@pytest.mark.parametrize("name", PICO)
def test_compiles_in_one_graph_and_exports(name):
    model = small(name).eval()
    x = torch.randn(2, 1, 8, 8)
    expected = model(x)
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected, 1e-5)
    exported = torch.export.export(model, (x,))
    assert_close(exported.module()(x), expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", PICO)
def test_one_graph_serves_any_batch_in_training_and_fused(name):
    torch.compiler.reset()
    model = small(name)
    fused = timm.utils.reparameterize_model(small(name).eval())
    for module in (model, fused):
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch in (2, 3):
            x = torch.randn(batch, 1, 8, 8, requires_grad=True)
            out = compiled(x)
            assert_close(out, module(x), 1e-5)
            out.sum().backward()
            assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_classes": -1}, ValueError, "num_classes must be an int of at least 0"),
        ({"img_size": "a"}, TypeError, "img_size must be an int"),
        ({"img_size": (8, 8, 8)}, ValueError, "img_size must be an int or .height, width."),
        ({"mixer": 3}, TypeError, "mixer must be a constructor"),
        ({"depth": 0}, ValueError, "depth must be at least 1"),
        ({"num_heads": 3}, ValueError, "divisible by num_heads"),
    ],
)
def test_bad_options_are_named(options, kind, message):
    with pytest.raises(kind, match=message):
        WhiteBoxTransformer(**{"embed_dim": 32, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"step_size": 0.5},
        {"sparsity": 0.5},
        {"drop_rate": 0.9},
        {"pos_drop_rate": 0.9},
        {"global_pool": "avg"},
        {"head_dim": 4},
        {"residual": "norm"},
    ],
)
def test_every_model_option_has_its_effect(options):
    outputs = []
    for chosen in (options, {}):
        torch.manual_seed(2)
        model = WhiteBoxTransformer(
            img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3, **chosen
        )
        torch.manual_seed(3)
        outputs.append(model(torch.randn(2, 3, 16, 16)))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-5


@pytest.mark.parametrize("name", PICO)
def test_trains_under_autocast(name):
    model = small(name)
    x, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    losses, gradients = [], []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(nn.functional.cross_entropy(model(x), labels))
        losses[-1].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert_close(losses[1].detach(), losses[0].detach(), 2e-2)
    assert gradients[1].dtype == torch.float32
    assert nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


def test_small_models_have_few_representatives_and_agents_one_projection():
    plain = functools.partial(CBSA, num_representatives=3)
    assert small("cbt_nano_patch4_32", mixer=plain).blocks[0].attn.representatives.num_representatives == 3
    for family in ("cbt", "agent", "crate_cbt"):
        layer = small(f"{family}_nano_patch4_28").blocks[-1].attn
        assert layer.representatives.num_representatives == 16
        assert layer.shared_qkv
    assert not small("agent_pico_patch1_8", qkv="separate").blocks[0].attn.shared_qkv


@pytest.mark.parametrize("first", [0, 1, 3, 4, None])
def test_hybrids_split_where_asked(first):
    model = small("crate_cbt_pico_patch1_8", depth=4, num_first_layers=first, contraction="exact", tied=True)
    kinds = [type(block.attn) for block in model.blocks]
    split = 2 if first is None else first
    assert kinds == [MSSA] * split + [CBSA] * (4 - split)
    assert all(block.attn.tied for block in model.blocks)
    assert all(block.attn.contraction == "exact" for block in model.blocks[split:])


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("crate_cbt_pico_patch1_8", {"num_first_layers": 3}, ValueError, "from 0 to depth=2, got 3"),
        ("crate_cbt_pico_patch1_8", {"num_first_layers": True}, ValueError, "num_first_layers must be an int"),
        (
            "cbt_pico_patch1_8",
            {"num_first_layers": 1},
            TypeError,
            "num_first_layers must be left out: it splits a hybrid",
        ),
        ("crate_pico_patch1_8", {"contraction": "exact"}, TypeError, "'contraction': the mixer of this model"),
        ("crate_pico_patch1_8", {"num_representatives": 9}, TypeError, "'num_representatives': the mixer of"),
        ("stem_vit_pico_patch1_8", {"tied": True}, TypeError, "'tied': the mixer of this model has none"),
        ("crate_cbt_pico_patch1_8", {"solver": "eigh"}, TypeError, "'solver': the mixer of this model has"),
        ("stem_vit_pico_patch1_8", {"sparsity": 0.2}, ValueError, "which mlp_ratio replaces by an MLP"),
        ("stem_vit_pico_patch1_8", {"residual": "norm"}, ValueError, "which mlp_ratio replaces by an MLP"),
        ("crate_pico_patch1_8", {"step": "certified"}, TypeError, "'step': the mixer of this model has none"),
        ("cbt_pico_patch1_8", {"mixer": CBSA, "num_representatives": 4}, ValueError, "beside mixer"),
        ("cbt_pico_patch1_8", {"stem": "convolution"}, ValueError, "stem must be one of 'conv', 'linear'"),
        ("cbt_pico_patch1_8", {"mlp_ratio": 0.0}, ValueError, "mlp_ratio must be positive"),
        ("tost_pico_patch1_8", {"form": "channels"}, ValueError, "did you mean 'channel'"),
        ("cbt_nano_patch4_32", {"contracton": "exact"}, TypeError, "'contracton'; did you mean 'contraction'"),
        ("cbt_nano_patch4_32", {"mixer": CBSA, "tied": True}, ValueError, "tied cannot be given beside mixer"),
    ],
)
def test_options_of_other_families_are_refused(name, options, kind, message):
    with pytest.raises(kind, match=message):
        small(name, **options)


def test_the_original_crate_needs_whole_patches():
    model = small("crate_original_tiny_patch16_224").eval()
    assert isinstance(model.stem, LinearStem)
    assert model.pretrained_cfg["first_conv"] == ()  # nothing that timm could adapt to other channels
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5)
    with pytest.raises(ValueError, match="multiples of patch_size 16 for a linear stem, got 60 x 96"):
        model(torch.randn(1, 3, 60, 96))


def test_orthogonal_bases_reach_the_layers_and_do_not_decay():
    model = small("cbt_pico_patch1_8", orthogonal=True, tied=True)
    bases = model.blocks[0].attn.qkv.weight
    assert_close(bases @ bases.mT, torch.eye(32), 1e-5)
    assert "blocks.0.attn.qkv.parametrizations.weight.original" in model.no_weight_decay()
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("residual", ["input", "norm"])
def test_certified_models(residual, tmp_path):
    """Their options reach the layers and come back from a checkpoint; they train, and their costs are counted."""
    options = {"step": "certified", "residual": residual, "depth": 2}
    model = timm.create_model("cbt_pico_patch1_8", **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()
    for block in model.blocks:
        assert (block.residual, block.attn.step, block.attn.eps) == (residual, "certified", 24**0.5)
        rows = block.attn.qkv.weight.detach().double()
        assert_close(rows @ rows.T, torch.eye(96).double(), 1e-5)
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, model, {"model": "cbt_pico_patch1_8", "model_args": options})
    loaded, x = load_checkpoint(path)[0], torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(x), model.eval()(x))
    counted = count_model(model, (1, 8, 8)).layers
    free = count_model(
        timm.create_model("cbt_pico_patch1_8", tied=True, contraction="exact", depth=2), (1, 8, 8)
    )
    (one, other) = (next(c for c in rows if c.kind == "CBSA").counts for rows in (counted, free.layers))
    assert one.products - other.products == 4 * 2 * 2 * 65 * 16**2  # heads, two Gram matrices


def test_a_module_as_strategy_is_every_layers_own():
    strategy = LearnedRepresentatives(2, 5, 16)
    model = small("cbt_pico_patch1_8", representatives=strategy)
    owned = [block.attn.representatives for block in model.blocks]
    assert len({id(s) for s in [strategy, *owned]}) == 3
    assert model(torch.randn(1, 1, 8, 8)).shape == (1, 5)


def test_other_representatives_have_a_number_of_their_own():
    for kind in ("tokens", "basis", "learned"):
        assert small("cbt_pico_patch1_8", representatives=kind)(torch.randn(1, 1, 8, 8)).shape == (1, 5)
    with pytest.raises(ValueError, match="num_representatives is of"):
        small("cbt_pico_patch1_8", representatives="basis", num_representatives=4)


def test_models_cite_what_they_implement():
    papers = {name: timm.create_model(name, device="meta").pretrained_cfg["paper_ids"] for name in PICO}
    assert papers["cbt_pico_patch1_8"] == papers["crate_cbt_pico_patch1_8"] == "arXiv:2509.16875"
    assert papers["crate_pico_patch1_8"] == "arXiv:2306.01129"
    assert len(set(papers.values())) == 5
