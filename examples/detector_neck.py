"""CBSA in the feature pyramid of a detector of torchvision, trained for a few steps on drawn rectangles.

    python examples/detector_neck.py

The neck of a detector hands maps of several sizes to its head. A CBSABlock follows each: every position then
sees the whole image. torchvision calls such parts ``extra_blocks``, and gives them the maps of any image size;
the rest of the detector is unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from cbsa_torch import CBSABlock


@dataclass
class Options:
    """Train a small detector whose neck has CBSA blocks."""

    image_size: int = 128
    steps: int = 20
    batch_size: int = 4
    lr: float = 3e-4
    num_representatives: int = 16
    seed: int = 0


class CBSANeck(ExtraFPNBlock):
    """A CBSABlock after every map of a feature pyramid."""

    def __init__(self, channels: int, levels: int, num_representatives: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            CBSABlock(channels, num_representatives=num_representatives) for _ in range(levels)
        )

    def forward(
        self, results: list[Tensor], x: list[Tensor], names: list[str]
    ) -> tuple[list[Tensor], list[str]]:
        """Transform the maps of the pyramid, fine to coarse; ``x`` are those of the backbone."""
        return [block(level) for block, level in zip(self.blocks, results, strict=True)], names


def detector(options: Options) -> RetinaNet:
    """A RetinaNet on a ResNet-18 without pretrained weights."""
    backbone = BackboneWithFPN(
        resnet18(weights=None),
        return_layers={"layer2": "0", "layer3": "1", "layer4": "2"},
        in_channels_list=[128, 256, 512],
        out_channels=64,
        extra_blocks=CBSANeck(64, 3, options.num_representatives),
    )
    anchors = AnchorGenerator(tuple((size,) for size in (16, 32, 64)), ((1.0,),) * 3)
    size = options.image_size
    return RetinaNet(backbone, 2, anchor_generator=anchors, min_size=size, max_size=2 * size)


def rectangles(number: int, size: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Noisy images with one bright rectangle each, and its box."""
    images, targets = [], []
    for _ in range(number):
        height, width = (int(v) for v in torch.randint(size // 6, size // 2, (2,)))
        top, left = int(torch.randint(0, size - height, ())), int(torch.randint(0, size - width, ()))
        image = 0.2 * torch.rand(3, size, size)
        image[:, top : top + height, left : left + width] += 0.7
        box = torch.tensor([[left, top, left + width, top + height]], dtype=torch.float32)
        images.append(image)
        targets.append({"boxes": box, "labels": torch.ones(1, dtype=torch.int64)})
    return images, targets


def train(options: Options) -> tuple[RetinaNet, list[float]]:
    """The detector and its loss at every step."""
    torch.manual_seed(options.seed)
    model = detector(options).train()
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=options.lr), []
    for _ in range(options.steps):
        loss = sum(model(*rectangles(options.batch_size, options.image_size)).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return model, losses


def main() -> None:
    options = tyro.cli(Options)
    model, losses = train(options)
    print("loss at every step:", " ".join(f"{loss:.2f}" for loss in losses))
    wide = torch.rand(3, options.image_size, options.image_size * 3 // 2)
    with torch.no_grad():
        found = model.eval()([wide])[0]
    print(f"an image of another shape, {tuple(wide.shape)}: {len(found['boxes'])} boxes")


if __name__ == "__main__":
    main()
