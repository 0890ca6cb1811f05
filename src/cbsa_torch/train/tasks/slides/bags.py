"""Bags of tiles as a data set, and several of them as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cbsa_torch.train.errors import DataError
from cbsa_torch.train.tasks.slides.files import Slide, read_slide


class FeatureSpec(NamedTuple):
    """What a model of slides is fed."""

    in_dim: int
    """Width of the features."""
    coords: bool
    """Whether it is given the coordinates of the tiles."""

    @property
    def mode(self) -> str:
        """No images, hence no colour mode."""
        return ""


class SlideBags(Dataset[Any]):
    """Slides with their labels, read when they are asked for: (:class:`Slide`, label).

    Args:
        paths: the files.
        targets: a class for each.
        spec: what every file must hold.
    """

    unit = "slides"

    def __init__(self, paths: Sequence[Path], targets: Sequence[int], spec: FeatureSpec) -> None:
        self.paths, self.targets, self.spec = list(paths), list(targets), spec
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Slide, int]:
        slide = read_for(self.spec, self.paths[index])
        return (slide if self.transform is None else self.transform(slide)), self.targets[index]


def read_for(spec: FeatureSpec, path: Path) -> Slide:
    """Read a slide for a model that is fed ``spec``; raises DataError if it has something else."""
    slide = read_slide(path)
    check_fed(spec, path, slide.features.shape[1], slide.coords is not None)
    return slide


def check_fed(spec: FeatureSpec, path: Path, width: int, has_coords: bool) -> None:
    """Refuse features of another width, and a slide without coordinates where they are needed."""
    if width != spec.in_dim:
        raise DataError(f"{path} has features of width {width}, expected {spec.in_dim}")
    if spec.coords and not has_coords:
        raise DataError(
            f"{path} has no coordinates; data.coords false leaves those of all slides out, for a model that "
            "needs none (model.args positions none representatives learned)"
        )


class RandomTiles:
    """At most ``count`` random tiles of a slide, in their order."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, slide: Slide) -> Slide:
        """Draw from torch's generator, which the loader seeds for every sample."""
        tiles = slide.features.shape[0]
        if tiles <= self.count:
            return slide
        kept = torch.randperm(tiles)[: self.count].sort().values
        coords = None if slide.coords is None else slide.coords[kept]
        return slide._replace(features=slide.features[kept], coords=coords)


@dataclass
class Bags:
    """The tiles of one or more slides in one row."""

    features: Tensor
    """``(1, N, D)``, all slides one after the other."""
    coords: Tensor | None
    """``(1, N, 2)``."""
    cu_seqlens: Tensor | None
    """``(slides + 1,)`` int32, where slides begin and end; None of a single one."""

    @classmethod
    def of(cls, slides: Sequence[Slide], spec: FeatureSpec) -> Bags:
        """Several slides in one row, a single one without a copy."""
        coords = [slide.coords for slide in slides if spec.coords and slide.coords is not None]
        if len(slides) == 1:
            return cls(slides[0].features[None], coords[0][None] if coords else None, None)
        ends = torch.tensor([0, *(len(slide.features) for slide in slides)]).cumsum(0, dtype=torch.int32)
        features = torch.cat([slide.features for slide in slides])[None]
        return cls(features, torch.cat(coords)[None] if coords else None, ends)

    def to(self, device: Any, **kwargs: Any) -> Bags:
        """The same on another device."""
        parts = (self.features, self.coords, self.cu_seqlens)
        return Bags(*(None if part is None else part.to(device, **kwargs) for part in parts))  # type: ignore[arg-type]

    def logits(self, model: nn.Module) -> Tensor:
        """``(slides, classes)``."""
        logits: Tensor = model(self.features, self.coords, cu_seqlens=self.cu_seqlens)
        return logits


class Collate:
    """Samples to (:class:`Bags`, labels)."""

    def __init__(self, spec: FeatureSpec) -> None:
        self.spec = spec

    def __call__(self, samples: Sequence[tuple[Slide, int]]) -> tuple[Bags, Tensor]:
        """One batch."""
        return Bags.of([slide for slide, _ in samples], self.spec), torch.tensor(
            [label for _, label in samples]
        )
