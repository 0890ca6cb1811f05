"""Released checkpoints: the same logits, from a file or a state dict, of every kind that is known."""

import pytest
import torch
from safetensors.torch import save_file

from cbsa_torch.models import load_checkpoint, load_official
from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.models.convert import convert_official
from tests.helpers import golden
from tests.helpers.compare import assert_close
from tests.helpers.official import official_model, official_state

GOLDEN = ["cbt_tiny", "cbt_small", "crate_tiny", "tost_tiny"]


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_of_the_official_models(name):
    data, description = golden.load(f"model_{name}")
    model = load_official(golden.filled_state_dict(description))
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == description["parameters"]
    with torch.no_grad():
        assert_close(model(golden.images()), data["logits_float64"], 1e-10)
        assert_close(model.float()(golden.images().float()), data["logits_float32"], 1e-4)


def zeros(name):
    return {
        key: torch.zeros(shape, dtype=getattr(torch, dtype))
        for key, shape, dtype in golden.describe(f"keys_{name}")["state_dict"]
    }


@pytest.mark.parametrize(
    ("name", "heads", "head_dim", "stem"),
    [
        ("cbt_base", 12, 64, "conv"),
        ("cbt_large", 16, 64, "conv"),
        ("crate_small", 6, 64, "conv"),
        ("tost_small", 6, 64, "conv"),
        ("crate_original_small", 12, 48, "linear"),
    ],
)
def test_key_lists_of_the_other_sizes(name, heads, head_dim, stem):
    model = load_official(zeros(name))
    assert sum(p.numel() for p in model.parameters()) == golden.describe(f"keys_{name}")["parameters"]
    assert (model.blocks[0].attn.num_heads, model.blocks[0].attn.head_dim) == (heads, head_dim)
    assert hasattr(model.stem, "norm1") == (stem == "linear")


def crate(dim=32, depth=2, classes=5):
    """A small CRATE with a linear stem under the official names."""
    state = {"pos_embedding": torch.randn(1, 10, dim), "cls_token": torch.randn(1, 1, dim)}
    for i, shape in ((1, (48,)), (2, (dim, 48)), (3, (dim,))):
        state[f"to_patch_embedding.{i}.weight"] = torch.randn(shape)
        state[f"to_patch_embedding.{i}.bias"] = torch.randn(shape[0])
    for i in range(depth):
        prefix = f"transformer.layers.{i}"
        for j in (0, 1):
            state |= {f"{prefix}.{j}.norm.weight": torch.ones(dim), f"{prefix}.{j}.norm.bias": torch.zeros(dim)}
        state[f"{prefix}.0.fn.qkv.weight"] = torch.randn(dim, dim)
        state[f"{prefix}.0.fn.to_out.0.weight"] = torch.randn(dim, dim)
        state[f"{prefix}.0.fn.to_out.0.bias"] = torch.randn(dim)
        state[f"{prefix}.1.fn.weight"] = torch.randn(dim, dim)
    state["mlp_head.0.weight"], state["mlp_head.0.bias"] = torch.ones(dim), torch.zeros(dim)
    state["mlp_head.1.weight"], state["mlp_head.1.bias"] = torch.randn(classes, dim), torch.zeros(classes)
    return state


def test_an_unpublished_width_needs_num_heads(tmp_path):
    with pytest.raises(CheckpointError, match="heads cannot be told from its weights; give num_heads"):
        load_official(crate())
    model = load_official(crate(), num_heads=4)
    assert model.blocks[0].attn.num_heads == 4
    assert model(torch.randn(1, 3, 12, 12)).shape == (1, 5)
    with pytest.raises(CheckpointError, match="32 channels of its projections are not 5 heads"):
        load_official(crate(), num_heads=5)
    torch.save(crate(), tmp_path / "crate.pth")
    info = convert_official(tmp_path / "crate.pth", tmp_path / "ours.safetensors", num_heads=4)
    assert info["model"] == "crate_original_tiny_patch16_224"


def as_cbsa(state, i, heads):
    """Layer ``i`` as one of CBSA, by name."""
    state = dict(state)
    prefix = f"transformer.layers.{i}.0.fn"
    state[f"{prefix}.proj.weight"] = state.pop(f"{prefix}.qkv.weight")
    return state | {f"{prefix}.{step}": torch.ones(heads, 1, 1) for step in ("step_x", "step_rep")}


