"""The process-wide hook that lets ``timm.create_model(name, attn_layer=CBSA)`` work without a further call.

A layer is not told its model, but PyTorch tells of every module that becomes part of another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils.hooks import RemovableHandle

from cbsa_torch.nn.embeddings import embedding_of, is_embedding
from cbsa_torch.nn.grids import follow, modules_inside


def install_grid_hook() -> None:
    """Have every mixer that timm builds into a model follow its grid (once per process).

    The first mixer installs the hook, unless it was removed.

    Examples:
        >>> from cbsa_torch.nn import install_grid_hook
        >>> install_grid_hook()  # again, after remove_grid_hook()
    """
    if not _installed:
        _installed.append(register_module_module_registration_hook(_on_registration))


install_grid_hook_once = functools.cache(install_grid_hook)
"""For the first mixer: later calls do nothing."""


def remove_grid_hook() -> None:
    """Remove the hook of :func:`install_grid_hook`: later models need :func:`cbsa_torch.nn.follow_grid`.

    Layers that are built without the hook assume no square: those that need a grid raise until they have one.
    Models and layers that are built already go on as they are: such a layer, put into a model after this, still
    assumes a square.

    Examples:
        >>> from cbsa_torch.nn import install_grid_hook, remove_grid_hook
        >>> remove_grid_hook()  # models that are built now need follow_grid(model)
        >>> install_grid_hook()
    """
    install_grid_hook_once()  # now, so that no mixer does it
    while _installed:
        _installed.pop().remove()


_installed: list[RemovableHandle] = []


def has_grid_hook() -> bool:
    """Whether the hook of :func:`install_grid_hook` is there now."""
    return bool(_installed)


def _on_registration(module: nn.Module, name: str, child: nn.Module | None) -> None:
    if child is None:
        return
    replaced = module._modules.get(name)
    if replaced is not None:
        # The model around may have a patch embedding, which is not seen from here.
        _assume_no_squares(child, replaced)
    if replaced is not None or isinstance(module, (nn.Sequential, nn.ModuleList)):
        _join(child, [*module.children()] if replaced is None else [replaced, *module.children()])
    before = embedding_of(module)
    if not is_embedding(name, child):
        # Again with every part: a subclass may add prefix tokens after its blocks.
        if before is not None:
            follow(module, before, [child])
    elif before is None or before not in child.modules():  # not just wrapped, by torch.compile for example
        follow(module, child, [part for part in module.children() if part is not before])


def _join(child: nn.Module, others: list[nn.Module]) -> None:
    """Let the mixers in a new part of a model follow what those it replaces, or those beside it, follow."""
    mixers: set[Any] = {part for part in modules_inside([child]) if hasattr(part, "grid_follower")}
    if mixers:
        leaders = (getattr(part, "grid_follower", None) for part in modules_inside(others))
        leader = next((leader for leader in leaders if leader is not None), None)
        if leader is not None:
            leader.source.lead([child], mixers)


def _assume_no_squares(child: nn.Module, replaced: nn.Module) -> None:
    """Tell all mixers in a new part of a model, but those that were in the part it replaces: only wrapped."""
    mixers: list[Any] = [part for part in _parts(child) if hasattr(part, "grid_follower")]
    known = {*_parts(replaced)} if mixers else set()
    for mixer in mixers:
        if mixer not in known:
            mixer.assumes_square = False


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those in it. Not by ``modules()``, which of a module of peft changes it, or fails."""
    yield module
    for child in module.children():
        yield from _parts(child)
