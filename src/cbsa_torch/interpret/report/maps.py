"""Attention maps and receptive fields as small numbers that a page can draw."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cbsa_torch.interpret.attention_maps import cls_attention_maps, receptive_fields
from cbsa_torch.interpret.capture import LayerRecord, capture
from cbsa_torch.interpret.figures import colors, image_url
from cbsa_torch.nn import TSSA, AgentAttention, LinearCBSA

MOST_FIELDS = 16
"""Representatives whose receptive fields are shown."""

FIELD_BUDGET = 300_000
"""Bytes of receptive fields on a page; above, only their mean over heads."""


class Pictures(NamedTuple):
    """Images to look at."""

    inputs: Tensor
    """``(B, C, height, width)`` what the model is fed."""
    images: np.ndarray
    """``(B, height, width[, 3])`` the same in [0, 1]."""
    titles: list[str]


class LayerMaps(NamedTuple):
    """One layer's maps."""

    name: str
    """Of the layer in the model."""
    number: int
    """Counted from 1 among the captured layers."""
    kind: str
    maps: np.ndarray
    """``(B, 1 + H, rows, columns)``: the mean over heads, then every head."""
    fields: np.ndarray | None
    """``(1 + H, M, rows, columns)`` receptive fields in the first image, None without representatives; M is at
    most :data:`MOST_FIELDS`, evenly spread."""
    representatives: int
    """How many there are; 0 if none."""


class Maps(NamedTuple):
    """Maps of all layers that have a two-dimensional grid."""

    layers: list[LayerMaps]
    missing: dict[str, str]
    """Layer to the reason why it has no map."""
    first: str = "class token"
    """What the token is whose maps they are: "class token", "first token" or "first patch"."""
    notes: Sequence[str] = ()
    """Sentences about maps that are not the row of an attention matrix."""


@torch.no_grad()
def measure_maps(model: nn.Module, pictures: Pictures) -> Maps:
    """Run the model on ``pictures`` and lay out where its first token looks."""
    layers, missing, prefixes = [], {}, set()
    notes: dict[str, None] = {}
    with capture(model) as records:
        model(pictures.inputs)
    for number, record in enumerate(records.values(), 1):
        reason = _no_map(record)
        if reason is None:
            try:
                heads = cls_attention_maps(record)
            except ValueError as error:  # a mixer without such a map says why
                reason = str(error)
        if reason is not None:
            missing[record.name] = reason
            continue
        fields, count = _fields(record)
        kind = type(record.layer).__name__
        prefixes.add(record.num_prefix_tokens)
        notes.update(dict.fromkeys(_notes(record.layer)))
        layers.append(LayerMaps(record.name, number, kind, _with_mean(heads, 1), fields, count))
    return Maps(layers, missing, _first(model, prefixes), list(notes))


def _first(model: nn.Module, prefixes: set[int]) -> str:
    """What the first token is."""
    if prefixes == {0}:
        return "first patch"
    # Registers are prefix tokens, too; the class token comes before them where there is one.
    named = any(isinstance(getattr(module, "cls_token", None), Tensor) for module in model.modules())
    return "class token" if named and 0 not in prefixes else "first token"


def _notes(layer: nn.Module) -> list[str]:
    """What a map of the layer is where it is not the row of a softmax or of A Aᵀ."""
    if isinstance(layer, TSSA) and layer.form == "tost":
        return [
            "TSSA compares no token with another: its maps show how much each token belongs to a head, which "
            "looks the same from every token."
        ]
    if isinstance(layer, TSSA | LinearCBSA):
        inner = "the diagonal of WᵀW" if isinstance(layer, TSSA) else "WᵀW"
        return [
            f"{type(layer).__name__} forms no attention matrix: its maps are rows of "
            f"W (ε²I + G)⁻¹ Wᵀ with {inner} for G, whose entries may be negative."
        ]
    if isinstance(layer, AgentAttention):
        return ["The matrix of AgentAttention is the product of its two softmaxes, through the agents."]
    return []


def _no_map(record: LayerRecord) -> str | None:
    if record.grid_size is None:
        return "its tokens have no grid"
    if len(record.grid_size) != 2:
        return f"its grid has {len(record.grid_size)} axes, and a map needs 2"
    return None


def _fields(record: LayerRecord) -> tuple[np.ndarray | None, int]:
    try:
        fields = receptive_fields(record)[0]  # (H, M, *grid)
    except ValueError:  # a mixer without representatives
        return None, 0
    count = fields.shape[1]
    return _with_mean(fields[:, spread(count, MOST_FIELDS)], 0), count


def _with_mean(values: Tensor, heads: int) -> np.ndarray:
    """Put the mean over the axis ``heads`` before the heads."""
    values = values.detach().float()
    return torch.cat([values.mean(heads, keepdim=True), values], heads).cpu().numpy()


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` indices, evenly spread, first and last included."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)] if most > 1 else [0]


def page_data(maps: Maps, pictures: Pictures) -> dict[str, Any]:
    """What the page's script draws: bytes in base64, each map scaled to its own range."""
    size = sum(layer.fields.size for layer in maps.layers if layer.fields is not None)
    heads = slice(None) if size <= FIELD_BUDGET else slice(1)
    return {
        "colors": colors(),
        "images": [
            {"title": title, "source": image_url(image)}
            for title, image in zip(pictures.titles, pictures.images, strict=True)
        ],
        "layers": [
            {
                "name": layer.name,
                "number": layer.number,
                "kind": layer.kind,
                "heads": layer.maps.shape[1] - 1,
                "rows": layer.maps.shape[2],
                "columns": layer.maps.shape[3],
                "maps": _bytes(layer.maps),  # [image][head][row][column]
                "representatives": layer.representatives,
                "fields": None if layer.fields is None else _bytes(layer.fields[heads]),
                "shown": 0 if layer.fields is None else layer.fields.shape[1],
                "fieldHeads": 0 if layer.fields is None else len(layer.fields[heads]) - 1,
            }
            for layer in maps.layers
        ],
    }


def _bytes(values: np.ndarray) -> str:
    low, high = values.min((-2, -1), keepdims=True), values.max((-2, -1), keepdims=True)
    scaled = (values - low) / np.where(high > low, high - low, 1)
    return base64.b64encode(np.round(255 * scaled).astype(np.uint8).tobytes()).decode()


def mean_maps(maps: Maps, layers: Sequence[int]) -> list[tuple[str, np.ndarray]]:
    """The mean over heads of some layers, for a static panel."""
    return [(f"layer {maps.layers[i].number}", maps.layers[i].maps[:, 0]) for i in layers]
