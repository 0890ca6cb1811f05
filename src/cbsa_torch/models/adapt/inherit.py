"""Make our mixer of a pretrained attention layer: which mixers there are, their options, what they inherit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from cbsa_torch._core.checks import check_choice
from cbsa_torch._core.types import BROADCASTS
from cbsa_torch.models.adapt.find import ROTARY
from cbsa_torch.models.adapt.hugging_face import HF_MIXERS, is_hugging_face
from cbsa_torch.models.adapt.rotary import ROTARY_MIXERS, SeparateHeads
from cbsa_torch.nn import MSSA, TSSA, AdaptedCBSA, AgentAttention, LinearAttention, LinearCBSA, TokenMixer


@dataclass(frozen=True)
class Kind:
    """A mixer that layers can become."""

    mixer: type[TokenMixer]
    options: tuple[str, ...] = ()
    """Of ``adapt_vit``, those that it takes."""
    shared: bool = False
    """Whether one projection is query, key and value: it inherits that of the values."""
    needs_grid: bool = False


KINDS: dict[str, Kind] = {
    "cbsa": Kind(
        AdaptedCBSA,
        ("num_representatives", "broadcast", "contraction", "contraction_step", "eps", "layout"),
        needs_grid=True,
    ),
    "cbsa_agent": Kind(AgentAttention, ("num_representatives", "broadcast", "layout"), needs_grid=True),
    "linear": Kind(LinearAttention),
    "linear_cbsa": Kind(LinearCBSA, ("eps",), shared=True),
    "mssa": Kind(MSSA, shared=True),
    "tssa": Kind(TSSA, shared=True),
}
MIXERS = tuple(KINDS)


def check_options(mixer: str, options: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless ``mixer`` is known, takes the options and can be built with them."""
    check_choice("mixer", mixer, MIXERS)
    if "broadcast" in options:
        check_choice("broadcast", options["broadcast"], BROADCASTS)
    for name in options:
        if name not in KINDS[mixer].options:
            takers = ", ".join(repr(kind) for kind in MIXERS if name in KINDS[kind].options)
            if not takers:
                raise ValueError(f"{name} is no option of any mixer")
            raise ValueError(f"{name} is an option of mixer={takers}, not of {mixer!r}")
    if options.get("contraction") == "none":
        raise ValueError("contraction must be 'softmax' or 'exact', got 'none'; that is mixer='cbsa_agent'")
    _build(mixer, options, 8, 1, device="meta")


class Inherited(NamedTuple):
    """A layer in place of another, and what it has of it."""

    mixer: TokenMixer
    inherited: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]


def inherit(source: nn.Module, mixer: str, options: dict[str, Any]) -> Inherited:
    """Our mixer with the weights of ``source``, which keeps them, too: parameters are shared, not copied."""
    kind = KINDS[mixer]
    projection = cast(nn.Linear, source.o_proj if is_hugging_face(source) else source.proj)
    first = cast(nn.Linear, source.q_proj if getattr(source, "qkv", None) is None else source.qkv)
    layer = _build(
        mixer,
        options,
        first.in_features,
        cast(int, source.num_attention_heads if is_hugging_face(source) else source.num_heads),
        variants=_variants(source),
        head_dim=cast(int, source.head_dim),
        dim_out=projection.out_features,
        device="meta",
    )
    if isinstance(layer, SeparateHeads):
        layer.inherit_projections(source)
    else:
        layer.proj, layer.norm, layer.proj_drop = projection, source.norm, source.proj_drop  # type: ignore[assignment]
        layer.qkv = _values(first) if kind.shared else first
        if not kind.shared:
            layer.q_norm, layer.k_norm = source.q_norm, source.k_norm  # type: ignore[assignment]
    names = {name for name, _ in source.named_parameters()}
    new = _start(layer, names, options, projection.weight)
    layer.train(source.training)
    kept = [name for name, _ in layer.named_parameters() if name in names]
    dropped = sorted(names - set(kept))
    if kind.shared:
        kept = [f"{name} (values)" if name.startswith("qkv.") else name for name in kept]
        dropped = ["queries and keys of qkv", *dropped]
    dropout = getattr(source, "attn_drop", None)
    rate = dropout.p if isinstance(dropout, nn.Dropout) else getattr(source, "attention_dropout", 0.0)
    if rate and not layer.compares_tokens:
        dropped.append(f"attention dropout of {rate}")
    elif rate:
        layer.attn_drop = rate
    values = tuple(f"{name} = {value:g}" for name, value in new.items())
    return Inherited(layer, tuple(kept), values, tuple(dropped))


def _variants(source: nn.Module) -> Mapping[type[TokenMixer], type[TokenMixer]]:
    """The forms of our mixers that read their heads and are called as ``source`` is."""
    if is_hugging_face(source):
        return HF_MIXERS
    return ROTARY_MIXERS if isinstance(source, ROTARY) else {}


def _build(
    mixer: str,
    options: dict[str, Any],
    dim: int,
    num_heads: int,
    *,
    variants: Mapping[type[TokenMixer], type[TokenMixer]] = MappingProxyType({}),
    **sizes: Any,
) -> TokenMixer:
    kind, options = KINDS[mixer], dict(options)
    maker: type[TokenMixer] = kind.mixer
    if mixer == "cbsa_agent" and options.pop("broadcast", "softmax") != "softmax":
        maker, options = AdaptedCBSA, {**options, "broadcast": "shared", "contraction": "none"}
    return variants.get(maker, maker)(dim, num_heads, **options, **sizes)


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
