"""timm's NaFlexVit with our mixers: coordinates from ``patch_coord``, masks from ``patch_valid``."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch

from cbsa_torch import CBSA, MSSA
from cbsa_torch.models import adapt_vit
from cbsa_torch.nn import follow_grid
from cbsa_torch.ops.coordinates import Coordinates
from tests.helpers.compare import assert_close

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5, "patch_size": 4}
GRIDS = [(3, 5), (4, 4), (2, 3), (1, 7)]


def naflex(**options):
    torch.manual_seed(0)
    options = {"class_token": True, "reg_tokens": 1, **SMALL, **options}
    return timm.create_model("naflexvit_base_patch16_gap", **options).double().eval()


def batch(grids=GRIDS, seed=1):
    """Patches, their coordinates and which are real, padded at the end."""
    n, generator = max(h * w for h, w in grids) + 2, torch.Generator().manual_seed(seed)
    patches = torch.randn(len(grids), n, 48, generator=generator, dtype=torch.float64)
    coords = torch.zeros(len(grids), n, 2, dtype=torch.int64)
    valid = torch.zeros(len(grids), n, dtype=torch.bool)
    for i, (h, w) in enumerate(grids):
        coords[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))
        valid[i, : h * w] = True
    return {"patches": patches, "patch_coord": coords, "patch_valid": valid}


def alone(inputs, i):
    real = int(inputs["patch_valid"][i].sum())
    return {name: value[i : i + 1, :real] for name, value in inputs.items()}


def assert_each_as_alone(model, inputs):
    together = model(inputs)
    each = torch.cat([model(alone(inputs, i)) for i in range(len(together))])
    assert_close(together, each, 1e-10)
    weights = torch.arange(1.0, together.numel() + 1).view_as(together).double().cos()
    named = dict(model.named_parameters())
    ours, theirs = (
        torch.autograd.grad((out * weights).sum(), [*named.values()], allow_unused=True)
        for out in (together, each)
    )
    for name, mine, expected in zip(named, ours, theirs, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:  # timm resamples positions in float32
            assert_close(mine, expected, 1e-6 if name == "embeds.pos_embed" else 1e-10)


@pytest.mark.parametrize(
    ("mixer", "options"),
    [
        ("adapted_cbsa", {}),
        ("adapted_cbsa", {"rope_type": "axial"}),
        ("agent", {"rope_type": "mixed"}),
        ("agent", {"global_pool": "map", "pos_embed_use_grid_sample": True}),
        ("linear", {}),
        ("linear_cbsa", {}),
        ("mssa", {}),
    ],
)
def test_adapted_models_give_each_image_of_a_batch_what_it_gets_alone(mixer, options):
    pools = mixer in ("adapted_cbsa", "agent")
    model, report = adapt_vit(naflex(**options), mixer, **({"num_representatives": 4} if pools else {}))
    assert len([layer for layer in report.layers if not layer.reason]) == 2
    assert_each_as_alone(model, batch())


def test_layers_built_in_and_put_in_by_hand_know_where_patches_are():
    built = naflex(attn_layer=CBSA.with_options(num_representatives=4))
    assert_each_as_alone(built, batch())
    model = naflex()
    for block in model.blocks:
        block.attn = CBSA(32, 2, num_representatives=4).double()
    with pytest.raises(ValueError, match="attn_mask must be a key-padding mask"):
        model(batch())
    assert follow_grid(model) == 2
    assert_each_as_alone(model, batch())
    assert_each_as_alone(naflex(attn_layer=MSSA), batch())
    model.blocks[0].attn = CBSA(32, 2, num_representatives=4, step="certified").double()
    assert follow_grid(model) == 2
    assert_each_as_alone(model, batch())


def test_images_and_patches_of_the_same_image_are_the_same():
    model, _ = adapt_vit(naflex(pos_embed="none"), num_representatives=4)
    images = torch.randn(2, 3, 16, 24).double()  # 4 x 6 patches, a multiple of 2 x 2 cells
    patches = images.unflatten(3, (6, 4)).unflatten(2, (4, 4)).permute(0, 2, 4, 3, 5, 1).reshape(2, 24, 48)
    coords = torch.cartesian_prod(torch.arange(4), torch.arange(6)).expand(2, -1, -1)
    found = model(patches, patch_coord=coords, patch_valid=torch.ones(2, 24, dtype=torch.bool))
    assert_close(found, model(images), 1e-10)


def test_coordinates_are_of_the_call_and_not_kept():
    model, _ = adapt_vit(naflex(), num_representatives=4)
    inputs = [batch(GRIDS, 1), batch(GRIDS[::-1], 2)]
    expected = [model(x).detach() for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda i: model(inputs[i % 2]).detach(), range(8)))
    for i, logits in enumerate(found):
        assert_close(logits, expected[i % 2], 1e-12)
    model.set_grad_checkpointing()
    model.train()
    losses = [model(x).square().sum() for x in inputs]  # both forward passes, then both recomputed
    for loss in losses:
        loss.backward()
    del losses, loss
    gc.collect()
    assert not [held for held in gc.get_objects() if type(held) is Coordinates]
    twin = copy.deepcopy(model).eval()
    assert_close(twin(inputs[0]), expected[0], 1e-12)


def test_what_cannot_be_pooled_by_coordinates_is_refused():
    model, _ = adapt_vit(naflex(), layout="official", num_representatives=4)
    with pytest.raises(ValueError, match="coords need layout='standard'"):
        model(batch())
    dropping, _ = adapt_vit(naflex(patch_drop_rate=0.5), num_representatives=4)
    with pytest.raises(ValueError, match="Drop no patches"):
        dropping.train()(batch())
