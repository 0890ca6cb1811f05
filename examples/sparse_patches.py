"""Drop three quarters of the patches of a ViT with CBSA layers, and tell the layers where the others are.

    python examples/sparse_patches.py

Tokens of the patches that stay have no grid, but coordinates: the layers pool them over the occupied cells of a
coarse lattice, and need neither masks nor the patches that were dropped. The features of those that stay are
compared with those of the whole image, and the time is measured.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

from cbsa_torch import CBSA
from cbsa_torch.nn import ConvStem, Coordinates, WhiteBoxBlock


@dataclass
class Options:
    """Encode images of which some patches are dropped."""

    image_size: int = 224
    patch_size: int = 8
    dim: int = 96
    depth: int = 4
    kept: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1)
    """Shares of the patches that stay."""
    seed: int = 0


class SparseEncoder(nn.Module):
    """A stem, positions, and white-box layers over the patches that are kept."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.stem = ConvStem(3, options.dim, options.patch_size)
        side = options.image_size // options.patch_size
        self.positions = nn.Parameter(0.5 * torch.randn(1, side**2, options.dim))
        self.layers = nn.ModuleList(
            WhiteBoxBlock(options.dim, CBSA(options.dim, 4, num_prefix_tokens=0)) for _ in range(options.depth)
        )

    def forward(self, images: Tensor, kept: Tensor) -> Tensor:
        """Features ``(B, K, dim)`` of the patches ``kept`` ``(B, K)``, numbers from 0 in rows of the grid."""
        maps = self.stem(images)  # (B, dim, h, w)
        tokens = maps.flatten(2).mT + self.positions
        tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))  # (B, K, dim)
        coords = torch.stack([kept // maps.shape[3], kept % maps.shape[3]], dim=-1)  # (B, K, 2): y, x
        places = Coordinates(coords)  # one for all layers, which then search their cells once
        for layer in self.layers:
            tokens = layer(tokens, coords=places)
        return tokens


@torch.no_grad()
def measure(options: Options) -> list[dict[str, float]]:
    """For each share: tokens, seconds, and how similar the features are to those with all patches."""
    torch.manual_seed(options.seed)
    encoder = SparseEncoder(options).eval()
    images = torch.randn(2, 3, options.image_size // 16, options.image_size // 16)
    images = nn.functional.interpolate(images, (options.image_size,) * 2, mode="bicubic")
    patches = (options.image_size // options.patch_size) ** 2
    order = torch.stack([torch.randperm(patches) for _ in images])  # other patches of every image
    everything = encoder(images, torch.arange(patches).expand(len(images), -1))
    rows = []
    for share in options.kept:
        kept = order[:, : max(round(share * patches), 1)]
        start = time.perf_counter()
        features = encoder(images, kept)
        seconds = time.perf_counter() - start
        same = everything.gather(1, kept[..., None].expand_as(features))
        similarity = nn.functional.cosine_similarity(features, same, dim=-1).mean().item()
        rows.append({"kept": share, "tokens": kept.shape[1], "seconds": seconds, "similarity": similarity})
    return rows


def main() -> None:
    for row in measure(tyro.cli(Options)):
        print(
            f"{100 * row['kept']:4.0f} % of the patches: {row['tokens']:4.0f} tokens, "
            f"{1e3 * row['seconds']:6.1f} ms, cosine to the features with all patches {row['similarity']:.3f}"
        )


if __name__ == "__main__":
    main()
