"""The encoder of an ONNX file with the names of the file that these runs use."""

import onnx
import timm
import torch
from benchmarks.claims.vit import ENCODER, NAME, POSITIONS, encoder_tensors
from onnx import helper, numpy_helper

from cbsa_torch.models.foreign import read_foreign

SIZES = {"img_size": 42, "embed_dim": 8, "depth": 2, "num_heads": 2}
LINEAR = {"attn.proj": "attention/output/dense", "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
QKV = [f"attention/attention/{part}" for part in ("query", "key", "value")]
SAME = {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}
SCALES = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
OUTSIDE = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}


def exported(state):
    """A graph that holds a timm ViT's parameters as the export of transformers' Dinov2Model does."""
    values, nodes = {}, []

    def linear(path, weight, bias):
        constant = f"onnx::MatMul_{len(nodes)}"
        values[constant] = weight.T
        values[f"{ENCODER}{path.replace('/', '.')}.bias"] = bias
        node = f"/{ENCODER.replace('.', '/')}{path}/MatMul"
        nodes.append(helper.make_node("MatMul", [f"in{len(nodes)}", constant], [f"out{len(nodes)}"], name=node))

    for name, theirs in OUTSIDE.items():
        values[f"{ENCODER}{theirs}"] = state[name]
    values[POSITIONS[0]], values[POSITIONS[1]] = state["pos_embed"].split([1, 9], 1)
    for i in range(SIZES["depth"]):
        own, layer = f"blocks.{i}.", f"encoder/layer.{i}/"
        for name in SAME:
            values[f"{ENCODER}encoder.layer.{i}.{name}"] = state[own + name]
        for name, theirs in SCALES.items():
            values[f"{ENCODER}encoder.layer.{i}.{theirs}"] = state[own + name]
        parts = zip(state[f"{own}attn.qkv.weight"].chunk(3), state[f"{own}attn.qkv.bias"].chunk(3), strict=True)
        for path, (weight, bias) in zip(QKV, parts, strict=True):
            linear(layer + path, weight, bias)
        for name, path in LINEAR.items():
            linear(layer + path, state[f"{own}{name}.weight"], state[f"{own}{name}.bias"])
    values["decoder.bias"] = torch.ones(3)
    values["onnx::MatMul_decoder"] = torch.ones(8, 8)
    nodes.append(helper.make_node("MatMul", ["x", "onnx::MatMul_decoder"], ["y"], name="/decoder/MatMul"))
    nodes.append(
        helper.make_node("MatMul", ["q", "k"], ["a"], name="/backbone/encoder/layer.0/attention/MatMul")
    )
    initialisers = [numpy_helper.from_array(value.numpy(), name) for name, value in values.items()]
    return onnx.load_model_from_string(
        helper.make_model(helper.make_graph(nodes, "vit", [], [], initialisers)).SerializeToString()
    ).graph


def test_encoder_tensors():
    vit = timm.create_model(NAME, **SIZES).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    read, info = read_foreign(encoder_tensors(exported(vit.state_dict())), "the graph", NAME, SIZES)
    assert len(info["notes"]) == 1  # nothing was left out
    images = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        torch.testing.assert_close(read.forward_features(images), vit.forward_features(images))
