"""Make our mixer of a pretrained attention layer: which mixers there are, their options, what they inherit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cbsa_torch._core.checks import check_choice
from cbsa_torch._core.linear import call_changes, is_plain_linear
from cbsa_torch.models.adapt.find import ROTARY, heads_of, projections_of
from cbsa_torch.models.adapt.hugging_face import HF_MIXERS, MOBILE_MIXERS, is_hugging_face, is_mobile
from cbsa_torch.models.adapt.multihead import MULTIHEAD_MIXERS, is_multihead
from cbsa_torch.models.adapt.report import LayerReport
from cbsa_torch.models.adapt.rotary import ROTARY_MIXERS
from cbsa_torch.models.adapt.separate import SeparateHeads
from cbsa_torch.nn import MSSA, TSSA, AdaptedCBSA, AgentAttention, LinearAttention, LinearCBSA, TokenMixer


@dataclass(frozen=True)
class Kind:
    """A mixer that layers can become."""

    mixer: type[TokenMixer]
    options: tuple[str, ...] = ()
    """Those of ``adapt_vit`` that it takes."""
    shared: bool = False
    """Whether one projection is query, key and value: it inherits the projection of the values only."""
    needs_grid: bool = False


KINDS: dict[str, Kind] = {
    "adapted_cbsa": Kind(
        AdaptedCBSA,
        ("num_representatives", "broadcast", "contraction", "contraction_step", "eps", "layout"),
        needs_grid=True,
    ),
    "agent": Kind(AgentAttention, ("num_representatives", "layout"), needs_grid=True),
    "linear": Kind(LinearAttention),
    "linear_cbsa": Kind(LinearCBSA, ("eps",), shared=True),
    "mssa": Kind(MSSA, shared=True),
    "tssa": Kind(TSSA, shared=True),
}
MIXERS = tuple(KINDS)
_TAKEN = ("qkv", "proj", "norm", "proj_drop", "q_norm", "k_norm")
"""Submodules of timm's ``Attention`` that a mixer takes over."""
_TAKEN_SHARED = ("proj", "norm", "proj_drop")
"""Those that a mixer with one shared projection takes over."""


def check_options(mixer: str, options: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless ``mixer`` is known, takes the options and can be built with them."""
    check_choice("mixer", mixer, MIXERS)
    own = ", ".join(KINDS[mixer].options) or "none"
    for name in options:
        if name not in KINDS[mixer].options:
            takers = ", ".join(repr(kind) for kind in MIXERS if name in KINDS[kind].options)
            if not takers:
                raise ValueError(f"{name} is no option of any mixer: leave it out; {mixer!r} has {own}")
            raise ValueError(f"{name} is an option of mixer={takers}: leave it out; {mixer!r} has {own}")
    KINDS[mixer].mixer(8, 1, **options, device="meta")


def why_not_inherited(source: nn.Module, mixer: str, shared: set[int]) -> str:
    """What was done to parts of an attention layer that ``mixer`` cuts up or drops; empty if nothing was.

    Args:
        shared: ids of the modules and parameters that several modules hold.
    """
    kind = KINDS[mixer]
    variant = variants_of(source).get(kind.mixer)
    taken = _TAKEN_SHARED if kind.shared else variant.taken if variant is not None else _TAKEN
    for name, part in source.named_children():
        if name in taken:
            continue  # it goes on being called
        if name == "qkv":
            if not _can_be_cut(part):
                return (
                    f"its qkv was changed ({type(part).__name__}), and {mixer!r} takes only rows of its weight"
                )
            if any(id(held) in shared for held in (part, *part.parameters())):
                return f"its qkv is shared with another layer, and {mixer!r} takes a copy of rows of its weight"
        elif any(map(call_changes, part.modules())):
            return f"its {name} has hooks or another forward, which would be lost; remove that first"
    return ""


def _can_be_cut(layer: nn.Module) -> bool:
    """Whether rows of a linear layer's weight do all that the layer does for them."""
    if not is_plain_linear(layer) or parametrize.is_parametrized(layer):
        return False
    return not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in layer.parameters())


