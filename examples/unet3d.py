"""CBSA in the bottleneck of a 3-D U-Net of MONAI, trained for a few steps on drawn balls.

    pip install monai
    python examples/unet3d.py

The bottleneck has the fewest voxels: there a CBSABlock lets every voxel see the whole volume. Volumes may have
any size that the U-Net takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tyro
from monai.networks.nets import UNet
from torch import Tensor, nn

from cbsa_torch import CBSABlock


@dataclass
class Options:
    """Train a 3-D U-Net whose bottleneck has a CBSA block."""

    volume_size: int = 24
    steps: int = 10
    batch_size: int = 2
    lr: float = 5e-3
    num_representatives: int = 27
    seed: int = 0


class CBSAUNet(UNet):
    """MONAI's U-Net with a CBSABlock after its bottleneck."""

    def __init__(self, num_representatives: int, **options: object) -> None:
        self.num_representatives = num_representatives
        super().__init__(**options)

    def _get_bottom_layer(self, in_channels: int, out_channels: int) -> nn.Module:
        layer = super()._get_bottom_layer(in_channels, out_channels)
        return nn.Sequential(layer, CBSABlock(out_channels, num_representatives=self.num_representatives))


def unet(options: Options) -> CBSAUNet:
    """A small one: two classes, three levels."""
    return CBSAUNet(
        options.num_representatives,
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(8, 16, 32),
        strides=(2, 2),
    )


def balls(number: int, size: int) -> tuple[Tensor, Tensor]:
    """Noisy volumes ``(B, 1, size, size, size)`` of one bright ball each, and their masks."""
    axes = torch.meshgrid(*[torch.arange(size)] * 3, indexing="ij")
    centre = size * (0.3 + 0.4 * torch.rand(3, number, 1, 1, 1))
    masks = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) < (0.25 * size) ** 2
    return torch.rand(number, 1, size, size, size) + 0.7 * masks[:, None], masks.long()


def train(options: Options) -> tuple[CBSAUNet, list[float]]:
    """The model and its loss at every step."""
    torch.manual_seed(options.seed)
    model = unet(options).train()
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=options.lr), []
    for _ in range(options.steps):
        volumes, masks = balls(options.batch_size, options.volume_size)
        loss = nn.functional.cross_entropy(model(volumes), masks)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return model, losses


def main() -> None:
    options = tyro.cli(Options)
    model, losses = train(options)
    print("loss at every step:", " ".join(f"{loss:.2f}" for loss in losses))
    size = options.volume_size
    volume = torch.rand(1, 1, size, size + 8, size * 2)
    with torch.no_grad():
        print(f"a volume of another shape: {tuple(volume.shape)} -> {tuple(model.eval()(volume).shape)}")


if __name__ == "__main__":
    main()
