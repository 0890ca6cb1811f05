"""Released segmentation checkpoints: whole, decoder alone, CBT and DEPICT-SA, and what is refused."""

import re

import pytest
import torch

from cbsa_torch.models import MaskTransformerDecoder, Segmenter, load_checkpoint, load_official
from cbsa_torch.models.checkpoint import CheckpointError
from cbsa_torch.models.convert import convert_official, read_official
from tests.helpers.compare import assert_close


def decoder_state(dim=64, classes=6, depth=2, heads=3, depict=False):
    state = {"cls_emb": torch.randn(1, classes, dim)}
    for i in range(depth):
        layer = f"net.layers.{i}"
        state |= {f"{layer}.norm.weight": torch.randn(dim), f"{layer}.norm.bias": torch.randn(dim)}
        if depict:
            state[f"{layer}.fn.proj"] = torch.randn(heads * 100, dim)
            state[f"{layer}.fn.step_size"] = torch.randn(1)
            continue
        state |= {f"{layer}.fn.{step}": torch.randn(heads, 1, 1) for step in ("step_x", "step_rep")}
        state[f"{layer}.fn.proj.weight"] = torch.randn(heads * 100, dim)
        state[f"{layer}.fn.to_out.weight"] = torch.randn(dim, heads * 100)
        state[f"{layer}.fn.to_out.bias"] = torch.randn(dim)
    for norm, width in (("decoder_norm", dim), ("mask_norm", classes)):
        state |= {f"{norm}.weight": torch.randn(width), f"{norm}.bias": torch.randn(width)}
    return state


def encoder_state(dim=64, depth=2, grid=4, patch=16, distilled=False):
    linear = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (96, dim), "mlp.fc2": (dim, 96)}
    state = {"cls_token": torch.randn(1, 1, dim), "pos_embed": torch.randn(1, grid**2 + 1 + distilled, dim)}
    state["patch_embed.proj.weight"] = torch.randn(dim, 3, patch, patch) * 0.05
    state["patch_embed.proj.bias"] = torch.randn(dim)
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            state |= {f"blocks.{i}.{norm}.{kind}": torch.randn(dim) for kind in ("weight", "bias")}
        for name, shape in linear.items():
            state[f"blocks.{i}.{name}.weight"] = torch.randn(shape) * 0.1
            state[f"blocks.{i}.{name}.bias"] = torch.randn(shape[0])
    state |= {"norm.weight": torch.randn(dim), "norm.bias": torch.randn(dim)}
    state |= {"head.weight": torch.randn(1000, dim), "head.bias": torch.randn(1000)}
    if distilled:
        state |= {"dist_token": torch.randn(1, 1, dim), "head_dist.weight": torch.randn(1000, dim)}
        state["head_dist.bias"] = torch.randn(1000)
    return state


def whole(depict=False, **encoder):
    parts = {"encoder": encoder_state(**encoder), "decoder": decoder_state(depict=depict)}
    return {f"{part}.{key}": value for part, state in parts.items() for key, value in state.items()}


def test_a_decoder_alone():
    state = decoder_state()
    model = load_official(state)
    assert isinstance(model, MaskTransformerDecoder)
    assert not model.training
    assert torch.equal(model.layers[1].attn.step_representatives, state["net.layers.1.fn.step_rep"].flatten())
    assert torch.equal(model.layers[0].attn.step_tokens, state["net.layers.0.fn.step_x"].flatten())
    assert torch.equal(model.norm.bias, state["decoder_norm.bias"])
    with pytest.raises(CheckpointError, match="a decoder without an encoder: load it with load_official"):
        read_official(state, "the state dict")


def test_a_depict_decoder_computes_what_its_authors_write():
    state = {name: value.double() for name, value in decoder_state(depict=True).items()}
    model = load_official(state)
    attn = model.layers[0].attn
    assert (attn.num_heads, attn.head_dim, attn.tied) == (3, 100, True)
    z = torch.randn(1, 11, 64, dtype=torch.float64)
    expected = 0
    for bases in state["net.layers.0.fn.proj"].split(100):
        w = z @ bases.T
        expected = expected + (w @ w.mT / 10).softmax(-1) @ w @ bases
    normed = model.layers[0].norm(z)
    assert_close(attn(z, (1, 5)), expected, 1e-10)
    update = model.layers[0](z, (1, 5)) - z
    assert_close(update, state["net.layers.0.fn.step_size"] * attn(normed, (1, 5)), 1e-10)


@pytest.mark.parametrize("depict", [False, True], ids=["cbt", "depict"])
@pytest.mark.parametrize("distilled", [False, True], ids=["vit", "deit"])
def test_a_whole_model_from_a_file_and_as_ours(tmp_path, depict, distilled):
    state = whole(depict, distilled=distilled)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": state, "n_cls": 6, "optimizer": {"state": {}}, "epoch": 3}, path)
    model = load_official(path)
    assert isinstance(model, Segmenter)
    assert type(model.decoder.layers[0].attn).__name__ == ("MSSA" if depict else "CBSA")
    assert model.encoder.blocks[0].attn.num_heads == 1
    assert model.encoder.blocks[0].norm1.eps == 1e-5
    assert torch.equal(model.encoder.pos_embed, state["encoder.pos_embed"])
    info = convert_official(path, tmp_path / "ours.safetensors")
    assert info["model"] == "segmenter"
    twin, _ = load_checkpoint(tmp_path / "ours.safetensors")
    x = torch.randn(1, 3, 50, 90)
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (without(decoder_state(), "net.layers.0.fn.proj.weight"), "net.layers.0.fn.proj.weight is missing"),
        (without(decoder_state(), "mask_norm.bias"), "missing mask_norm.bias"),
        (decoder_state() | {"more": ONE}, "unexpected more"),
        (decoder_state() | {"cls_emb": torch.ones(6, 64)}, r"cls_emb has shape \(6, 64\) instead of \(1, cl"),
        (decoder_state() | {"net.layers.7.norm.bias": ONE}, r"it has layers \[0, 1, 7\]"),
        (decoder_state() | {"snet.layers.0.norm.bias": ONE}, "is a DEPICT-CA"),
        ({"cls_emb": torch.ones(1, 6, 64), "blocks.0.norm1.bias": ONE}, "a decoder of Segmenter itself"),
        ({"cls_emb": torch.ones(1, 6, 64)}, r"it has layers \[\]"),
        (whole() | {"more": ONE}, r"holds more than encoder\.\* and decoder\.\*"),
        (without(whole(), "encoder.norm.bias"), "missing encoder.norm.bias"),
        (whole() | {"encoder.pos_embed": torch.ones(1, 18, 64)}, "17 position embeddings are not a square"),
        (without(whole(), "encoder.pos_embed"), "encoder.pos_embed is missing"),
        (whole() | {"encoder.blocks.0.x": ONE}, "unexpected encoder.blocks.0.x"),
    ],
)
def test_foreign_checkpoints_are_named(state, message):
    with pytest.raises(CheckpointError, match=message):
        load_official(state)


def test_heads():
    with pytest.raises(CheckpointError, match="num_heads must be 3, as .* has them, or left out; got 2"):
        load_official(decoder_state(), num_heads=2)
    assert load_official(decoder_state(depict=True), num_heads=6).layers[0].attn.head_dim == 50
    with pytest.raises(CheckpointError, match=re.escape("are not 7 heads; give num_heads")):
        load_official(decoder_state(depict=True), num_heads=7)
