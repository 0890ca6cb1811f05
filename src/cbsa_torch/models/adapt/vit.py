"""One call that gives a pretrained ViT another attention on the weights it has."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import nn

from cbsa_torch._core.checks import check_bool
from cbsa_torch._core.types import Broadcast, Contraction, Layout
from cbsa_torch.models.adapt.find import ADAPTABLE, AttentionLayer, Layers, find_attention, select_layers
from cbsa_torch.models.adapt.hugging_face import is_hugging_face, record_adaptation
from cbsa_torch.models.adapt.inherit import KINDS, check_options, inherit, variants_of, why_not_inherited
from cbsa_torch.models.adapt.multihead import is_multihead
from cbsa_torch.models.adapt.report import AdaptReport, LayerReport
from cbsa_torch.models.adapt.towers import find_towers
from cbsa_torch.nn import TokenMixer
from cbsa_torch.nn.embeddings import EMBEDDING
from cbsa_torch.nn.grids import follow

MixerName = Literal["adapted_cbsa", "agent", "linear", "linear_cbsa", "mssa", "tssa"]


class AdaptedModel(NamedTuple):
    """What :func:`adapt_vit` returns.

    Examples:
        >>> import timm
        >>> from cbsa_torch.models import adapt_vit
        >>> adapted = adapt_vit(timm.create_model("vit_tiny_patch16_224", depth=2), "linear")
        >>> type(adapted.model.blocks[0].attn).__name__
        'LinearAttention'
    """

    model: nn.Module
    """The model, or its copy, with the new layers."""
    report: AdaptReport
    """What became of each layer."""


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
    one number per head, that start so that the model begins close to the original
    (docs/reference/adaptation.md). Everything else of the model, its other layers included, stays as it is. The
    grid of patches is that of every image, of any size and aspect that the model takes.

    Args:
        model: a timm ViT (ViT, DeiT, DeiT-3, DINOv2, DINOv3, EVA, CLIP, SigLIP, NaFlexVit, hybrid,
            MobileViT, ...), a model with ``nn.MultiheadAttention`` (torchvision's ViT, OpenCLIP's, the encoder
            of DETR), or a ViT, DeiT, DINOv2, MobileViT, CLIP or SigLIP of transformers; or what holds one. Text
            towers and decoders stay.
        mixer: ``"adapted_cbsa"`` (CBSA*, :class:`cbsa_torch.nn.AdaptedCBSA`: pooled queries are representatives
            that collect values by the keys, are contracted, and broadcast), ``"agent"`` (CBSA∨,
            :class:`cbsa_torch.AgentAttention`: the same without contraction), ``"linear"``
            (:class:`cbsa_torch.nn.LinearAttention`), or a mixer with one projection, which inherits that of the
            values: ``"linear_cbsa"`` (12), ``"mssa"`` (9), ``"tssa"``.
        layers: ``"all"``, ``"latter_half"``, or indices of attention layers, negative ones from the end. Halves
            and indices are of those that see images: text towers beside them, and decoders, do not count.
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

    Examples:
        >>> import timm
        >>> from cbsa_torch.models import adapt_vit
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)  # pretrained=True
        >>> model, report = adapt_vit(vit, num_representatives=36, layers="latter_half")
        >>> model(torch.randn(1, 3, 224, 224)).shape, [layer.name for layer in report.adapted]
        (torch.Size([1, 1000]), ['blocks.1.attn'])
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
    reports = list(plan.layers)
    for i, layer in enumerate(reports):
        if not layer.reason:
            built[layer.name], reports[i] = inherit(model.get_submodule(layer.name), mixer, options, layer.name)
    _swap(model, built)
    asked = layers if isinstance(layers, str) else tuple(layers)
    record_adaptation(model, mixer, options, asked, plan.countable, built)
    return AdaptedModel(model, AdaptReport(type(model).__name__, mixer, options, asked, tuple(reports)))


class _Plan(NamedTuple):
    layers: list[LayerReport]
    countable: list[str]
    """The names of the layers that halves and indices are of."""


def _plan(model: nn.Module, mixer: str, layers: Layers) -> _Plan:
    """Say of each attention layer why it stays as it is, if it does.

    Raises:
        ValueError: none of those asked for can be replaced, or one asked for by its index cannot.
    """
    found = find_attention(model)
    names = [layer.name for layer in found if not layer.is_pool]
    if not names:
        raise ValueError(f"model has no attention layers: {type(model).__name__}; adapt_vit takes {ADAPTABLE}")
    covered = _parts_that_see_images(model)
    countable = [layer.name for layer in countable_layers(model)]
    chosen = select_layers(names if layers == "all" else countable, layers)
    held = (part for m in model.modules() for part in (*m._parameters.values(), *m._modules.values()))
    shared = {part for part, holders in Counter(map(id, held)).items() if holders > 1}
    reports = []
    for layer in found:
        reason = layer.incompatibility or _why_not(layer.module, mixer, covered, shared)
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
    return _Plan(reports, countable)


def countable_layers(model: nn.Module) -> list[AttentionLayer]:
    """The attention layers that halves and indices are of.

    Neither poolings of heads nor, beside parts that see images, text towers and decoders.
    """
    layers = [layer for layer in find_attention(model) if not layer.is_pool]
    covered = _parts_that_see_images(model)
    return [x for x in layers if not (x.decodes or _sees_no_images(x.module, covered))] or layers


def _parts_that_see_images(model: nn.Module) -> set[int]:
    """Ids of the modules inside towers of images."""
    return {id(module) for tower in find_towers(model) for module in tower.module.modules()}


def _sees_no_images(module: nn.Module, covered: set[int]) -> bool:
    """Whether it is of a text tower or a head, beside the parts of the model that see images."""
    beside = is_hugging_face(module) or (is_multihead(module) and bool(covered))
    return beside and id(module) not in covered


def _why_not(module: nn.Module, mixer: str, covered: set[int], shared: set[int]) -> str:
    """Why this mixer cannot replace a layer that others can.

    Args:
        covered: ids of the modules in the parts of the model that see images.
        shared: ids of what several modules hold.
    """
    kind = KINDS[mixer]
    if kind.shared and variants_of(module):
        return f"{mixer!r} has one projection, and cannot take rotary embeddings or separate layers"
    if _sees_no_images(module, covered):
        return "it is in no part of the model that sees images, but in a text tower or a head"
    if kind.needs_grid and id(module) not in covered:
        return f"{mixer!r} pools over a grid, which no {EMBEDDING} tells here; 'linear' needs none"
    return why_not_inherited(module, mixer, shared)


def _swap(model: nn.Module, mixers: dict[str, TokenMixer]) -> None:
    """Put ``mixers`` in the places that their names say and let them follow the grid, or change nothing."""
    before = {name: model.get_submodule(name) for name in mixers}
    towers = find_towers(model)
    try:
        for name, mixer in mixers.items():
            model.set_submodule(name, mixer)
        for tower in towers:
            parts = tower.module.children()
            follow(tower.module, tower.embedding, parts, tower.num_prefix_tokens, cell=tower.cell)
    except BaseException:
        for name, module in before.items():
            model.set_submodule(name, module)
        raise
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and not mixers.keys().isdisjoint(
            _names_in(model, encoder)
        ):
            encoder.use_nested_tensor = False  # padded batches stay dense: mixers take a key_padding_mask


def _names_in(model: nn.Module, part: nn.Module) -> set[str]:
    """The names, in the model, of the modules in a part of it."""
    inside = set(part.modules())
    return {name for name, module in model.named_modules() if module in inside}
