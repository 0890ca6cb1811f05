"""Images of many sizes through one model as one packed batch, without resizing, cropping or padding.

    python examples/native_sizes.py

A list of images in place of a batch is all it takes. The logits are those of each image alone; the table says
how many tokens each has, and how many a padded batch would have.
"""

from __future__ import annotations

from dataclasses import dataclass

import timm
import torch
import tyro

import cbsa_torch.models  # noqa: F401  (registers our models with timm)


@dataclass
class Options:
    """Run images of their own sizes."""

    model: str = "cbt_nano_patch4_32"
    """One of `cbsa list`."""
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (48, 24), (17, 90), (64, 64), (32, 32))
    """Height and width of each image."""
    seed: int = 0


@torch.no_grad()
def measure(options: Options) -> list[dict[str, float | str]]:
    """For each image: its size, its tokens, and how far its logits are from those that it gets alone."""
    torch.manual_seed(options.seed)
    model = timm.create_model(options.model).double().eval()
    images = [torch.randn(model.in_chans, *size, dtype=torch.float64) for size in options.sizes]
    logits = model(images)  # (images, classes)
    features = model.forward_features(images)  # a list of (tokens, channels)
    rows: list[dict[str, float | str]] = []
    for image, size, found, tokens in zip(images, options.sizes, logits, features, strict=True):
        error = (found - model(image[None])[0]).abs().max().item()
        rows.append({"size": f"{size[0]} x {size[1]}", "tokens": len(tokens), "error": error})
    return rows


def main() -> None:
    rows = measure(tyro.cli(Options))
    for row in rows:
        print(f"{row['size']:>9}: {row['tokens']:4} tokens; packed - alone: {row['error']:.1e}")
    counts = [int(row["tokens"]) for row in rows]
    print(f"packed {sum(counts)} tokens, padded {len(counts) * max(counts)}")


if __name__ == "__main__":
    main()
