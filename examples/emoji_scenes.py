"""Draw the picture of emoji-scenes in the documentation: scenes above, their masks below, and a legend.

cbsa data fetch emoji64
python examples/emoji_scenes.py [--output docs/images/emoji_scenes.png]
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cbsa_torch.train.tasks.segmentation import (
    ScenesConfig,
    SegmentationDataConfig,
    colour_mask,
    open_segmentation,
    palette,
)


@dataclass
class Options:
    """Draw scenes and their masks."""

    output: Path = Path("docs/images/emoji_scenes.png")
    root: str | None = None
    """Folder of emoji64.npz. Default: where `cbsa data fetch` puts it."""
    count: int = 8
    """Scenes of the validation split, from the first."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)


def main() -> None:
    options = tyro.cli(Options)
    config = SegmentationDataConfig(name="emoji-scenes", root=options.root, scenes=options.scenes)
    splits = open_segmentation(config)
    names = splits.class_names
    figure = Figure(figsize=(1.5 * options.count, 3.7), layout="constrained")
    axes = figure.subplots(2, options.count, squeeze=False)
    for i in range(options.count):
        image, mask = splits.val[i]
        axes[0, i].imshow(image)
        axes[1, i].imshow(colour_mask(mask, len(names)), interpolation="nearest")
    for axis in axes.flat:
        axis.set_axis_off()
    colours = palette(len(names)) / 255
    patches = [Patch(color=tuple(c), label=name) for c, name in zip(colours, names, strict=True)]
    figure.legend(handles=patches, loc="outside lower center", ncols=5, frameon=False)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=100)


if __name__ == "__main__":
    main()