def inherit(
    source: nn.Module, mixer: str, options: dict[str, Any], name: str
) -> tuple[TokenMixer, LayerReport]:
    """Our mixer with the weights of ``source``, which keeps them, too: modules are shared, not copied.

    Args:
        name: of the layer, for the report.
    """
    kind = KINDS[mixer]
    projections = projections_of(source)
    first, projection = next(iter(projections.values())), list(projections.values())[-1]
    num_heads, head_dim = heads_of(source)
    maker = variants_of(source).get(kind.mixer, kind.mixer)
    layer = maker(
        cast(int, first.in_features),
        num_heads,
        **options,
        head_dim=head_dim,
        dim_out=cast(int, projection.out_features),
        device="meta",
    )
    if isinstance(layer, SeparateHeads):
        layer.inherit_projections(source)
    else:
        for part in _TAKEN_SHARED if kind.shared else _TAKEN:
            setattr(layer, part, getattr(source, part))
        if kind.shared:
            layer.qkv = _values(cast(nn.Linear, first))
    theirs = {key for key, _ in source.named_parameters()}
    new = _start(layer, theirs, options, _like(projection, source))
    inherited = set(source.modules())
    for module in layer.modules():
        if module not in inherited:
            module.training = source.training
    kept = [key for key, _ in layer.named_parameters() if key in theirs]
    dropped = sorted(theirs - set(kept))
    if kind.shared:
        kept = [f"{key} (values)" if key.startswith("qkv.") else key for key in kept]
        dropped = ["queries and keys of qkv", *dropped]
    rate = _attention_dropout(source)
    if rate and not layer.compares_tokens:
        dropped.append(f"attention dropout of {rate}")
    elif rate:
        layer.attn_drop = rate
    values = tuple(f"{key} = {value:g}" for key, value in new.items())
    kinds = type(source).__name__, type(layer).__name__
    return layer, LayerReport(name, *kinds, tuple(kept), values, tuple(dropped))


def variants_of(source: nn.Module) -> Mapping[type[TokenMixer], type[SeparateHeads]]:
    """The forms of our mixers that read their heads and are called as ``source`` is."""
    if is_multihead(source):
        return MULTIHEAD_MIXERS
    if is_hugging_face(source):
        return MOBILE_MIXERS if is_mobile(source) else HF_MIXERS
    return ROTARY_MIXERS if isinstance(source, ROTARY) else {}


def _attention_dropout(source: nn.Module) -> float:
    """The rate at which the original drops attention weights: a layer or a number, of several names."""
    holder = cast(Any, source).attention if is_mobile(source) else source
    for name in ("attn_drop", "attention_dropout", "dropout"):
        dropout = getattr(holder, name, None)
        if isinstance(dropout, (nn.Dropout, float)):
            return dropout.p if isinstance(dropout, nn.Dropout) else dropout
    return 0.0


def _like(*modules: nn.Module) -> Tensor:
    """A tensor with the dtype and device that new parameters get: those of the first weight."""
    tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return next((t for t in tensors if t.is_floating_point()), torch.empty(0))


def _values(qkv: nn.Linear) -> nn.Linear:
    """The part of a joint projection that makes the values, with parameters of its own."""
    rows = qkv.out_features // 3
    weight, bias = qkv.weight[-rows:], None if qkv.bias is None else qkv.bias[-rows:]
    values = nn.Linear(qkv.in_features, rows, bias is not None, device="meta")
    values.weight = nn.Parameter(weight.detach().clone(), requires_grad=qkv.weight.requires_grad)
    if bias is not None:
        values.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return values


def _start(layer: TokenMixer, names: set[str], options: dict[str, Any], like: Tensor) -> dict[str, float]:
    """Give the parameters that are not among ``names`` their first values: all 1, but for the contraction."""
    values: dict[str, float] = {}
    for name, parameter in list(layer.named_parameters()):
        if name not in names:
            values[name] = options.get("contraction_step", 0.0) if name == "step_contraction" else 1.0
            full = torch.full(parameter.shape, values[name], dtype=like.dtype, device=like.device)
            setattr(layer, name, nn.Parameter(full))
    return values
