"""CBSA in the head of a segmentation model of torchvision, trained for a few steps on drawn discs.

    python examples/segmentation_head.py

The head of an FCN classifies each position from a 3 x 3 neighbourhood. With a CBSABlock before the last
convolution every position has seen the whole map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead

from cbsa_torch import CBSABlock


@dataclass
class Options:
    """Train a segmentation model whose head has a CBSA block."""

    image_size: int = 64
    steps: int = 10
    batch_size: int = 4
    lr: float = 1e-3
    seed: int = 0


def segmenter() -> FCN:
    """An FCN for two classes, with a CBSABlock in its head."""
    backbone = IntermediateLayerGetter(resnet18(weights=None), {"layer3": "out"})
    *layers, classify = FCNHead(256, 2)
    return FCN(backbone, nn.Sequential(*layers, CBSABlock(classify.in_channels), classify))


def discs(number: int, size: int) -> tuple[Tensor, Tensor]:
    """Noisy images ``(B, 3, size, size)`` of one bright disc each, and their masks ``(B, size, size)``."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre, radius = size * (0.25 + 0.5 * torch.rand(2, number, 1, 1)), size * 0.2
    masks = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
    return 0.5 * torch.rand(number, 3, size, size) + 0.5 * masks[:, None], masks.long()


def train(options: Options) -> tuple[FCN, list[float]]:
    """The model and its loss at every step."""
    torch.manual_seed(options.seed)
    model = segmenter().train()
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=options.lr), []
    for _ in range(options.steps):
        images, masks = discs(options.batch_size, options.image_size)
        loss = nn.functional.cross_entropy(model(images)["out"], masks)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return model, losses


def main() -> None:
    options = tyro.cli(Options)
    model, losses = train(options)
    print("loss at every step:", " ".join(f"{loss:.2f}" for loss in losses))
    wide = torch.rand(1, 3, options.image_size, options.image_size * 3 // 2)
    with torch.no_grad():
        print(f"an image of another shape: {tuple(wide.shape)} -> {tuple(model.eval()(wide)['out'].shape)}")


if __name__ == "__main__":
    main()