def test_hybrids_are_told_layer_by_layer():
    state = as_cbsa(crate(depth=3), 2, heads=4)
    model = load_official(state)
    assert [type(block.attn).__name__ for block in model.blocks] == ["MSSA", "MSSA", "CBSA"]
    assert model.blocks[0].attn.num_heads == 4  # told by the last layer
    assert model.blocks[2].attn.layout == "official"
    with pytest.raises(CheckpointError, match="num_heads must be 4, as .* has them, or left out; got 8"):
        load_official(state, num_heads=8)
    with pytest.raises(CheckpointError, match="CBSA, MSSA, MSSA, in an order that none of our models has"):
        load_official(as_cbsa(crate(depth=3), 0, heads=4))


LAYER = "transformer.layers.1.0.fn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transformer.layers." + "9" * 5000 + ".0.fn.step_x": torch.ones(4, 1, 1)}, "unexpected transformer"),
        ({"transformer.layers.400.0.norm.weight": torch.ones(16)}, "layers"),
        ({"cls_token": torch.ones(1, 1, 32).to(torch.float8_e4m3fn)}, "not dense, whole and of 16 bit or more"),
        ({"mlp_head.1.weight": torch.ones(5, 32).to_sparse()}, "not dense, whole and of 16 bit or more"),
        ({"mlp_head.1.weight": torch.ones(5, 32, device="meta")}, "not dense, whole and of 16 bit or more"),
        ({"pos_embedding": torch.ones(1).expand(1, 10**8 + 1, 32)}, "not dense, whole and of 16 bit or more"),
        (
            {"module.cls_token": torch.ones(1, 1, 32)},
            "two entries are called cls_token, but for names of wrappers",
        ),
        ({"to_patch_embedding.2.weight": torch.randn(32, 47)}, "47 values per patch are not a square"),
        ({f"{LAYER}.qkv.weight": None}, r"layer 1 has none of transformer\.layers\.1\.0\.fn\.step_x"),
        (
            {f"{LAYER}.to_out.0.bias": None},
            r"missing transformer\.layers\.1\.0\.fn\.to_out\.0\.bias; unexpected noth",
        ),
        ({"pos_embedding": None}, "is not an official checkpoint: pos_embedding is missing"),
        ({"norm.weight": torch.ones(16)}, "unexpected norm.weight"),
        ({"transformer.layers.0.1.fn.weight": torch.ones(32, 32).long()}, "ista.weight is torch.int64"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    state = {key: value for key, value in {**crate(), **change}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        load_official(state, num_heads=4)


@pytest.mark.parametrize(("shape", "got"), [((1, 1, 4), r"\(1, 1, 4\)"), ((0, 1, 1), r"\(0, 1, 1\)")])
def test_steps_of_another_shape_are_refused(shape, got):
    state = as_cbsa(crate(), 1, heads=4) | {f"{LAYER}.step_rep": torch.ones(shape)}
    with pytest.raises(CheckpointError, match=rf"step_rep has shape {got} instead of \(heads, 1, 1\)"):
        load_official(state)


def test_a_stem_of_one_convolution_is_not_official():
    state = official_state(official_model())
    stem = [key for key in state if "embedding.proj" in key and "proj.0" not in key]
    with pytest.raises(CheckpointError, match="3 or 4 convolutions of stride 2, got one"):
        load_official({key: value for key, value in state.items() if key not in stem})


@pytest.mark.parametrize(
    ("prefix", "suffix", "wrapped"),
    [("", ".pth", False), ("module.", ".pth.tar", True), ("_orig_mod.", ".safetensors", False)],
)
def test_an_official_checkpoint_converts(tmp_path, prefix, suffix, wrapped):
    model = official_model()
    state = {prefix + k: v for k, v in official_state(model).items()}
    source, output = tmp_path / f"official{suffix}", tmp_path / "ours.safetensors"
    if suffix == ".safetensors":
        save_file(state, source)
    else:
        torch.save({"state_dict": state, "epoch": 9, "best_acc1": 0.5} if wrapped else state, source)
    described = convert_official(source, output)
    converted, found = load_checkpoint(output)
    assert found == described
    assert found["model_args"]["img_size"] == 64
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(converted(images), model(images), atol=0, rtol=0)
