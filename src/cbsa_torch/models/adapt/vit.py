"""One call that gives a pretrained ViT another attention on the weights it has."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn

from cbsa_torch._core.checks import check_bool
from cbsa_torch._core.types import Broadcast, Contraction, Layout
from cbsa_torch.models.adapt.find import (
    ADAPTABLE,
    ROTARY,
    Layers,
    find_attention,
    select_layers,
)
from cbsa_torch.models.adapt.hugging_face import hugging_face_towers, is_hugging_face
from cbsa_torch.models.adapt.inherit import KINDS, check_options, inherit, why_not_inherited
from cbsa_torch.models.adapt.report import AdaptReport, LayerReport
from cbsa_torch.nn import TokenMixer, follow_grid
from cbsa_torch.nn.grids import EMBEDDING, embedding_of

MixerName = Literal["adapted_cbsa", "agent", "linear", "linear_cbsa", "mssa", "tssa"]


class AdaptedModel(NamedTuple):
    """What :func:`adapt_vit` returns."""

    model: nn.Module
    report: AdaptReport


def adapt_vit(
    model: nn.Module,
    mixer: MixerName = "adapted_cbsa",
    *,
    layers: Layers = "all",
    num_representatives: int | Sequence[int] | None = None,
    broadcast: Broadcast | None = None,
    contraction: Contraction | None = None,
    contraction_step: float | None = None,
    eps: float | None = None,
    layout: Layout | None = None,
    inplace: bool = False,
) -> AdaptedModel:
    """Replace the attention of a pretrained ViT, and keep its weights (paper, section 4.2).

    Queries, keys, values, output projection and norms are inherited under their names; what is new are steps,
    one number per head, that start so that the model begins close to the original (docs/adapt.md). Everything
    else of the model, its other layers included, stays as it is. The grid of patches is that of every image, of
    any size and aspect that the model takes.

    Args:
        model: a timm ViT (ViT, DeiT, DeiT-3, DINOv2, DINOv3, EVA, CLIP, SigLIP, NaFlexVit, hybrid, ...), a
            model that holds one, or transformers' ``ViTModel`` or ``Dinov2Model``.
        mixer: ``"adapted_cbsa"`` (CBSA*, :class:`cbsa_torch.nn.AdaptedCBSA`: pooled queries are representatives
            that collect values by the keys, are contracted, and broadcast), ``"agent"`` (CBSA∨,
            :class:`cbsa_torch.AgentAttention`: the same without contraction), ``"linear"``
            (:class:`cbsa_torch.nn.LinearAttention`), or a mixer with one projection, which inherits that of the
            values: ``"linear_cbsa"`` (12), ``"mssa"`` (9), ``"tssa"``.
        layers: ``"all"``, ``"latter_half"``, or indices of attention layers, negative ones from the end.
        num_representatives: of ``"adapted_cbsa"`` and ``"agent"``: a number or a grid such as ``(8, 8)``, see
            :class:`cbsa_torch.CBSA`. Default: 64.
        broadcast: of ``"adapted_cbsa"``: ``"softmax"`` (default), a fresh softmax of queries over
            representatives, or ``"shared"``, the attention of the extraction.
        contraction: of ``"adapted_cbsa"``: ``"softmax"`` (default, Eq. 8), ``"exact"`` (Eq. 7) or ``"none"``.
        contraction_step: of ``"adapted_cbsa"``: how much contraction there is at the start: 0 (default), none,
            so that the model starts as with ``"agent"`` and learns how much it wants, up to 1, as in the paper.
        eps: of the exact contraction (default 0.1) and of ``"linear_cbsa"`` (default 1).
        layout: of ``"adapted_cbsa"`` and ``"agent"``: ``"official"`` pools as the research code does, see
            :class:`cbsa_torch.CBSA`.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The model and a report: ``model, report = adapt_vit(vit)``. Layers that were asked for by name ("all",
        "latter_half") and cannot be adapted are in the report with the reason.

    Raises:
        ValueError: no layer can be adapted, a layer asked for by its index cannot, or options that do not fit.
            TypeError: options of the wrong type. After an error the model is as it was.
    """
    given = {
        "num_representatives": num_representatives,
        "broadcast": broadcast,
        "contraction": contraction,
        "contraction_step": contraction_step,
        "eps": eps,
        "layout": layout,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_options(mixer, options)
    check_bool("inplace", inplace)
    plan = _plan(model, mixer, layers)
    if not inplace:
        model = copy.deepcopy(model)
    built: dict[str, TokenMixer] = {}
    reports = list(plan)
    for i, layer in enumerate(plan):
        if not layer.reason:
            built[layer.name], reports[i] = inherit(model.get_submodule(layer.name), mixer, options, layer.name)
    _swap(model, built)
    asked = layers if isinstance(layers, str) else tuple(layers)
    return AdaptedModel(model, AdaptReport(type(model).__name__, mixer, options, asked, tuple(reports)))


def _plan(model: nn.Module, mixer: str, layers: Layers) -> list[LayerReport]:
    """Say of each attention layer why it stays as it is, if it does.

    Raises:
        ValueError: none of those asked for can be replaced, or one asked for by its index cannot.
    """
    found = find_attention(model)
    if not any(not layer.is_pool for layer in found):
        raise ValueError(f"model has no attention layers: {type(model).__name__}; adapt_vit takes {ADAPTABLE}")
    chosen = select_layers(found, layers)
    covered = {id(module) for tower, *_ in _towers(model) for module in tower.modules()}
    held = (part for m in model.modules() for part in (*m._parameters.values(), *m._modules.values()))
    shared = {part for part, holders in Counter(map(id, held)).items() if holders > 1}
    reports = []
    for layer in found:
        reason = layer.incompatibility or _why_not(layer.module, mixer, id(layer.module) in covered, shared)
        asked = layer.name in chosen
        if not asked and not layer.is_pool:
            reason = "not asked for"
        kind = type(layer.module).__name__
        reports.append(LayerReport(layer.name, kind, reason=reason, refused=asked and bool(reason)))
    refusals = [report for report in reports if report.refused]
    if len(refusals) == len(chosen) or (refusals and not isinstance(layers, str)):
        by_reason: dict[str, list[str]] = {}
        for report in refusals:
            by_reason.setdefault(report.reason, []).append(report.name)
        reasons = "; ".join(
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({reason})"
            for reason, names in by_reason.items()
        )
        raise ValueError(
            f"model {type(model).__name__} has layers that cannot be adapted: {reasons}. "
            f"adapt_vit takes {ADAPTABLE}"
        )
    return reports


def _why_not(module: nn.Module, mixer: str, has_grid: bool, shared: set[int]) -> str:
    """Why this mixer cannot replace a layer that others can."""
    kind = KINDS[mixer]
    if kind.shared and (isinstance(module, ROTARY) or is_hugging_face(module)):
        return f"{mixer!r} has one projection, and cannot take rotary embeddings or separate layers"
    if kind.needs_grid and not has_grid:
        return f"{mixer!r} pools over a grid, which no {EMBEDDING} tells here; 'linear' needs none"
    return why_not_inherited(module, mixer, shared)


def _towers(model: nn.Module) -> list[tuple[nn.Module, nn.Module, int]]:
    """The parts of the model with a patch embedding of their own, that, and their numbers of prefix tokens."""
    towers = hugging_face_towers(model)
    for module in model.modules():
        embedding = embedding_of(module)
        if embedding is not None and _tells_grid(module, embedding):
            towers.append((module, embedding, getattr(module, "num_prefix_tokens", 0)))
    return towers


def _tells_grid(model: nn.Module, embedding: nn.Module) -> bool:
    """Whether all layers see its grid: not of several embeddings (CrossViT), nor an odd class token (PiT)."""
    counted = hasattr(model, "num_prefix_tokens") or not hasattr(model, "cls_token")
    return counted and not isinstance(embedding, nn.ModuleList)


def _swap(model: nn.Module, mixers: dict[str, TokenMixer]) -> None:
    """Put ``mixers`` in the places that their names say and let them follow the grid, or change nothing."""
    before = {name: model.get_submodule(name) for name in mixers}
    towers = _towers(model)
    try:
        for name, mixer in mixers.items():
            model.set_submodule(name, mixer)
        for tower, embedding, prefix in towers:
            follow_grid(tower, embedding=embedding, num_prefix_tokens=prefix)
    except BaseException:
        for name, module in before.items():
            model.set_submodule(name, module)
        raise
