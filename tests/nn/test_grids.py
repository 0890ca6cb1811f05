"""Layers in timm's models know the grid of every image without being told."""

import copy
import gc
import io
import itertools
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from operator import setitem

import pytest
import timm
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from cbsa_torch import CBSA, MSSA, TSSA, AgentAttention, LinearCBSA
from cbsa_torch.nn import follow_grid, grid_hook, install_grid_hook, remove_grid_hook
from tests.helpers.compare import assert_close

SQUARE, WIDE, TALL = (torch.randn(1, 3, *size) for size in ((64, 64), (32, 128), (128, 32)))  # 16 patches each
IMAGES = SQUARE, WIDE, TALL


def vit(mixer=CBSA, name="vit_tiny_patch16_224", **options):
    args = {"depth": 2, "num_classes": 3, "embed_dim": 24, "num_heads": 2, "img_size": 64}
    return timm.create_model(name, attn_layer=mixer, **{**args, **options}).eval()


def flexible(**options):
    return vit(AgentAttention, dynamic_img_size=True, **options)


def told(model, image):
    """The output of a copy whose layers were given the grid."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "grid_follower"):
            module.grid_follower = None
            grid = (image.shape[2] // 16, image.shape[3] // 16)
            module.set_input_size(grid, num_prefix_tokens=model.num_prefix_tokens)
    return model(image)


def embedded(model, image):
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(image))))


def encoded(model, tokens):
    return model.forward_head(model.norm(model.blocks(tokens)))


def in_threads(call, number=30):
    """``call`` with each of the images in turn, from four threads: the outputs."""

    @torch.no_grad()
    def one(i):
        return call(IMAGES[i % 3])

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(one, range(number)))


def assert_right(outputs, model):
    expected = [told(model, image).detach() for image in IMAGES]
    assert not torch.allclose(expected[1], expected[2])
    for i, output in enumerate(outputs):
        assert_close(output, expected[i % 3], 1e-5)


@pytest.mark.parametrize("mixer", [CBSA, AgentAttention])
@torch.no_grad()
def test_images_of_any_shape(mixer):
    model = vit(mixer, dynamic_img_size=True, reg_tokens=4)
    assert_right([model(image) for image in IMAGES], model)
    assert not any("grid" in name for name in model.state_dict())


@pytest.mark.parametrize("mixer", [CBSA, AgentAttention, MSSA, TSSA, LinearCBSA])
@torch.no_grad()
def test_the_default_size_and_every_way_through_a_model(mixer):
    model = timm.create_model("vit_small_patch16_224", attn_layer=mixer, depth=1, num_classes=3).eval()
    image = torch.randn(1, 3, 224, 224)
    assert_close(model(image), told(model, image), 1e-6)
    model = vit(mixer, dynamic_img_size=True, dynamic_img_pad=True, reg_tokens=2)
    features, (last,) = model.forward_intermediates(torch.randn(1, 3, 33, 90), indices=[1], norm=True)
    assert features.shape == (1, 3 + 18, 24)
    assert_close(last, features[:, 3:].mT.unflatten(2, (3, 6)), 1e-6)
    for image in IMAGES:
        expected = told(model, image)
        assert_close(model.forward_head(model.forward_features(image)), expected, 1e-6)
        assert_close(model.forward_head(model.forward_intermediates(image)[0]), expected, 1e-6)


@torch.no_grad()
def test_feature_extractors():
    options = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 64, "dynamic_img_size": True}
    extractor = timm.create_model(
        "vit_tiny_patch16_224", attn_layer=AgentAttention, features_only=True, out_indices=[0, 1], **options
    ).eval()
    single = [copy.deepcopy(extractor)(image) for image in IMAGES]  # each copy sees one image
    for image, expected in zip(IMAGES, single, strict=True):
        for got, want in zip(extractor(image), expected, strict=True):
            assert_close(got, want, 1e-6)


def test_a_rectangle_with_a_square_number_of_patches_is_a_rectangle():
    model = vit(AgentAttention, img_size=(32, 128))
    x = torch.randn(1, 17, 24)
    assert model.blocks[0].attn.token_grid(x) == ((2, 8), 1)  # before any image was seen
    assert_close(model(WIDE), told(model, WIDE), 1e-6)
    assert model.blocks[0].attn.token_grid(x) == ((2, 8), 1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    ],
)
@torch.no_grad()
def test_models_with_other_prefix_tokens(name, options):
    model = vit(AgentAttention, name, img_size=(32, 128), **options)
    assert_close(model(WIDE), told(model, WIDE), 1e-6)


@torch.no_grad()
def test_hybrids_and_resized_models():
    model, image = vit(name="vit_tiny_r_s16_p8_224", img_size=(64, 192)), torch.randn(1, 3, 64, 192)
    alike = copy.deepcopy(model)
    for block in alike.blocks:
        block.attn.set_input_size(model.patch_embed.grid_size, 1)
    assert_close(model(image), alike(image), 1e-6)
    model = vit()
    model.set_input_size(img_size=(32, 128), patch_size=(16, 16))
    assert_close(model(WIDE), told(model, WIDE), 1e-6)


@torch.no_grad()
def test_copies_have_grids_of_their_own():
    model = flexible()
    model(WIDE)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert other.blocks[0].attn.grid_follower.source is not model.blocks[0].attn.grid_follower.source
        assert_right([other(image) for image in IMAGES], model)


# --- several images at once ---


def test_threads():
    model = flexible()
    assert_right(in_threads(model), model)
    assert_right(in_threads(lambda image: model.forward_head(model.forward_features(image))), model)


def test_replicas_in_threads():
    """As nn.DataParallel makes them: shallow copies that share their hooks."""

    def replica(module):
        shallow = module._replicate_for_data_parallel()
        shallow._parameters = dict(module._parameters)
        for name, child in module._modules.items():
            shallow._modules[name] = replica(child)
        return shallow

    model = flexible()
    assert_right(in_threads(replica(model)), model)


COMPILED = {
    "whole": lambda model: torch.compile(model, backend="eager", fullgraph=True),
    "dynamic": lambda model: torch.compile(model, backend="eager", fullgraph=True, dynamic=True),
    "children": lambda model: [child.compile(backend="eager") for child in (model.patch_embed, *model.blocks)],
    "broken in a block": lambda model: broken(model, model.blocks[0].norm1),
    "blocks": lambda model: [block.compile(backend="eager") for block in model.blocks],
    "broken before blocks": lambda model: broken(model, model.pos_drop),
    "broken after attention": lambda model: broken(model, model.blocks[0].mlp),
}
SELDOM = ("blocks", "broken before blocks", "broken after attention")
"""Compiled in ways that the others go through, too."""


def broken(model, module):
    module.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.slow if how in SELDOM else ()) for how in COMPILED]
)
def test_compiled_models_in_threads(how):
    torch._dynamo.reset()
    model = flexible(depth=1 if how in ("whole", "dynamic") else 2)
    expected = copy.deepcopy(model)
    compiled = COMPILED[how](model)
    compiled = model if isinstance(compiled, list) else compiled
    with torch.no_grad():
        assert_right([compiled(image) for image in IMAGES], expected)
        assert_right([model(image) for image in IMAGES], expected)  # eager in between
    assert_right(in_threads(compiled, 12), expected)


@pytest.mark.parametrize("mixer", [AgentAttention, TSSA])
@torch.no_grad()
def test_blocks_that_ask_for_no_grid_are_whole_graphs(mixer):
    torch._dynamo.reset()
    model = vit(mixer, img_size=(32, 128))
    expected = told(model, WIDE)
    for block in model.blocks:
        block.attn.set_input_size((2, 8) if block.attn.needs_grid else None, 1)
        block.compile(backend="eager", fullgraph=True)
    assert_close(model(WIDE), expected, 1e-5)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
def test_exported_models(strict):
    model = vit(img_size=(32, 128))
    exported = torch.export.export(model, (WIDE,), strict=strict).module()
    assert_close(exported(WIDE), told(model, WIDE), 1e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled embedding"])
@torch.no_grad()
def test_images_that_are_embedded_before_others_are_encoded(compiled):
    """In every order: right, or an error; and the next image goes through."""
    torch._dynamo.reset()
    model = flexible()
    expected = [told(model, image) for image in IMAGES]
    if compiled:
        model.patch_embed = torch.compile(model.patch_embed, backend="eager")
    for order in itertools.product(range(3), repeat=3):
        tokens = [embedded(model, IMAGES[i]) for i in order]
        right = 0
        for i, x in zip(order, tokens, strict=True):
            try:
                output = encoded(model, x)
            except ValueError:
                continue
            assert_close(output, expected[i], 1e-5)
            right += 1
        if len(set(order)) == 1 and not compiled:
            assert right == 3
        for image, output in zip(IMAGES, expected, strict=True):
            assert_close(encoded(model, embedded(model, image)), output, 1e-5)


@torch.no_grad()
def test_images_that_take_turns_in_one_graph():
    torch._dynamo.reset()
    model = flexible()

    @torch.compile(backend="eager", fullgraph=True)
    def in_turns(first, second):
        halfway = model.blocks[0](embedded(model, first)), model.blocks[0](embedded(model, second))
        return [model.forward_head(model.norm(model.blocks[1](x))) for x in halfway]

    for output in in_turns(WIDE, WIDE):
        assert_close(output, told(model, WIDE), 1e-5)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_look_up"):  # outside the graph
        in_turns(WIDE, TALL)


@torch.no_grad()
def test_images_that_take_turns_block_by_block():
    model = flexible()
    expected = [told(model, image) for image in IMAGES]
    first, second = (model.blocks[0](embedded(model, image)) for image in (WIDE, TALL))
    for x, output in ((second, expected[2]), (first, expected[1]), (second, expected[2])):
        assert_close(model.forward_head(model.norm(model.blocks[1](x))), output, 1e-5)
    stored = embedded(model, WIDE)
    encoded(model, stored)
    model(TALL)
    assert_close(encoded(model, stored), expected[1], 1e-5)  # again
    with pytest.raises(ValueError, match=r"grids of \(2, 8\), \(4, 4\), \(8, 2\).*set_input_size"):
        model(SQUARE), encoded(model, stored + 1.0)
    stored.copy_(embedded(model, TALL))  # the same memory
    assert_close(encoded(model, stored), expected[2], 1e-5)


# --- computed again for the backward pass ---


def gradients(model, forward=None, in_thread=False):
    """Of a loss of all images, whose forward passes come before the one backward pass."""
    model.zero_grad()
    loss = sum(
        (i + 1) * (model if forward is None else forward)(image).square().sum()
        for i, image in enumerate((*IMAGES, WIDE))
    )
    if in_thread:  # as on a GPU
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        loss.backward()
    return {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in model.named_parameters()}


def each_block(change):
    def change_all(model):
        for i, block in enumerate(model.blocks):
            change(model, i, block)

    return change_all


RECOMPUTED = {
    "timm": lambda model: model.set_grad_checkpointing(True),
    "wrapped": each_block(lambda model, i, block: setitem(model.blocks, i, checkpoint_wrapper(block))),
    "attention": each_block(lambda model, i, block: setattr(block, "attn", checkpoint_wrapper(block.attn))),
    "compiled": each_block(lambda model, i, block: block.compile(backend="aot_eager")),
    "own": each_block(lambda model, i, block: setattr(block.attn, "recompute", True)),
}


@pytest.mark.parametrize(("reentrant", "in_thread"), [(False, True), (True, False)], ids=["plain", "reentrant"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo looks at it
@pytest.mark.parametrize("how", RECOMPUTED)
def test_recomputation_takes_the_same_grid(how, reentrant, in_thread, monkeypatch):
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
    model = flexible(depth=1 if how == "compiled" else 2)
    expected = gradients(model)
    model = copy.deepcopy(model)
    if how == "compiled":
        RECOMPUTED["timm"](model)
    RECOMPUTED[how](model)
    for name, gradient in gradients(model, in_thread=in_thread).items():
        assert_close(gradient, expected[name], 1e-4)


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_segments_of_several_blocks_are_recomputed(reentrant):
    model = flexible()
    expected = gradients(model)

    def forward(image):
        x = checkpoint(model.blocks, embedded(model, image), use_reentrant=reentrant)
        return model.forward_head(model.norm(x))

    for name, gradient in gradients(model, forward).items():
        assert_close(gradient, expected[name], 1e-4)


def test_whole_graphs_with_checkpointing():
    torch._dynamo.reset()
    model = flexible(depth=1)
    expected = gradients(model)
    model.set_grad_checkpointing(True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for name, gradient in gradients(model, compiled).items():
        assert_close(gradient, expected[name], 1e-4)


def test_recomputation_of_changed_tokens_is_refused():
    model = flexible(depth=1)
    both = [
        checkpoint(lambda x: model.blocks(x + 1.0), embedded(model, i), use_reentrant=False) for i in IMAGES
    ]
    with pytest.raises(ValueError, match="nothing tells their grid"):
        sum(x.sum() for x in both).backward()


def test_nothing_is_kept():
    model, outputs = flexible(), []
    source = model.blocks[0].attn.grid_follower.source
    handle = model.blocks[0].register_forward_hook(lambda _, __, out: outputs.append(weakref.ref(out)))
    model.set_grad_checkpointing(True)
    gc.disable()
    try:
        loss = model(WIDE).sum()
        assert len(source.tags) > 0
        loss.backward()
        del loss
        with torch.no_grad():
            model(TALL)
        assert len(outputs) == 2
        assert not any(output() is not None for output in outputs)
        assert len(source.tags) == 0
        weight = weakref.ref(model.blocks[0].attn.qkv.weight)
        del model, handle
        assert weight() is None
    finally:
        gc.enable()


# --- what is refused, and what is told ---


def test_dropped_patches_are_refused():
    model = vit(patch_drop_rate=0.5).train()
    with pytest.raises(ValueError, match=r"x has 9 tokens, 1 of them prefix tokens.*patch_drop_rate"):
        model(SQUARE)


@pytest.mark.parametrize("built", [64, 128])
@torch.no_grad()
def test_dropped_patches_are_no_other_grid(built):
    """A quarter of 8 x 8 patches are as many as those that the model was built for, or saw before."""
    model = vit(patch_drop_rate=0.75, dynamic_img_size=True, img_size=built)
    model(SQUARE)
    with pytest.raises(ValueError, match="Drop no patches"):
        model.train()(torch.randn(1, 3, 128, 128))
    assert_close(model.eval()(SQUARE), told(model, SQUARE), 1e-6)


def test_layers_put_in_later_follow_when_told():
    options = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": (32, 128), "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    model.blocks[1].attn = AgentAttention(24, 2)
    for unaware in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match=r"17 tokens, and assumes no square.*follow_grid\(model\)"):
            unaware(WIDE)
    assert follow_grid(model) == 1
    assert model.blocks[1].attn.token_grid(torch.randn(1, 17, 24)) == ((2, 8), 1)
    model.patch_embed = copy.deepcopy(model.patch_embed)
    assert_close(model(WIDE), told(model, WIDE), 1e-6)


def appended_copy(model):
    model(SQUARE)
    model.blocks.append(copy.deepcopy(model.blocks[0]))


def appended_block(model):
    model.blocks.append(type(model.blocks[0])(24, 2, attn_layer=AgentAttention).eval())


def replaced_attention(model):
    model.blocks[1].attn = AgentAttention(24, 2)


def moved_block(model):
    other = flexible()
    other(TALL)
    model.blocks[1] = other.blocks[1]


@pytest.mark.parametrize("change", [appended_copy, appended_block, replaced_attention, moved_block])
@torch.no_grad()
def test_parts_that_join_a_model_later_follow_its_images(change):
    model = flexible()
    change(model)
    for image in IMAGES:
        assert_close(model(image), told(model, image), 1e-6)


@torch.no_grad()
def test_models_side_by_side_keep_their_grids():
    both = nn.ModuleList([flexible(), flexible()])
    both[0](WIDE), both[1](TALL)
    layer = CBSA(24, 2)
    both.append(layer)
    assert_close(layer(torch.ones(1, 16, 24)), layer(torch.ones(1, 16, 24), (4, 4)), 1e-6)
    for image in (WIDE, TALL):
        for model in both[:2]:
            assert_close(model(image), told(model, image), 1e-6)


@torch.no_grad()
def test_a_copied_block_alone_knows_no_grid():
    model = flexible()
    model(WIDE)
    with pytest.raises(ValueError, match="nothing tells their grid"):
        copy.deepcopy(model.blocks[0])(torch.randn(1, 17, 24))


def test_images_that_stop_early_do_not_disturb_the_next():
    model = flexible()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model.forward_intermediates(WIDE, indices=[0], stop_early=True)
            outputs = model.forward_head(model.forward_features(TALL))
        with torch.no_grad():
            assert_close(outputs.clone(), told(model, TALL), 1e-6)


@torch.no_grad()
def test_the_size_that_a_model_is_set_to_counts():
    model = vit(AgentAttention)
    model.set_input_size(img_size=(32, 128))
    tokens = torch.randn(1, 17, 24)
    expected = copy.deepcopy(model)
    for block in expected.blocks:
        block.attn.set_input_size((2, 8), 1)
    assert_close(model.blocks(tokens), expected.blocks(tokens), 1e-6)


@torch.no_grad()
def test_layers_that_replace_others_assume_no_square():
    holder = nn.Sequential(nn.Identity(), nn.Sequential(CBSA(24, 2)))
    tokens = torch.randn(1, 16, 24)
    standing = holder[1][0]
    holder[1] = nn.Sequential(standing)  # only wrapped
    assert_close(holder(tokens), standing(tokens, (4, 4)), 1e-6)
    holder[0] = nn.Sequential(CBSA(24, 2))
    layer = holder[0][0]
    with pytest.raises(ValueError, match="CBSA got 16 tokens"):
        holder(tokens)
    assert layer(torch.randn(1, 24, 4, 4)).shape == (1, 24, 4, 4)
    wide = layer(tokens, (2, 8))
    assert not torch.allclose(wide, standing(tokens, (4, 4)))
    layer.set_input_size((2, 8))
    assert_close(layer(tokens), wide, 1e-6)
    holder[0] = MSSA(24, 2)  # needs no grid
    assert holder(tokens).shape == tokens.shape


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 16, 16)
        self.attn = AgentAttention(24, 2)

    def forward(self, image):
        return self.attn(self.patches(image).flatten(2).mT)


def test_models_of_another_make():
    tower = Tower()
    with pytest.raises(ValueError, match="model must have a patch_embed"):
        follow_grid(tower)
    assert follow_grid(tower, embedding=tower.patches) == 1
    for image, grid in ((WIDE, (2, 8)), (SQUARE, (4, 4))):
        assert_close(tower(image), tower.attn(tower.patches(image).flatten(2).mT, grid), 1e-6)
    assert follow_grid(tower, embedding=tower.patches) == 1  # once more changes nothing
    assert len(tower.patches._forward_hooks) == 1


@torch.no_grad()
def test_an_embedding_used_aside_disturbs_no_call_of_the_model():
    model = flexible()
    for image in (WIDE, SQUARE, TALL):
        model.patch_embed(image)
        model.blocks[0].norm1(torch.randn(1, 17, 24))
        assert_right([model(each) for each in IMAGES], model)


def test_an_embedding_without_a_grid_is_refused():
    class Flat(nn.Module):
        def forward(self, image):
            return torch.zeros(1, 16, 24)

    model = vit(img_size=(32, 128))
    model.patch_embed = Flat()
    with pytest.raises(ValueError, match="grids of unknown size"):
        model(WIDE)


def test_a_grid_that_was_given_goes_first():
    model = vit(dynamic_img_size=True)
    layer = model.blocks[0].attn
    layer.set_input_size((8, 2), num_prefix_tokens=1)
    model(SQUARE)
    assert layer.token_grid(torch.randn(1, 17, 24)) == ((8, 2), 1)


def test_the_hook_can_be_removed():
    hooks = torch.nn.modules.module._global_module_registration_hooks
    try:
        remove_grid_hook()
        assert not any(hook is grid_hook._on_registration for hook in hooks.values())
        model = vit(AgentAttention, img_size=(32, 128))  # building a mixer does not bring it back
        with pytest.raises(ValueError, match=r"17 tokens, and assumes no square.*follow_grid\(model\)"):
            model(WIDE)
        assert follow_grid(model) == 2
        assert_close(model(WIDE), told(model, WIDE), 1e-6)
        install_grid_hook()
        install_grid_hook()
        assert sum(hook is grid_hook._on_registration for hook in hooks.values()) == 1
        assert vit().blocks[0].attn.grid_follower is not None
    finally:
        install_grid_hook()
