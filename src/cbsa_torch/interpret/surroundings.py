"""What the model around an attention layer says about its tokens, where the layer itself does not know."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from cbsa_torch._core.types import GridSize
from cbsa_torch.interpret._names import named_modules
from cbsa_torch.nn.tokens import resolve_grid


class Surroundings:
    """Prefix tokens and grid of the layers of a model, from the modules that contain them.

    Of the modules around a layer, from the innermost to the model, the first with a ``num_prefix_tokens``
    tells that number, and the first with a ``patch_embed`` that has a ``grid_size`` tells the grid, as timm's
    models have them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(named_modules(model))
        self._inputs: dict[nn.Module, tuple[int, ...]] = {}

    def watch(self, names: Iterable[str]) -> list[RemovableHandle]:
        """Note the size of the images that the layers' patch embeddings see; the caller removes the hooks."""
        embeddings = {id(found): found for name in names if (found := self._patch_embed(name)) is not None}

        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and hasattr(args[0], "shape"):
                self._inputs[module] = tuple(args[0].shape[2:])

        return [embedding.register_forward_pre_hook(note) for embedding in embeddings.values()]

    def num_prefix_tokens(self, name: str) -> int | None:
        """How many prefix tokens the model says it has; None if it does not."""
        for module in self._around(name):
            number = getattr(module, "num_prefix_tokens", None)
            if isinstance(number, int):
                return number
        return None

    def grid(self, name: str, num_tokens: int, *, square: bool = False) -> tuple[GridSize, int] | None:
        """The grid of a layer's tokens and the prefix tokens before it; None if nothing fits ``num_tokens``.

        ``square``: without a word from the model, take a square if it fits.
        """
        prefix = self.num_prefix_tokens(name)
        candidates: list[GridSize | None] = [*self._grids(name), *([None] if square else [])]
        for candidate in candidates:
            try:
                return resolve_grid(num_tokens, candidate, prefix)
            except ValueError:
                continue
        return None

    def _grids(self, name: str) -> list[GridSize]:
        embedding = self._patch_embed(name)
        if embedding is None:
            return []
        grids = [tuple(embedding.grid_size)]
        seen = self._inputs.get(embedding)
        if seen and hasattr(embedding, "dynamic_feat_size"):  # models that take images of any size
            grids.insert(0, tuple(embedding.dynamic_feat_size(seen)))
        return grids

    def _patch_embed(self, name: str) -> Any:
        for module in self._around(name):
            embedding = getattr(module, "patch_embed", None)
            if isinstance(embedding, nn.Module) and getattr(embedding, "grid_size", None) is not None:
                return embedding
        return None

    def _around(self, name: str) -> Iterable[nn.Module]:
        while name:
            name = name.rpartition(".")[0]
            if name in self._modules:
                yield self._modules[name]
