"""How the layers of a model learn the grid of its images: from the patch embedding, which knows it.

timm hands its attention layers tokens without a grid, and a number of tokens does not tell one: 16 patches may
be 4 x 4 or 2 x 8. Every way through a model (``forward``, ``forward_features``, ``forward_intermediates``,
feature extractors) calls its patch embedding first, so a forward hook there sees the grid of every input.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from cbsa_torch._core.types import GridSize

EMBEDDING = "patch_embed"
"""timm's name of the patch embedding."""


class GridSource:
    """The grids of a model's inputs; a forward hook of its patch embedding, and what layers ask."""

    def __init__(self) -> None:
        self.num_prefix_tokens = 0
        self.built_for: GridSize | None = None
        self.seen: dict[int, GridSize] = {}
        """The last grid of every number of cells."""
        self._latest: GridSize | None = None
        self._in_flight: dict[int, set[GridSize]] = {}
        """The grids, by number of cells, of forward passes that may still be recomputed."""
        self._recomputed = False
        self._differentiated = False

    def __call__(self, embedding: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Note the grid that ``embedding`` made of its input."""
        grid = _grid_made(embedding, inputs, output)
        if grid is None:
            return
        cells = math.prod(grid)
        self.seen[cells] = self._latest = grid
        self._differentiated = torch.is_grad_enabled()
        if self._recomputed:  # a backward pass has been: what went before it is done with
            self._in_flight.clear()
            self._recomputed = False

    def grid_of(self, num_tokens: int) -> GridSize:
        """The grid behind ``num_tokens`` tokens.

        Raises:
            ValueError: the last input had another number: its patches were dropped, say.
            RuntimeError: recomputed for a backward pass, after inputs of several grids with as many cells.
        """
        cells = num_tokens - self.num_prefix_tokens
        grid = self.seen.get(cells)
        if not torch.compiler.is_compiling():
            grid = self._watched(cells, grid)
        if not self.seen and self.built_for is not None and math.prod(self.built_for) == cells:
            grid = self.built_for
        if grid is None:
            known = ", ".join(str(grid) for grid in self.seen.values()) or str(self.built_for)
            raise ValueError(
                f"x has {num_tokens} tokens, {self.num_prefix_tokens} of them prefix tokens, but the model's "
                f"patches make grids of {known}; pass grid_size, and drop no patches (patch_drop_rate)"
            )
        return grid

    def _watched(self, cells: int, latest: GridSize | None) -> GridSize | None:
        """The grid, of the pass that is computed again if one is; else the latest."""
        if not _in_backward():
            if latest != self._latest:  # as many as patches of an earlier input: no grid of this one
                return None
            if latest is not None and _is_checkpointed(self._differentiated):
                self._in_flight.setdefault(cells, set()).add(latest)
            return latest
        self._recomputed = True
        candidates = sorted(self._in_flight.get(cells, ()))
        if len(candidates) > 1:
            raise RuntimeError(
                "cannot recompute a layer: the forward passes before this backward pass had the grids "
                f"{', '.join(map(str, candidates))} of {cells} cells each, and tokens do not tell which; call "
                "backward after each forward pass, or turn gradient checkpointing off"
            )
        return candidates[0] if candidates else latest


class _FollowsGrid(Protocol):
    grid_source: GridSource | None


def follow_grid(
    model: nn.Module, *, embedding: nn.Module | None = None, num_prefix_tokens: int | None = None
) -> int:
    """Let the token mixers in a model take their grid from its patch embedding.

    timm's constructors with ``attn_layer=`` do this by themselves; call it after you put a layer into a model
    that is already there, or for models of another make. A grid that a layer was given (``set_input_size``)
    goes first.

    Args:
        model: what holds the layers.
        embedding: called before them, with a ``(B, C, height, width)`` output, or tokens and an attribute
            ``grid_size``, as timm's. Default: ``model.patch_embed``.
        num_prefix_tokens: class and register tokens. Default: ``model.num_prefix_tokens``, else 0.

    Returns:
        How many layers follow.

    Raises:
        ValueError: no patch embedding.
    """
    embedding = model._modules.get(EMBEDDING) if embedding is None else embedding
    if embedding is None:
        raise ValueError(
            f"model must have a {EMBEDDING}, as timm's ViTs have, got {type(model).__name__}; pass embedding, "
            "or tell layers their grid by set_input_size"
        )
    prefix = getattr(model, "num_prefix_tokens", 0) if num_prefix_tokens is None else num_prefix_tokens
    return _follow(embedding, prefix, list(model.modules()))


def listen() -> None:
    """Have every mixer that timm builds into a model follow its grid (once per process).

    A layer is not told its model, but PyTorch tells of every module that becomes part of another.
    """
    if not _listening:
        _listening.append(register_module_module_registration_hook(_on_registration))


_listening: list[Any] = []


def _on_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
    embedding = module._modules.get(EMBEDDING)
    if embedding is None or child is None:
        return
    source = _source(embedding)
    if name == EMBEDDING and source is not None:  # replaced
        source.built_for = getattr(child, "grid_size", None)
        child.register_forward_hook(source)
    elif name != EMBEDDING:
        # Again with every part: a subclass may add prefix tokens after its blocks.
        _follow(embedding, getattr(module, "num_prefix_tokens", 0), list(child.modules()))


def _follow(embedding: nn.Module, num_prefix_tokens: int, modules: list[nn.Module]) -> int:
    mixers = [cast(_FollowsGrid, m) for m in modules if hasattr(m, "grid_source")]
    source = _source(embedding)
    if source is None:
        if not mixers:
            return 0
        source = GridSource()
        embedding.register_forward_hook(source)
    source.num_prefix_tokens = num_prefix_tokens
    source.built_for = getattr(embedding, "grid_size", None)
    for mixer in mixers:
        mixer.grid_source = source
    return len(mixers)


def _source(embedding: nn.Module) -> GridSource | None:
    return next((hook for hook in embedding._forward_hooks.values() if isinstance(hook, GridSource)), None)


def _grid_made(embedding: nn.Module, inputs: tuple[Any, ...], output: Any) -> GridSize | None:
    if isinstance(output, (tuple, list)):  # timm's PatchEmbedWithSize: tokens and their grid
        output = output[0]
    if not isinstance(output, Tensor):
        return None
    if output.ndim == 4:
        channels_last = str(getattr(embedding, "output_fmt", "NCHW")).endswith("NHWC")
        height, width = output.shape[1:3] if channels_last else output.shape[2:]
        return int(height), int(width)
    measure = getattr(embedding, "dynamic_feat_size", None)
    if measure is None or not inputs or inputs[0].ndim != 4:
        grid = getattr(embedding, "grid_size", None)
    else:
        grid = measure(tuple(inputs[0].shape[2:]))
    return None if grid is None or math.prod(grid) != output.shape[1] else (int(grid[0]), int(grid[1]))


def _in_backward() -> bool:
    """Whether a forward pass is part of a backward pass: a checkpointed one, computed again."""
    return torch._C._current_graph_task_id() != -1


def _is_checkpointed(differentiated: bool) -> bool:
    """Whether a forward pass keeps inputs only, to be computed again.

    Checkpointing replaces what is saved for the backward pass, or (``use_reentrant``) switches gradients off
    inside, although the model around is ``differentiated``.
    """
    if not torch.is_grad_enabled():
        return differentiated
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
